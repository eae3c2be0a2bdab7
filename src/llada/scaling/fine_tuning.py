"""Fine-tuned twins side by side: how many held-out answers each writes exactly, by task and turn; picture and report.

Reads what `llada evaluate --task=dialogues --generate=N` left in both workdirs.
"""

import textwrap
from typing import Any, NamedTuple

from llada import json_files
from llada.errors import UserError
from llada.evaluation import answers
from llada.objectives.families import DIFFUSION
from llada.scaling import figure, provenance
from llada.scaling.comparison import RunRecord
from llada.scaling.comparison import table as figures_table
from llada.scaling.held_out import is_number
from llada.scaling.numbers import markdown_cell, markdown_table, or_dash

_GOAL = 0.95  # of the tasks below it the report says so
_WRONG = 5  # wrong answers that are shown of each way of writing


class Sampled(NamedTuple):
    """One way of writing answers, and the scores of `answers.summary`."""

    name: str
    run: RunRecord
    results: dict[str, Any]

    def score(self, label: str | None = None, turn: int | None = None) -> dict[str, Any] | None:
        """The score of a label and a turn, each None for all of them; None where there was no such answer."""
        wanted = label, turn
        return next((s for s in self.results["scores"] if (s["label"], s["turn"]) == wanted), None)

    @property
    def colour(self) -> str:
        """That of the family."""
        return figure.COLOURS[self.run.family.name]


def read(runs: list[RunRecord]) -> list[Sampled]:
    """Every way of writing answers that was evaluated, the runs in order; none where no run has written any.

    UserError where only some have, and for damage.
    """
    found: list[Sampled] = []
    if not any((run.workdir / answers.FILE).exists() for run in runs):
        return found
    for run in runs:
        path = run.workdir / answers.FILE
        advice = f"llada evaluate --workdir={run.workdir} --task=dialogues --generate=1000 writes them"
        if not path.exists():
            raise UserError(f"{path} is missing: the scores of written answers; {advice}")
        values = json_files.read(path)
        if values.get("step") != run.summary["step"]:
            raise UserError(f"{path} is of step {values.get('step')}, not {run.summary['step']}; {advice}")
        if not values.get("results"):
            raise UserError(f"{path} holds no scores; {advice}")
        for results in values["results"]:
            if not _is_sound(results):
                raise UserError(f"{path} is damaged; remove it, then {advice}")
            found.append(Sampled(_name(run, results["settings"]), run, results))
    return found


def _is_sound(results: Any) -> bool:
    """Whether it has the parts of `answers.summary`."""
    if not isinstance(results, dict) or not {"settings", "wrong_by", "wrong", "first"} <= results.keys():
        return False
    scores = results.get("scores")
    keys = ("right", "count", "share", "low", "high")
    if not isinstance(scores, list) or not scores:
        return False
    return all(
        isinstance(s, dict) and {"label", "turn"} <= s.keys() and all(is_number(s.get(key)) for key in keys)
        for s in scores
    )


def _name(run: RunRecord, settings: dict[str, Any]) -> str:
    """A way of writing, in words: the family, and what is not the default."""
    words = []
    if run.family is DIFFUSION:
        block = settings.get("block_length")
        words.append("pure" if block in (None, settings["gen_length"]) else f"blocks of {block}")
    usual = {"gen_length": settings["gen_length"], "block_length": settings.get("block_length")}
    usual |= {"temperature": 0, "seed": settings.get("seed")}
    words += [f"{key}={value}" for key, value in settings.items() if usual.get(key) != value]
    return ", ".join([run.name, *words])


def labels_of(sampled: list[Sampled]) -> list[str]:
    """All labels, in the order of the alphabet; none where dialogues have none."""
    return sorted({s["label"] for each in sampled for s in each.results["scores"] if s["label"]})


def turns_of(sampled: list[Sampled]) -> list[int]:
    """All turns that were answered."""
    return sorted({s["turn"] for each in sampled for s in each.results["scores"] if s["turn"]})


