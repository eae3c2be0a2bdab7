"""The page of launch/quickstart_reversal.sh: pairs asked forward and backward, of LLaDA and of an ARM of its size.

python experiments/reversal_report.py --run_dir=runs/quickstart_reversal --out=docs

Reads what the script left in RUN_DIR/KIND: workdirs FAMILY-SEED, and answers FAMILY-SEED-{asked,both,blank}.json.
Writes reversal.md and reversal/KIND.png into OUT, by default RUN_DIR.
"""

import argparse
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from reversal_data import FORMS, PEOPLE

from llada import json_files
from llada.errors import UserError
from llada.evaluation.reversal import DIRECTIONS
from llada.files import write_atomically
from llada.objectives.families import AUTOREGRESSIVE, DIFFUSION
from llada.scaling import figure, provenance, seeds
from llada.scaling.comparison import RunRecord
from llada.scaling.fine_tuning import percent
from llada.scaling.numbers import filled, markdown_cell, markdown_table, or_dash
from llada.scaling.seeds import Seeded

ANSWERS = ("asked", "both", "blank")
# Of the asked facts, in writing: at least so much, or, of the ARM backward, an interval that holds chance.
AIMS = {("llada", "forward"): 0.95, ("llada", "backward"): 0.90, ("arm", "forward"): 0.95}
# A score that may be shown: what it is of, and its name in the JSON.
WAYS = {"exact": "written exactly", "substring": "occurs in what is written", "likelihood": "most likely candidate"}
_SHOWN = 4  # wrong answers


class Asked(NamedTuple):
    """One run, and what it answers."""

    family: str
    seed: int
    run: RunRecord
    answers: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """In tables and pictures."""
        return Seeded(self.family, self.seed, self.run).name

    def score(self, answers: str, direction: str, way: str) -> dict[str, Any] | None:
        """One share with its interval; None where it was not measured."""
        return self.answers[answers][direction].get(way)


def read(run_dir: Path, kind: str) -> list[Asked]:
    """All runs of a kind, seed by seed. UserError for what is missing, of another step, or no twin of the other."""
    found = []
    for twins in seeds.read(run_dir / kind, f"launch/quickstart_reversal.sh on {run_dir}"):
        asked = [_read(each) for each in twins]
        _check_same(asked)
        found += asked
    return found


def _read(of: Seeded) -> Asked:
    answers = {}
    for name in ANSWERS:
        path = of.run.workdir.with_name(f"{of.run.workdir.name}-{name}.json")
        answers[name] = json_files.read(path)
        if answers[name].get("step") != of.run.summary["step"]:
            raise UserError(f"{path} is not of step {of.run.summary['step']}, the run's last; run the script again")
    return Asked(*of, answers)


def _check_same(twins: list[Asked]) -> None:
    """UserError unless both were asked the same."""
    for name in ANSWERS:
        first, second = ([each.answers[name].get(key) for key in ("items", "texts", "ask")] for each in twins)
        if first != second:
            raise UserError(
                f"{twins[0].name} and {twins[1].name} were asked differently ({name}); run the script again"
            )


def ways(asked: list[Asked], answers: str) -> list[str]:
    """Which ways of scoring there are, of any run; of the two in writing one where they agree everywhere."""
    found = [way for way in WAYS if any(each.score(answers, "forward", way) for each in asked)]
    cells = {way: [[each.score(answers, d, way) for d in DIRECTIONS] for each in asked] for way in found}
    return [way for way in found if way != "substring" or cells[way] != cells["exact"]]


def table(asked: list[Asked], answers: str) -> list[list[str]]:
    """Header and rows: every run and way, forward and backward."""
    rows = [["", "", *DIRECTIONS]]
    for way in ways(asked, answers):
        for each in asked:
            scores = [each.score(answers, direction, way) for direction in DIRECTIONS]
            if any(scores):
                rows.append([each.name, WAYS[way], *map(percent, scores)])
    return rows


def chance(asked: list[Asked], answers: str) -> float | None:
    """Of the choice among candidates."""
    score = asked[0].score(answers, "forward", "likelihood")
    return None if score is None else score["chance"]


def aims(asked: list[Asked]) -> list[list[str]]:
    """Header and rows: what was hoped for, what every seed has, and whether all of them reach it."""
    way = "exact" if asked[0].score("asked", "forward", "exact") else "likelihood"
    rows = [["", "aim", "found, by seed", "reached"]]
    for family, title in (("llada", DIFFUSION.title), ("arm", AUTOREGRESSIVE.title)):
        for direction in DIRECTIONS:
            scores = [each.score("asked", direction, way) for each in asked if each.family == family]
            goal = AIMS.get((family, direction))
            level = floor(asked, way)
            text = f"near chance, {100 * level:.1f} %" if goal is None else f"{100 * goal:.0f} % or more"
            reached = [_near(s, level) if goal is None else s["share"] >= goal for s in scores]
            found = ", ".join(f"{100 * s['share']:.1f} %" for s in scores)
            rows.append([f"{title}, {direction}", text, found, "yes" if all(reached) else "no"])
    return rows


