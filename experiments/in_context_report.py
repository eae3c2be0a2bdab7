"""The page of launch/quickstart_in_context.sh: accuracy by the number of examples, of LLaDA and of an ARM of its size.

python experiments/in_context_report.py --run_dir=runs/quickstart_in_context --out=docs

Reads what the script left in RUN_DIR: workdirs FAMILY-SEED, and under lm_eval and curves what `llada lm_eval` wrote.
Writes in_context.md and in_context/{shots,emergence}.png into OUT, by default RUN_DIR.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from in_context_data import CAPITALS, DOCUMENTS, FORMS, LETTERS_OF_A_RULE, LINES, MOST, SHOTS, task

from llada import json_files
from llada.errors import UserError
from llada.files import write_atomically
from llada.scaling import figure, provenance, seeds
from llada.scaling.comparison import RunRecord
from llada.scaling.numbers import filled, markdown_table, or_dash
from llada.scaling.seeds import Seeded

METRIC = {"choice": "acc", "write": "exact_match"}
TITLES = {"choice": "Most likely of the eight candidates", "write": "Written by the model"}
GUESS = {"choice": 1 / MOST, "write": 1 / len(CAPITALS)}
EMERGENCE = Path("curves", "downstream.png")


class Share(NamedTuple):
    """How many of so many documents are answered right."""

    right: int
    of: int

    @property
    def text(self) -> str:
        """In percent, with its standard error over documents; a dash where there are none."""
        if self.of < 2:
            return "-"
        p = self.right / self.of
        return f"{100 * p:.1f} ± {100 * self.stderr:.1f}"

    @property
    def stderr(self) -> float:
        """As lm-eval has it: the sample's standard deviation over the root of its size."""
        p = self.right / self.of
        return math.sqrt(p * (1 - p) / (self.of - 1))


class Answered(NamedTuple):
    """One run, and by task whether it answers each document: (place of the asked letter, right)."""

    family: str
    seed: int
    run: RunRecord
    answers: dict[str, list[tuple[int, bool]]]

    @property
    def name(self) -> str:
        """In tables and pictures."""
        return Seeded(self.family, self.seed, self.run).name

    def share(self, form: str, shots: int, shown: bool | None = None) -> Share:
        """Of all documents, or of those whose asked letter is, or is not, among the examples."""
        right = [ok for place, ok in self.answers[task(form, shots)] if shown is None or (place < shots) is shown]
        return Share(sum(right), len(right))


def read(run_dir: Path) -> list[Answered]:
    """All runs, seed by seed. UserError for what is missing, of another step, or was not asked the same."""
    found, asked = [], {}
    for twins in seeds.read(run_dir, f"launch/quickstart_in_context.sh on {run_dir}"):
        for each in twins:
            answers, hashes = _read(run_dir / "lm_eval", each.run)
            found.append(Answered(*each, answers))
            asked[each.name] = hashes
    (first, expected), *others = asked.items()
    for name, hashes in others:
        if hashes != expected:
            raise UserError(f"{first} and {name} were asked differently (task_hashes); run the script again")
    return found


def _read(folder: Path, run: RunRecord) -> tuple[dict[str, list[tuple[int, bool]]], dict[str, Any]]:
    """What a run answers at its last step, and the hashes of what it was asked."""
    folder = folder / f"{run.workdir.name}-{run.summary['step']}"
    results = json_files.read(_newest(folder, "results_*.json"))
    if results["config"].get("parameters_sha256") != run.summary.get("parameters_sha256"):
        raise UserError(f"{folder} is of other parameters than {run.workdir}; run the script again")
    answers = {}
    for form in FORMS:
        for shots in SHOTS:
            lines = json_files.read_lines(_newest(folder, f"samples_{task(form, shots)}_*.jsonl"))
            answers[task(form, shots)] = [(line["doc"]["place"], line[METRIC[form]] == 1) for _, line in lines]
    return answers, {name: results["task_hashes"].get(name) for name in answers}


