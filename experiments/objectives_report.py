"""The page of launch/quickstart_objectives.sh: objectives ranked, what is claimed of them, and why they differ.

python experiments/objectives_report.py --run_dir=runs/objectives --out=docs/objectives
python experiments/objectives_report.py --run_dir=runs/objectives --winner       # prints the first of the ranking

Reads what the script left in RUN_DIR: the ranking, the isoFLOP study of its first variant, measured.json. Writes into
OUT report.md, numbers.json, by_time.png, quality.png, and the reports of both sweeps in ranking/ and isoflop/.
"""

import argparse
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from objectives_findings import LEVEL, PLAIN, study, title, winner

from llada import json_files
from llada.errors import UserError
from llada.files import write_atomically
from llada.scaling import figure, provenance
from llada.scaling.numbers import filled, flops, markdown_table, or_dash, short, three, times
from llada.scaling.series import of_key

_LEVEL = f"{LEVEL:.0%}"
INNER = (0.04, 0.96)  # t that the axes of by_time.png are made for: at 0 and 1 some variants were never trained
_BIASED = " *"  # behind a series that is not trained on the bound


# --- words of numbers


def named(found: dict[str, Any], key: str) -> str:
    """The series, marked where its training loss is not the bound."""
    return title(key) + ("" if found["bound_trained"][key] else _BIASED)


def signed(d: dict[str, Any] | None, form: str = "+.3f") -> str:
    """A difference with its interval."""
    if d is None:
        return "-"
    ends = "" if d["low"] is None else f" ({d['low']:{form}} to {d['high']:{form}})"
    return f"{d['value']:{form}}{ends}"


def percent(d: dict[str, Any] | None) -> str:
    """A difference of shares in percentage points."""
    scaled = d and {key: None if d[key] is None else 100 * d[key] for key in ("value", "low", "high")}
    return signed(scaled, "+.1f")


def ranges(word: str, grid: Sequence[float], chosen: Iterable[bool]) -> str:
    """Where it is so: "lower at t 0.3 to 0.7, 1", or "lower nowhere"."""
    groups: list[list[float]] = []
    before = False
    for t, is_in in zip(grid, chosen, strict=True):
        if is_in and before:
            groups[-1].append(t)
        elif is_in:
            groups.append([t])
        before = is_in
    texts = [f"{g[0]:.3g}" if len(g) == 1 else f"{g[0]:.3g} to {g[-1]:.3g}" for g in groups]
    return f"{word} at t {', '.join(texts)}" if texts else f"{word} nowhere"


def beyond_intervals(grid: Sequence[float], d: dict[str, Any]) -> str:
    """At which times a difference is beyond its interval, to either side."""
    lower = ranges("lower", grid, (high < 0 for high in d["high"]))
    return f"{lower}; {ranges('higher', grid, (low > 0 for low in d['low']))}"


# --- sections


def claims(found: dict[str, Any]) -> str:
    """What is claimed, and by rule from the intervals what was found."""
    shares = {entry["variant"]: entry for entry in found["ranking"]["variants"]}
    rows = [["variant", "claimed", "by", "share of FLOPs here", "found"]]
    for claim in found["claims"]:
        entry = shares.get(claim["variant"])
        text = _share(entry) if entry and entry["share"] else "-"
        rows.append([claim["variant"], claim["text"], claim["source"], text, claim["found"]])
    return f"{markdown_table(rows)}\n\n{filled(CLAIMS)}"


def _share(entry: dict[str, Any]) -> str:
    value, low, high = (
        times(math.inf if entry["share"][k] is None else entry["share"][k]) for k in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})" if entry["degrees_of_freedom"] else value


def by_time(found: dict[str, Any]) -> str:
    """The loss of each series at each t, and where a variant's differs from plain LLaDA's."""
    grid, of, looked_at = found["settings"]["times"], found["by_time"], found["looked_at"]
    rows = [["", *(f"t = {t:.2g}" for t in grid)]]
    for key, each in of.items():
        spread = each["spread"] or [None] * len(grid)
        cells = [f"{nats:.3f} ± {or_dash(s, '.3f')}" for nats, s in zip(each["mean"], spread, strict=True)]
        rows.append([named(found, key), *cells])
    words = BY_TIME.format(
        rows=found["settings"]["time_rows"], length=looked_at["length"], size=looked_at["size"],
        budget=flops(looked_at["budget"]), seeds=", ".join(map(str, looked_at["seeds"])),
    )  # fmt: skip
    texts = [filled(words), markdown_table(rows)]
    known = {key: each["difference"] for key, each in of.items() if each["difference"] and each["difference"]["low"]}
    if known:
        lines = [f"- {named(found, key)}: {beyond_intervals(grid, d)}." for key, d in known.items()]
        texts.append(
            f"Against plain LLaDA, beyond the {_LEVEL} interval for one variant at one t:\n\n" + "\n".join(lines)
        )
    return "\n\n".join(texts)