def table(sampled: list[Sampled]) -> list[list[str]]:
    """Header and rows of exact match: a column for each way of writing; rows as in `_keys`."""
    header = ["", *(each.name for each in sampled), "answers"]
    rows = []
    for title, label, turn in _keys(sampled):
        scores = [each.score(label, turn) for each in sampled]
        count = max((s["count"] for s in scores if s), default=0)
        rows.append([title, *map(percent, scores), f"{count:,}"])
    return [header, *rows]


def percent(score: dict[str, Any] | None) -> str:
    """A share with its interval: 97.1 % (95.9 to 98.0)."""
    if score is None:
        return "-"
    return f"{100 * score['share']:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _keys(sampled: list[Sampled]) -> list[tuple[str, str | None, int | None]]:
    """(title, label, turn) of every row: all answers, those of each label, of each turn, of each turn of a label."""
    labels, turns = labels_of(sampled), turns_of(sampled)
    keys: list[tuple[str, str | None, int | None]] = [("all", None, None)]
    keys += [(label, label, None) for label in labels]
    keys += [(f"turn {turn}", None, turn) for turn in turns]
    keys += [(f"{label}, turn {turn}", label, turn) for label in labels for turn in turns]
    return keys


def draw(sampled: list[Sampled]) -> bytes:
    """`answers.png`: exact match by label with 95 % intervals, and the loss of the mask predictor by time."""
    caption = (
        "Left: held-out answers written exactly, greedily; bars are 95 % intervals (Wilson). Right: LLaDA's nats per "
        "masked token of held-out answers when a share t of answer and padding is masked; bars are two standard errors."
    )
    fig, (left, right) = figure.panels(2, _title(sampled), caption)
    names: list[str | None] = [*labels_of(sampled), None]
    shades = _shades(sampled)
    for i, (each, colour) in enumerate(zip(sampled, shades, strict=True)):
        x = [n + (i - (len(sampled) - 1) / 2) * 0.8 / len(sampled) for n in range(len(names))]
        scores = [each.score(name) or {"share": 0.0, "low": 0.0, "high": 0.0} for name in names]
        share = [100 * s["share"] for s in scores]
        error = [[100 * (s["share"] - s["low"]) for s in scores], [100 * (s["high"] - s["share"]) for s in scores]]
        left.bar(x, share, 0.8 / len(sampled), color=colour, label=each.name)
        left.errorbar(x, share, error, fmt="none", ecolor="0.2", capsize=2, linewidth=1)
    left.axhline(100 * _GOAL, color="0.4", linestyle="--", linewidth=1)
    left.set_xticks(range(len(names)), [name or "all" for name in names])
    left.set(ylabel="exact match, %", ylim=(0, 104))
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(sampled), fontsize=8)
    _draw_times(right, list({each.run.workdir: each.run for each in sampled}.values()))
    return figure.png(fig)


def _draw_times(ax, runs: list[RunRecord]) -> None:
    drawn = False
    for run in runs:
        points = _by_time(run)
        if points:
            t, loss, error = ([p[key] or 0.0 for p in points] for key in ("t", "nats_per_token", "stderr"))
            error = [2 * e for e in error]
            ax.errorbar(t, loss, error, color=figure.COLOURS[run.family.name], marker="o", capsize=3, label=run.name)
            drawn = True
    if drawn:
        ax.set(xlabel="t", ylabel="nats per masked token of an answer", ylim=(0, None))
    else:
        figure.note(ax, "no losses by time")


def _by_time(run: RunRecord) -> list[dict[str, Any]]:
    path = run.workdir / "evaluation.json"
    values = json_files.read(path) if path.exists() else {}
    points = values.get("by_time") or [] if values.get("step") == run.summary["step"] else []
    return [p for p in points if isinstance(p, dict) and is_number(p.get("t")) and is_number(p.get("nats_per_token"))]