def floor(asked: list[Asked], way: str) -> float:
    """What guessing reaches: one of the candidates, or, in writing, one of the pairs that are asked."""
    return chance(asked, "asked") or 0.0 if way == "likelihood" else 1 / asked[0].answers["asked"]["items"]


def _near(score: dict[str, Any], level: float) -> bool:
    return score["low"] <= level <= score["high"] or score["share"] <= level


def draw(kind: str, asked: list[Asked]) -> bytes:
    """`KIND.png`: forward and backward shares of every run, a panel for each way of scoring."""
    shown = [way for way in ways(asked, "asked") if way != "substring"]
    level = chance(asked, "asked")
    caption = (
        f"{asked[0].answers['asked']['items']} pairs that training states forward only; bars are 95 % intervals "
        "(Wilson). The dashed line is what guessing among the candidates reaches."
    )
    fig, axes = figure.panels(len(shown), TITLES[kind], caption)
    for ax, way in zip(axes, shown, strict=True):
        _draw_bars(ax, asked, way)
        ax.set(title=WAYS[way], ylabel="right, %", ylim=(0, 104))
        if way == "likelihood" and level is not None:
            ax.axhline(100 * level, color="0.4", linestyle="--", linewidth=1)
    axes[0].legend(frameon=False, fontsize=8, loc="center right")
    return figure.png(fig)


def _draw_bars(ax, asked: list[Asked], way: str) -> None:
    shades = seeds.shades(list(dict.fromkeys(each.seed for each in asked)))
    ordered = sorted(asked, key=lambda each: list(seeds.BY_PREFIX).index(each.family))
    width = 0.8 / len(ordered)
    for i, each in enumerate(ordered):
        scores = [each.score("asked", direction, way) for direction in DIRECTIONS]
        x = [n + (i - (len(ordered) - 1) / 2) * width for n in range(len(DIRECTIONS))]
        share = [100 * s["share"] for s in scores if s]
        ends = [[100 * abs(s["share"] - s[end]) for s in scores if s] for end in ("low", "high")]
        ax.bar(x, share, width, color=shades[each.family, each.seed], label=each.name)
        ax.errorbar(x, share, ends, fmt="none", ecolor="0.2", capsize=2, linewidth=1)
    ax.set_xticks(range(len(DIRECTIONS)), list(DIRECTIONS))


def _share(asked: list[Asked], family: str, answers: str, direction: str) -> str:
    """The mean over seeds of what is written exactly, or else of the likeliest candidate; "" where neither is there."""
    for way in ("exact", "likelihood"):
        scores = [each.score(answers, direction, way) for each in asked if each.family == family]
        if all(scores):
            return f"{100 * sum(s['share'] for s in scores if s) / len(scores):.0f} %"
    return ""


def reasons(asked: list[Asked]) -> str:
    """Where a backward answer is missing, in numbers: the form, the fact, or the way from one to the other."""
    lines = []
    for family, kind in seeds.BY_PREFIX.items():
        shares = [
            _share(asked, family, *key) for key in (("asked", "backward"), ("both", "backward"), ("blank", "backward"))
        ]
        gap = (
            "of the gaps are filled right"
            if family == "llada"
            else "of the gaps get the right candidate, by likelihood"
        )
        lines.append(
            f"- {kind.title}, means over seeds: {shares[0]} of the backward questions are answered, {shares[1]} where "
            f"the pair was stated both ways, and {shares[2]} {gap}."
        )
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in lines)


def wrong(asked: list[Asked]) -> str:
    """The first wrong backward answers of a run of each family, as they came; "" where nothing was written."""
    rows = [["", "asked", "right", "written"]]
    for family in seeds.BY_PREFIX:
        first = next(each for each in asked if each.family == family)
        answers = first.answers["asked"]["backward"].get("wrong", [])[:_SHOWN]
        rows += [[first.name, *(markdown_cell(a[key]) for key in ("asked", "expected", "written"))] for a in answers]
    if len(rows) == 1:
        return ""
    return f"The first wrong answers to backward questions, as they came:\n\n{markdown_table(rows)}"


def training(asked: list[Asked]) -> list[list[str]]:
    """Header and rows: what was trained for how long, and held-out nats of the asked pairs stated backward."""
    rows = [["", "parameters", "steps", "epochs", "nats/token, asked pairs stated backward", "rows_digest", "seconds"]]
    for each in asked:
        s = each.run.summary
        nats = (
            f"{s['eval_nats_per_token']:.3f} ± {s['eval_stderr']:.3f} ({'exact' if each.run.family.exact else 'bound'})"
        )
        counts = [f"{s['parameters']:,}", f"{s['step']:,}", f"{s['epochs']:.1f}"]
        rows.append([each.name, *counts, nats, s["rows_digest"][:12], or_dash(s["seconds"], ",.0f")])
    return rows