def gradients(found: dict[str, Any]) -> str:
    """Norms of gradients over windows, and how often they were clipped."""
    rows = [["", "median", "90 % quantile", "largest", "90 % over median", "steps clipped"]]
    for key, g in found["gradients"].items():
        norms = [three(g[name]) for name in ("median", "q90", "largest")]
        rows.append([named(found, key), *norms, three(g["q90"] / g["median"]), f"{g['clipped']:.1%}"])
    return f"{markdown_table(rows)}\n\n{filled(GRADIENTS)}"


def samples(found: dict[str, Any]) -> str:
    """What the judge says of the texts of each series, in each order."""
    header = ["", "order", "judge's NLL", "over plain LLaDA", "entropy", "repeated 4-grams"]
    of_text = found["held_out"]
    rows = [header, ["held-out text", "-", *_scores(of_text, "-")]]
    for order, of in found["samples"].items():
        rows += [[named(found, key), order, *_scores(each, signed(each["difference"]))] for key, each in of.items()]
    judge = found["judge"]
    words = SAMPLES.format(
        texts=found["settings"]["texts"], parameters=short(judge["parameters"]), **found["looked_at"],
        nats=judge["eval_nats_per_token"], tokens=short(judge["tokens"]), level=_LEVEL,
    )  # fmt: skip
    return f"{markdown_table(rows)}\n\n{filled(words)}"


def _scores(of: dict[str, Any], over: str) -> list[str]:
    return [f"{of['nats']:.3f} ± {of['stderr']:.3f}", over, f"{of['entropy']:.3f}", f"{of['repeated']:.1%}"]


def infill(found: dict[str, Any]) -> str:
    """The share of masked tokens that each series fills in as they were."""
    shares = list(found["infill"])
    rows = [["", *(head for share in shares for head in (f"{float(share):.0%} masked", "over plain LLaDA, points"))]]
    for key in found["infill"][shares[0]]:
        cells = [named(found, key)]
        for share in shares:
            each = found["infill"][share][key]
            cells += [f"{each['mean']:.1%} ± {each['stderr']:.1%}", percent(each["difference"])]
        rows.append(cells)
    return f"{markdown_table(rows)}\n\n{filled(INFILL.format(rows=found['settings']['infill_rows'], level=_LEVEL))}"