def _shades(sampled: list[Sampled]) -> list[Any]:
    """A colour for each way of writing: shades of the family's."""
    colours = [each.colour for each in sampled]
    shades = {colour: figure.shades(colour, colours.count(colour)) for colour in colours}
    return [shades[colour][colours[:i].count(colour)] for i, colour in enumerate(colours)]


def _title(sampled: list[Sampled]) -> str:
    shares = [f"{each.name} {100 * each.results['scores'][0]['share']:.1f} %" for each in sampled]
    return f"Held-out answers written exactly: {'; '.join(shares)}"


def report(runs: list[RunRecord], sampled: list[Sampled], remarks: list[str], command: str) -> str:
    """`report.md`: exact match by task and turn, what falls short and how, training, answers as they came."""
    first = runs[0].summary
    training = [
        "## Training",
        markdown_table(figures_table(runs)) + "".join(f"\n\n{remark}." for remark in remarks),
        "![held-out loss against training FLOPs](curves.png)",
    ]
    made = ["## Commit, machine, command", f"{provenance.line()}.\n\n    {command}"]
    if not sampled:
        note = (
            "Figures are of held-out answers, per token of an answer. How many of them each writes exactly is added "
            "once `llada evaluate --task=dialogues --generate=1000` has had both write them."
        )
        title = "# LLaDA and ARM, fine-tuned on the same dialogues"
        return "\n\n".join([title, textwrap.fill(note, 120), *training, *made]) + "\n"
    count = sampled[0].results["scores"][0]["count"]
    intro = (
        f"The same {count:,} held-out answers, written greedily and compared as text: an answer is right where every "
        "word is, and where it ends where it should. Intervals are Wilson's at 95 %, and take answers as independent. "
        f"Both runs read the same rows in the same order (`rows_digest` {first['rows_digest'][:16]}...)."
    )
    parts = [
        "# LLaDA and ARM, fine-tuned on the same dialogues",
        f"{_title(sampled)}.",
        "![exact match by task, and loss by time](answers.png)",
        "## Exact match",
        markdown_table(table(sampled)),
        textwrap.fill(intro, 120),
        "## What falls short",
        _shortfalls(sampled),
        *training,
        "## Answers as they came",
        *(_transcripts(each) for each in sampled),
        *made,
    ]
    return "\n\n".join(parts) + "\n"


def _shortfalls(sampled: list[Sampled]) -> str:
    """A line for each way of writing: what is below the goal, and how its wrong answers differ."""
    lines = []
    for each in sampled:
        below = []
        for label in labels_of(sampled):
            score = each.score(label)
            if score and score["share"] < _GOAL:
                below.append(f"{label} ({100 * score['share']:.1f} %)")
        by = {kind: each.results["wrong_by"].get(kind, 0) for kind in answers.KINDS}
        wrong = sum(by.values())
        kinds = f"{by['words']} with other words, {by['order']} in another order, {by['length']} longer or shorter"
        goal = f"{100 * _GOAL:.0f} %"
        what = f"below {goal} in {', '.join(below)}" if below else f"{goal} or more in every task"
        lines.append(f"- {each.name}: {what}. Wrong answers: {wrong}; {kinds}.")
    return "\n".join(lines)


def _transcripts(each: Sampled) -> str:
    """One answer of every label, and the first wrong ones."""
    shown = [*each.results["first"], *each.results["wrong"][:_WRONG]]
    rows = [["task, turn", "dialogue", "answer", "written", ""]]
    for a in (a for i, a in enumerate(shown) if a not in shown[:i]):
        right = "" if a["written"] == a["expected"] else "wrong"
        cells = (f"{a['label'] or '-'}, {a['turn']}", a["prompt"], a["expected"], a["written"])
        rows.append([*map(_cell, cells), right])
    seconds = or_dash(each.results.get("seconds"), ",.1f")
    return f"### {each.name}\n\n{seconds} seconds for all answers.\n\n{markdown_table(rows)}"


def _cell(text: str) -> str:
    """The text, or its end, in a table."""
    return markdown_cell(text if len(text) <= 400 else f"...{text[-400:]}")