def _newest(folder: Path, pattern: str) -> Path:
    """lm-eval writes the date into names. UserError where there is no such file."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise UserError(f"{folder} has no {pattern}; run launch/quickstart_in_context.sh again")
    return paths[-1]


def recalled(form: str, shots: int) -> float:
    """Of a model that finds every letter among the examples, and guesses where it is not there."""
    shown = shots / MOST
    return shown + (1 - shown) * GUESS[form]


def table(answered: list[Answered], form: str) -> list[list[str]]:
    """Header and rows: every run, by the number of examples, and what guessing and recall would reach."""
    rows = [["right, %", *(f"{shots} shots" for shots in SHOTS)]]
    rows += [[each.name, *(each.share(form, shots).text for shots in SHOTS)] for each in answered]
    rows.append(["guessing", *(f"{100 * GUESS[form]:.1f}" for _ in SHOTS)])
    rows.append(["recall, else guessing", *(f"{100 * recalled(form, shots):.1f}" for shots in SHOTS)])
    return rows


def split(answered: list[Answered], shown: bool) -> list[list[str]]:
    """Header and rows: the documents whose asked letter is, or is not, among the examples."""
    numbers = [shots for shots in SHOTS if (shots > 0 if shown else shots < MOST)]
    rows = [["shown" if shown else "not shown", *(f"{shots} shots" for shots in numbers)]]
    return rows + [[each.name, *(each.share("choice", shots, shown).text for shots in numbers)] for each in answered]


def training(answered: list[Answered]) -> list[list[str]]:
    """Header and rows: what was trained for how long."""
    rows = [["", "parameters", "steps", "epochs", "nats/token, held-out documents", "rows_digest", "seconds"]]
    for each in answered:
        s, figures = each.run.summary, each.run.figures
        measure = "exact" if each.run.family.exact else "bound"
        nats = f"{or_dash(figures.nats_per_token, '.3f')} ± {or_dash(figures.stderr, '.3f')} ({measure})"
        counts = [f"{s['parameters']:,}", f"{s['step']:,}", f"{s['epochs']:.1f}"]
        rows.append([each.name, *counts, nats, s["rows_digest"][:12], or_dash(s["seconds"], ",.0f")])
    return rows


def draw(answered: list[Answered]) -> bytes:
    """`shots.png`: accuracy against the number of examples, a panel for each form of the task."""
    caption = (
        f"{len(answered[0].answers[task('choice', 0)])} held-out documents, each with a rule of its own that no other "
        "document has; bars are two standard errors, over documents. Dashed: guessing. Dotted: what is shown is "
        "recalled, and the rest guessed."
    )
    fig, axes = figure.panels(len(FORMS), "In-context learning: a letter's capital, from the examples", caption)
    colours = seeds.shades(list(dict.fromkeys(each.seed for each in answered)))
    places = range(len(SHOTS))
    for ax, form in zip(axes, FORMS, strict=True):
        for i, each in enumerate(answered):
            shares = [each.share(form, shots) for shots in SHOTS]
            ax.errorbar(
                [place + 0.05 * (i - (len(answered) - 1) / 2) for place in places],  # bars side by side
                [100 * share.right / share.of for share in shares],
                [200 * share.stderr for share in shares],
                color=colours[each.family, each.seed],
                marker="o",
                markersize=4,
                capsize=3,
                label=each.name,
            )
        ax.axhline(100 * GUESS[form], color="0.4", linestyle="--", linewidth=1)
        ax.plot(places, [100 * recalled(form, shots) for shots in SHOTS], color="0.4", linestyle=":", linewidth=1)
        ax.set_xticks(places, list(map(str, SHOTS)))
        ax.set(title=TITLES[form], xlabel="examples (shots)", ylabel="right, %", ylim=(0, 104))
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure.png(fig)


INTRODUCTION = """
LLaDA is said to learn in context as an ARM of its size does (arXiv 2502.09992, section 3.2 and Table 1). Here both
families have the same Transformer, but for causal attention, the same parameters, and read the same rows in the same
order (`rows_digest`, checked for every pair of runs). What they are asked cannot be known by their weights.
"""
DESIGN = """
A document is lines like `fQ`: a rule of its own maps {few} to {most} letters to capitals, at random and one to one,
and the letters are drawn again and again, {short} to {long} times. Training has {train:,} documents. The {asked}
held-out ones have rules of {most} letters, and none of their rules is in training. Each is asked for the capital of one
letter behind the first 0, 1, 2, 4 and 8 of its examples, which are of different letters. The asked letter is among the
first k in k/{most} of the documents, so what can be right depends on k alone: the documents, the questions and the
candidates stay the same.
"""
ASKED = """
Both forms are tasks of lm-evaluation-harness, run by `llada lm_eval`; `±` is its standard error, over documents. The
examples are the document's own: those that lm-eval draws as few-shot examples come from other documents, whose rules
are others. "Recall, else guessing" is what is right when every letter that was shown is recalled.
"""
CHOICE = """
The candidates are the {most} capitals of the rule, in an order that says nothing. A candidate is one token: LLaDA's
bound (Eq. (6)) has one mask then, and is its log-likelihood exactly.
"""
WRITE = """
The model writes two tokens at temperature 0, a capital and the end of its line, LLaDA by low-confidence remasking, a
token a step; all {capitals} capitals are open to it.
"""
SPLIT = """
The choice again, by whether the asked letter is among the examples. Where it is not, capitals that were shown can be
ruled out, since rules are one to one: 1 of 8 less the number of examples would be right.
"""
GROWN = """
Accuracy at 8 shots over the checkpoints of these runs, by `llada lm_eval --at=all`, on the first half of the documents:
"""


def page(run_dir: Path, answered: list[Answered], grown: bool) -> str:
    """`in_context.md`; `grown`: with the picture over checkpoints."""
    asked = len(answered[0].answers[task("choice", 0)])
    short, long = LINES
    values = {"few": LETTERS_OF_A_RULE[0], "most": MOST, "train": DOCUMENTS, "asked": asked}
    values |= {"short": short, "long": long, "capitals": len(CAPITALS)}
    trained = ", ".join(seeds.commits([each.run for each in answered]))
    parts: Iterable[str] = [
        "# In-context learning",
        filled(INTRODUCTION),
        "## The task",
        filled(DESIGN.format(**values)),
        filled(ASKED),
        "![accuracy against the number of examples](in_context/shots.png)",
        f"## {TITLES['choice']}",
        filled(CHOICE.format(**values)),
        markdown_table(table(answered, "choice")),
        filled(SPLIT),
        markdown_table(split(answered, shown=True)),
        markdown_table(split(answered, shown=False)),
        f"## {TITLES['write']}",
        filled(WRITE.format(**values)),
        markdown_table(table(answered, "write")),
        "## Training",
        markdown_table(training(answered)),
        *([filled(GROWN), "![accuracy against training FLOPs](in_context/emergence.png)"] if grown else []),
        "## Commit, machine, command",
        filled(
            f"{provenance.line()}; the runs were trained at commit {trained}. Seconds are of this machine with "
            "whatever else ran on it."
        ),
        f"    bash launch/quickstart_in_context.sh {run_dir}",
    ]
    return "\n\n".join(parts) + "\n"


def write(run_dir: Path, out: Path) -> None:
    """Write the page and its pictures. UserError where the study is not complete."""
    answered = read(run_dir)
    grown = run_dir / EMERGENCE
    pictures = {"shots.png": draw(answered)}
    if grown.exists():
        pictures["emergence.png"] = grown.read_bytes()
    text = page(run_dir, answered, grown.exists())
    (out / "in_context").mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_atomically(out / "in_context" / name, content)
    write_atomically(out / "in_context.md", text.encode())


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="what launch/quickstart_in_context.sh wrote")
    parser.add_argument("--out", type=Path, help="directory of the page; default RUN_DIR")
    arguments = parser.parse_args()
    try:
        write(arguments.run_dir, arguments.out or arguments.run_dir)
    except (UserError, OSError) as error:
        parser.exit(2, f"in_context_report.py: {error}\n")


if __name__ == "__main__":
    main()