def quoted(path: Path, headings: Sequence[str], level: str = "##") -> str:
    """Sections of a sweep's report. UserError where it has none of such a heading."""
    parts = re.split(r"^## (.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if missing := [heading for heading in headings if heading not in sections]:
        raise UserError(f"{path} has no section {missing[0]!r}; run llada sweep on its directory again")
    return "\n\n".join(f"{level} {heading}\n\n{sections[heading].strip()}" for heading in headings)


def summary(path: Path) -> str:
    """The sentences at the head of a sweep's report."""
    return path.read_text(encoding="utf-8").split("\n\n")[1].strip()


# --- pictures


def draw_times(found: dict[str, Any]) -> bytes:
    """`by_time.png`: the loss of each series by t, and its difference to plain LLaDA's."""
    grid, of = found["settings"]["times"], found["by_time"]
    looked_at = found["looked_at"]
    caption = (
        f"Held-out rows of {looked_at['length']} tokens, size {looked_at['size']} at {flops(looked_at['budget'])} "
        f"FLOPs, means over seeds {', '.join(map(str, looked_at['seeds']))}. Right: bars are {_LEVEL} intervals of "
        "differences paired by seed, each for one variant. Hollow: trained on a loss that is not the bound. Axes "
        f"show t from {INNER[0]:g} to {INNER[1]:g}; beyond, points may lie outside: the table has them."
    )
    fig, (left, right) = figure.panels(2, _times_title(found), caption)
    for key, style in _styles(found).items():
        d = of[key]["difference"]
        left.plot(grid, of[key]["mean"], **style)
        if d is not None:
            ends = (d["low"], d["high"]) if d["low"] is not None else (d["value"], d["value"])
            bars = [[abs(v - end) for v, end in zip(d["value"], side, strict=True)] for side in ends]
            right.errorbar(grid, d["value"], bars, elinewidth=0.7, **style)
    right.axhline(0, color=figure.COLOURS[of_key(PLAIN).family.name], linewidth=1)
    inner = [i for i, t in enumerate(grid) if INNER[0] <= t <= INNER[1]] or range(len(grid))
    differences = [each["difference"]["value"] for each in of.values() if each["difference"]]
    for ax, curves in ((left, [each["mean"] for each in of.values()]), (right, [*differences, [0.0] * len(grid)])):
        ax.set_ylim(*figure.limits([curve[i] for curve in curves for i in inner], 0.15))
    left.set(xlabel="share t of tokens that are masked", ylabel="nats per masked token")
    right.set(xlabel="share t of tokens that are masked", ylabel="over plain LLaDA, nats per masked token")
    right.legend(
        *left.get_legend_handles_labels(), frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8
    )
    return figure.png(fig)


def _times_title(found: dict[str, Any]) -> str:
    key = of_key(PLAIN)._replace(variant=found["winner"]).key
    d = found["by_time"][key]["difference"] if key in found["by_time"] else None
    if d is None or d["low"] is None:
        return "The loss by the share of tokens that are masked"
    return f"{title(key)}, against plain: {beyond_intervals(found['settings']['times'], d)}"


def draw_quality(found: dict[str, Any]) -> bytes:
    """`quality.png`: the judge's NLL of texts beside their entropy, and what is filled in."""
    share = list(found["infill"])[-1]
    caption = (
        "Left: small, texts written by low confidence; large, in random order; markers as on the right, the circle is "
        "plain LLaDA, the star held-out text. Good text is near the star: a low NLL with a low entropy is repetition. "
        f"Right: bars are {_LEVEL} intervals, each for one variant. Hollow: trained on a loss that is not the bound."
    )
    of = found["infill"][share]
    fig, (left, right) = figure.panels(2, _quality_title(found, share), caption)
    styles = _styles(found)
    for key, style in styles.items():
        for order, size in (("random", 8), ("low_confidence", 4)):
            if key in found["samples"].get(order, {}):
                each = found["samples"][order][key]
                shown = style | dict(linestyle="", markersize=size)
                left.errorbar(each["entropy"], each["nats"], 2 * each["stderr"], elinewidth=0.7, **shown)
    text = found["held_out"]
    left.errorbar(
        text["entropy"], text["nats"], 2 * text["stderr"], marker="*", markersize=14, color="0.2", linestyle=""
    )
    left.set(xlabel="entropy of all their tokens, nats", ylabel="judge's nats per token")
    rows = [key for key in of if of[key]["difference"] is not None][::-1]
    for y, key in enumerate(rows):
        d = of[key]["difference"]
        bars = None if d["low"] is None else [[100 * (d["value"] - d["low"])], [100 * (d["high"] - d["value"])]]
        right.errorbar(100 * d["value"], y, xerr=bars, capsize=3, **(styles[key] | dict(linestyle="", markersize=7)))
    right.axvline(0, color=figure.COLOURS[of_key(PLAIN).family.name], linewidth=1)
    right.set_yticks(range(len(rows)), [title(key) for key in rows])
    right.set(xlabel=f"tokens filled in right, points over plain LLaDA, {float(share):.0%} masked")
    return figure.png(fig)


def _quality_title(found: dict[str, Any], share: str) -> str:
    ends = {key: each["difference"] for key, each in found["infill"][share].items()}
    better = [title(key) for key, d in ends.items() if d and d["low"] is not None and d["low"] > 0]
    number = sum(d is not None for d in ends.values())
    return (
        f"With {float(share):.0%} masked, {len(better)} of {number} variants fill in more tokens right than plain LLaDA"
    )


def _styles(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    styles = {series.key: style for series, style in figure.styles(found["by_time"]).items()}
    return {
        key: dict(color=styles[key].colour, marker=styles[key].marker, markersize=4, linewidth=1.2, label=title(key))
        | ({} if found["bound_trained"][key] else dict(markerfacecolor="white"))
        for key in found["by_time"]
    }


# --- the page


INTRODUCTION = """
LLaDA trains on its likelihood bound: t uniform, each token masked with probability t, weights 1/t (Eq. (3)). Other
objectives are said to be better, each by a yardstick of its own. Here {compared} of them are trained beside plain LLaDA
and all are ranked by one figure, the bound (Eq. (6)) of the same held-out rows with the same masks, whatever they were
trained on. `*` marks those whose training loss is not that bound.
"""
CLAIMS = """
"Found" follows from the interval of the share alone: replicates where it is on the claimed side of 1, does not where it
is on the other one, and no difference that this study can tell where it holds 1. Each interval is for one variant.
Claims are of other sizes, texts and budgets, some by other yardsticks: this tells whether they hold here.
"""
BY_TIME = """
Nats per masked token of {rows} held-out rows with t of their {length} tokens masked, at least one, by the models of
size {size} at {budget} FLOPs: means over seeds {seeds}, ± the standard deviation between them. The masks are the same
for all. The bound is the mean of this curve over the number of masked tokens.
"""
GRADIENTS = """
Norms before clipping, of the same runs and all their seeds: means over windows of steps (`train.log_every`), so single
steps lie farther apart. How far the 90 % quantile is above the median tells of noise; medians differ in scale too.
"""
SAMPLES = """
{texts} texts of {length} tokens per model, written from masks alone at temperature 1, one token a step, with the same
seeds for all; `random` order samples from the model as it was trained, `low_confidence` is the usual decoding. The
judge, an ARM of {parameters} parameters and {tokens} tokens, has {nats:.3f} nats per token on all held-out rows; ± is a
standard error over texts. Entropy (nats) and repeated 4-grams are of all texts of a model together: fluent repetition
has a low NLL, a low entropy and many repeated 4-grams. Differences are paired by seed, with {level} intervals.
"""
INFILL = """
{rows} held-out rows with the same tokens masked for all models, filled by low confidence, one token a step: the share
of masked tokens that come out as they were. ± is a standard error over rows; {level} intervals of the differences hold
both rows and seeds.
"""
CAVEATS = (
    "All objectives have the learning rates, the clipping and the batch size of plain LLaDA: one that another rate "
    "suits better looks worse than it is.",
    "The models are tiny, the rows short and the text is code: what is best here need not be best elsewhere. "
    "`experiments/objectives.py:full` is the same study for a cluster.",
    "A budget counts what is trained on. Complementary masks read half of the rows, each twice.",
    "The first of a ranking is in part the luckiest; the report of the ranking says whether it is more than chance.",
    "Judge and mask predictors were trained on the same text: it tells how far texts are from that, not whether they "
    "are true or useful.",
)


def page(run_dir: Path, found: dict[str, Any], seconds: float | None) -> str:
    """`report.md`."""
    ranking, isoflop = run_dir / "ranking" / "report.md", run_dir / found["winner"] / "report.md"
    of_isoflop = quoted(isoflop, ("Best size of each budget", "Exponents", "Compute gap"), "###")
    took = "" if seconds is None else f" All of it took {seconds / 60:.0f} minutes there, with whatever else ran."
    parts = [
        "# Training objectives ranked by one held-out bound",
        filled(INTRODUCTION.format(**found["ranking"])),
        summary(ranking),
        "![share of the FLOPs that each variant needs](ranking/ranking.png)",
        quoted(ranking, ("FLOPs to reach the plain final loss",)),
        "Losses, intervals and readings: [the report of the ranking](ranking/report.md).",
        f"## What is claimed\n\n{claims(found)}",
        f"## The loss by t\n\n![loss by t](by_time.png)\n\n{by_time(found)}",
        f"## Gradients\n\n{gradients(found)}",
        f"## What they write\n\n![judge's NLL and tokens filled in](quality.png)\n\n{samples(found)}",
        f"## What they fill in\n\n{infill(found)}",
        f"## The first of the ranking beside the ARM\n\n{summary(isoflop)}",
        "![loss at the best size against training FLOPs](isoflop/frontier.png)",
        of_isoflop,
        "Fits and readings: [the report of the isoFLOP study](isoflop/report.md).",
        "## Caveats\n\n" + "\n".join(f"- {text}" for text in CAVEATS),
        f"## Commit, machine, command\n\n{provenance.line()}.{took}",
        f"    bash launch/quickstart_objectives.sh {run_dir}",
    ]
    return "\n\n".join(parts) + "\n"


def write(run_dir: Path, out: Path, seconds: float | None = None) -> None:
    """Write everything into `out`. UserError where the study is not complete."""
    found = study(run_dir)
    text = page(run_dir, found, seconds)
    pictures: dict[str, Callable[[dict[str, Any]], bytes]] = {"by_time.png": draw_times, "quality.png": draw_quality}
    files = {name: picture(found) for name, picture in pictures.items()}
    files |= {"numbers.json": (json_files.dumps(found, indent=1) + "\n").encode(), "report.md": text.encode()}
    for name, sweep in (("ranking", "ranking"), ("isoflop", found["winner"])):
        (out / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((run_dir / sweep).glob("*")):
            if path.suffix in (".png", ".md", ".csv") or path.name == "fits.json":
                shutil.copyfile(path, out / name / path.name)
    for name, content in files.items():
        write_atomically(out / name, content)


def main() -> None:
    """Write the page, or print the first of the ranking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="what launch/quickstart_objectives.sh wrote")
    parser.add_argument("--out", type=Path, help="directory of the page; default RUN_DIR/page")
    parser.add_argument("--seconds", type=float, help="what all of it took, for the page")
    parser.add_argument("--winner", action="store_true", help="print the first of the ranking and stop")
    arguments = parser.parse_args()
    try:
        if arguments.winner:
            sys.stdout.write(f"{winner(arguments.run_dir / 'ranking')}\n")
        else:
            write(arguments.run_dir, arguments.out or arguments.run_dir / "page", arguments.seconds)
    except (UserError, OSError) as error:
        parser.exit(2, f"objectives_report.py: {error}\n")


if __name__ == "__main__":
    main()