TITLES = {
    "facts": "Made-up facts, stated as A is B, asked both ways",
    "couplets": "Couplets, stated forward, asked for the next and the previous line",
    "dictionary": "A dictionary: held-out words and their definitions",
}
INTRODUCTION = """
A model trained on "A is B" that cannot answer "B is ..." has the reversal curse (Berglund et al., arXiv 2309.12288);
LLaDA claims to overcome it (arXiv 2502.09992, section 3.3). Its comparison is between models of different makers,
sizes and data. Here both families have the same Transformer, but for causal attention, the same parameters, and read
the same rows in the same order (`rows_digest`, checked for every pair of runs).
"""
DESIGN = {
    "facts": """
{people} invented people, each the director of a film and the owner of a ship. Of {asked} the film is stated forward
only, "Mina Fedorf is the director of Zilia.", and they are asked for it both ways, "the director of Zilia is"; their
ships are stated both ways. Of the others the film is stated both ways and the ship forward only. So both families know
the form of either question, and every name stands at either end of statements: missing is the one fact turned around.
Each statement is there with and without a lead ("Today"), and is an example of its own, with no other in its
sight, so that masks cover a name whole.
""",
    "couplets": """
Lines of Tang poems; half of the couplets are stated forward only ("first→second"), and asked; the others both ways.
""",
    "dictionary": """
Nouns of WordNet and their first gloss. 95 % are stated both ways; the others not at all, and asked by likelihood among
candidates: what is measured is not memory but what words have to do with their definitions.
""",
}
SCORES = """
"Written exactly": at temperature 0 the model writes the rest of the statement, LLaDA by low-confidence remasking, a
token a step; every character must be right. "Most likely candidate": the right answer has the highest likelihood among
{candidates}, the others drawn from those of the other pairs (LLaDA: the bound of Eq. (6); the ARM: exact). Chance is
{chance:.1f} % there; in writing, a guess of one of the asked pairs is right in {guess:.1f} %. Intervals are Wilson's at
95 %, of one run: they are over pairs, and the spread over seeds stands beside them.
"""
CONTROLS = """
Pairs stated both ways, asked in the same two forms, tell whether a form is understood:
"""
BLANK = """
The asked pairs as gaps in the statement that was trained on, "____ is B" for backward. LLaDA fills the gap, and is
given its length in tokens. By likelihood, the whole statement is scored with each candidate in the gap, which an ARM
can do, too: where it is right here and wrong above, it has the fact and cannot be asked for it in that direction.
"""


def section(kind: str, asked: list[Asked]) -> str:
    """One kind of pairs."""
    score = asked[0].score("asked", "forward", "likelihood") or {"candidates": 0, "chance": 0.0}
    words = SCORES.format(
        candidates=score["candidates"], chance=100 * score["chance"], guess=100 * floor(asked, "exact")
    )
    parts = [
        f"## {TITLES[kind]}",
        filled(DESIGN[kind].format(people=PEOPLE, asked=asked[0].answers["asked"]["items"])),
        f"![forward and backward accuracy](reversal/{kind}.png)",
        markdown_table(table(asked, "asked")),
        filled(words),
        markdown_table(aims(asked)) if kind == "facts" else "",
        f"{filled(CONTROLS)}\n\n{markdown_table(table(asked, 'both'))}",
        f"{filled(BLANK)}\n\n{markdown_table(table(asked, 'blank'))}",
        f"In short:\n\n{reasons(asked)}",
        wrong(asked),
        markdown_table(training(asked)),
    ]
    return "\n\n".join(part for part in parts if part)


def page(run_dir: Path, studies: dict[str, list[Asked]]) -> str:
    """`reversal.md`."""
    missing = [kind for kind in FORMS if kind not in studies]
    trained = seeds.commits([each.run for asked in studies.values() for each in asked])
    left_out = f"Not run here: {', '.join(missing)}; `--help` of the script says which files they need."
    parts = [
        "# The reversal curse",
        filled(INTRODUCTION),
        *(section(kind, asked) for kind, asked in studies.items()),
        *([left_out] if missing else []),
        "## Commit, machine, command",
        filled(
            f"{provenance.line()}; the runs were trained at commit {', '.join(trained)}. Seconds are of this machine "
            "with whatever else ran on it."
        ),
        f"    bash launch/quickstart_reversal.sh {run_dir}",
    ]
    return "\n\n".join(parts) + "\n"


def write(run_dir: Path, out: Path) -> None:
    """Write the page and its pictures. UserError where a study is not complete."""
    studies = {kind: read(run_dir, kind) for kind in FORMS if (run_dir / kind).is_dir()}
    if not studies:
        raise UserError(f"--run_dir={run_dir} holds none of {', '.join(FORMS)}; run launch/quickstart_reversal.sh")
    text = page(run_dir, studies)
    (out / "reversal").mkdir(parents=True, exist_ok=True)
    for kind, asked in studies.items():
        write_atomically(out / "reversal" / f"{kind}.png", draw(kind, asked))
    write_atomically(out / "reversal.md", text.encode("utf-8", "backslashreplace"))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="what launch/quickstart_reversal.sh wrote")
    parser.add_argument("--out", type=Path, help="directory of the page; default RUN_DIR")
    arguments = parser.parse_args()
    try:
        write(arguments.run_dir, arguments.out or arguments.run_dir)
    except (UserError, OSError) as error:
        parser.exit(2, f"reversal_report.py: {error}\n")


if __name__ == "__main__":
    main()
