"""The report of launch/chitchat.sh: held-out answers before and after fine-tuning, and five dialogues as they came.

python experiments/chitchat_report.py --run_dir=runs/chitchat

Reads what the script left in RUN_DIR: counts of the data, both fine-tuned workdirs, evaluations NAME-before.json and
NAME-after.json, replies NAME-replies.jsonl. Writes RUN_DIR/report.md and RUN_DIR/curves.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from llada import json_files
from llada.errors import UserError
from llada.files import write_atomically
from llada.objectives.families import AUTOREGRESSIVE, DIFFUSION
from llada.scaling import comparison, figure, held_out, provenance
from llada.scaling.comparison import RunRecord
from llada.scaling.numbers import filled, markdown_cell, markdown_table, or_dash

_FIGURES = (("nats_per_token", ".4f"), ("bits_per_byte", ".4f"))


class Tuned(NamedTuple):
    """A fine-tuned run: its base, its held-out figures before and after, and its replies, question by question."""

    run: RunRecord
    base: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    replies: list[dict[str, Any]]


def read(run_dir: Path) -> list[Tuned]:
    """LLaDA and the ARM. UserError for what is missing, damaged, or not of the same rows."""
    tuned = []
    for family, name in ((DIFFUSION, "llada"), (AUTOREGRESSIVE, "arm")):
        run = comparison.read_run(family, run_dir / name)
        before, after = (json_files.read(run_dir / f"{name}-{when}.json") for when in ("before", "after"))
        if (before["step"], after["step"]) != (0, run.summary["step"]):
            raise UserError(f"{run_dir}/{name}-before.json or -after.json is of another step; run the script again")
        lines = (run_dir / f"{name}-replies.jsonl").read_text(encoding="utf-8").splitlines()
        base = json_files.read(run_dir / f"base_{name}" / "summary.json")
        tuned.append(Tuned(run, base, before, after, [json.loads(line) for line in lines]))
    comparison.check_twins([each.run for each in tuned])
    evaluations = [(str(t.run.workdir), evaluation) for t in tuned for evaluation in (t.before, t.after)]
    held_out.require_same(evaluations, {"eval_rows_digest": "read on other held-out answers"}, "evaluate all alike")
    return tuned


def questions(run_dir: Path) -> list[list[str]]:
    """What the users say, by dialogue, from the lines that llada chat read."""
    dialogues: list[list[str]] = [[]]
    for line in (run_dir / "data" / "questions.txt").read_text(encoding="utf-8").splitlines():
        if line == "/reset":
            dialogues.append([])
        else:
            dialogues[-1].append(line.removeprefix("/") if line.startswith("//") else line)
    return [dialogue for dialogue in dialogues if dialogue]


def held_out_table(tuned: list[Tuned]) -> list[list[str]]:
    """Header and rows: figures before and after fine-tuning, with standard errors over answers."""
    header = ["", "nats/token before", "after", "bits/byte before", "after"]
    rows = []
    for each in tuned:
        cells = [f"{each.run.name} ({'exact NLL' if each.run.family.exact else 'bound'})"]
        for key, form in _FIGURES:
            for values in (each.before, each.after):
                # The bytes of the answers are known exactly, so both figures have the same relative error.
                error = values["stderr"] * values[key] / values["nats_per_token"]
                cells.append(f"{values[key]:{form}} ± {error:{form}}")
        rows.append(cells)
    return [header, *rows]


def times_table(llada: Tuned) -> list[list[str]]:
    """Header and rows: nats per masked answer token at each t."""
    rows = [
        [f"{a['t']:g}", *(f"{each['nats_per_token']:.3f} ± {each['stderr']:.3f}" for each in (a, b))]
        for a, b in zip(llada.before["by_time"], llada.after["by_time"], strict=True)
    ]
    return [["t", "before", "after"], *rows]


def training_table(tuned: list[Tuned]) -> list[list[str]]:
    """Header and rows: what was trained for how long."""
    header = ["", "parameters", "steps", "tokens", "epochs", "tokens/s", "seconds"]
    rows = []
    for each in tuned:
        for title, s in ((f"{each.run.name}, base", each.base), (f"{each.run.name}, tuned", each.run.summary)):
            counts = [f"{s[key]:,}" for key in ("parameters", "step", "tokens")]
            speed = [or_dash(s[key], ",.0f") for key in ("tokens_per_second", "seconds")]
            rows.append([title, *counts, f"{s['epochs']:.2f}", *speed])
    return [header, *rows]


def draw(tuned: list[Tuned]) -> bytes:
    """`curves.png`: held-out figures over fine-tuning, and the mask predictor's loss by time before and after."""
    caption = (
        "Left: held-out answers, two standard errors; step 0 is the base model; both ends are of all answers in the "
        "table, points between of some of them. Right: LLaDA's nats per masked token of held-out answers when a share "
        "t of answer and padding is masked; padding is not counted."
    )
    fig, (left, right) = figure.panels(2, "Held-out answers of people, before and after fine-tuning", caption)
    for each in tuned:
        last = each.after["step"]
        between = [x for x in each.run.lines if held_out.is_number(x.get("eval/nats_per_token")) and x["step"] < last]
        steps = [0, *(line["step"] for line in between), last]
        ends = each.before["nats_per_token"], each.after["nats_per_token"]
        nats = [ends[0], *(line["eval/nats_per_token"] for line in between), ends[1]]
        errors = [2 * each.before["stderr"], *(2 * (line["eval/stderr"] or 0.0) for line in between)]
        errors.append(2 * each.after["stderr"])
        label = f"{each.run.name}: {each.run.family.measure}"
        colour = figure.COLOURS[each.run.family.name]
        left.errorbar(steps, nats, errors, color=colour, marker="o", capsize=3, label=label)
    left.set(xlabel="steps of fine-tuning", ylabel="nats per token of an answer")
    left.legend(frameon=False)
    colour = figure.COLOURS[DIFFUSION.name]
    for title, values, style in (("before", tuned[0].before, "--"), ("after", tuned[0].after, "-")):
        t, loss, error = ([point[key] for point in values["by_time"]] for key in ("t", "nats_per_token", "stderr"))
        right.errorbar(t, loss, [2 * e for e in error], color=colour, linestyle=style, marker="o", label=title)
    right.set(xlabel="t", ylabel="nats per masked token of an answer", ylim=(0, None))
    right.legend(frameon=False)
    return figure.png(fig)


def transcripts(tuned: list[Tuned], dialogues: list[list[str]]) -> list[str]:
    """A table for each dialogue: what the user says, and each model's reply. UserError where replies are missing."""
    asked = sum(map(len, dialogues))
    for each in tuned:
        if len(each.replies) != asked:
            raise UserError(
                f"{each.run.workdir}: {len(each.replies)} replies to {asked} questions; run the script again"
            )
    tables, begin = [], 0
    for number, users in enumerate(dialogues, 1):
        rows = [["user", *(each.run.name for each in tuned)]]
        for i, user in enumerate(users, begin):
            rows.append([markdown_cell(text) for text in (user, *(each.replies[i]["text"] for each in tuned))])
        tables.append(f"### Dialogue {number}\n\n{markdown_table(rows)}")
        begin += len(users)
    return tables


def of_replies(each: Tuned) -> str:
    """The replies in numbers."""
    replies = each.replies
    texts, tokens = {reply["text"] for reply in replies}, [reply["completion_tokens"] for reply in replies]
    cut = sum(reply["finish_reason"] == "length" for reply in replies)
    return (
        f"- {each.run.name}: {len(texts)} of {len(replies)} replies differ; {tokens.count(0)} are empty "
        f"and {cut} ran out of room; {sum(tokens) / len(tokens):.1f} tokens on average."
    )


def of_people(evaluation: dict[str, Any]) -> str:
    """What people wrote, in the same numbers."""
    average = evaluation["tokens"] / evaluation["rows"]
    return f"- People: {average:.1f} tokens on average, the one that ends an answer included, in the held-out answers."


INTRODUCTION = """
Two models of {parameters:.1f} M parameters, one by diffusion and one autoregressive, pre-trained on the same text and
fine-tuned on the same answers in the same order (`rows_digest` {digest}... of both).
"""
HELD_OUT = """
Of the same {rows:,} answers, {tokens:,} tokens, that nobody trained on, with {draws} draws of masks for LLaDA's bound
(Eq. (6)), an upper bound on its NLL. `±` is a standard error over answers. "Before" is step 0 of fine-tuning: the
base model behind the same template. It has never seen the tokens that a template writes around messages, and part of
what is gained is to learn them: the figures include the token that ends an answer and, for LLaDA alone, the
end-of-text tokens that fill it up to a multiple of {bucket} tokens and say how long it is. Without those fillers,
LLaDA's nats per masked token of an answer, by the share t that is masked:
"""
DIALOGUES = """
The first turns of the users of five held-out dialogues, the first five by hash that have three turns, as one pipe
into `{chat}`; LLaDA fills its replies in blocks of 8 tokens (`--block_length=8`). Each model goes on from its own
replies, and the users as they did with a person, so that later turns need not fit. Nothing was selected, and nothing
sampled again.
"""
REMARK = """
What is poor about them: nearly everything. Models of a million parameters that trained for minutes have the manner of
a chat (greetings, exclamations, its commonest phrases, an end) and hardly ever answer what was said; words are
misspelled or broken off, and longer sentences do not hold together. LLaDA moreover ends early: it is trained on
end-of-text fillers behind every answer, which makes ends the surest tokens to write (arXiv 2510.03680).
`--eos=no_confidence` writes them last, `--config.dialogues.padding=rainbow` trains on other fillers; neither was used
here.
"""
DATA = """
The package chitchat-dataset 0.9.0 (MIT licence, BYU Perception, Control and Cognition Lab): people who chatted in
pairs. A twentieth of the dialogues is held out by a hash of their names before anything else; dialogues with
addresses, telephone numbers or some rude words are dropped. Whoever writes first is the user, whoever answers the
assistant; what one person wrote in a row is one message; text is left as it was typed. Dialogues of two are cut into
stretches of at most 600 characters that begin with the user; of each stretch one answer, drawn, trains in an epoch.
The text to pre-train on is all of the training side, monologues too, and English that comes with Python: the topics
of its help, and the documentation strings of its library.
"""


def report(run_dir: Path, tuned: list[Tuned], dialogues: list[list[str]], chat: str) -> str:
    """`report.md`."""
    counts = json_files.read(run_dir / "data" / "counts.json")
    summary, bucket = tuned[0].run.summary, tuned[0].run.config.dialogues.bucket
    parts = [
        "# LLaDA and ARM, fine-tuned on dialogues of people",
        filled(INTRODUCTION.format(parameters=summary["parameters"] / 1e6, digest=summary["rows_digest"][:16])),
        "## Held-out answers",
        markdown_table(held_out_table(tuned)),
        filled(HELD_OUT.format(**tuned[0].after, bucket=bucket)),
        markdown_table(times_table(tuned[0])),
        "![held-out figures over fine-tuning, and loss by time](curves.png)",
        "## Five dialogues as they came",
        filled(DIALOGUES.format(chat=chat)),
        *transcripts(tuned, dialogues),
        "\n".join([*(of_replies(each) for each in tuned), of_people(tuned[0].after)]),
        filled(REMARK),
        "## Data",
        filled(DATA),
        markdown_table([["", "count"], *([name, f"{count:,}"] for name, count in counts.items())]),
        "## Training",
        markdown_table(training_table(tuned)),
        "Speeds are of this machine with whatever else ran on it.",
        "## Commit, machine, command",
        f"{provenance.line()}.\n\n    bash launch/chitchat.sh {run_dir}",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="what launch/chitchat.sh wrote")
    parser.add_argument("--chat", default="llada chat --json", help="the command that wrote the replies")
    arguments = parser.parse_args()
    try:
        tuned, dialogues = read(arguments.run_dir), questions(arguments.run_dir)
        text = report(arguments.run_dir, tuned, dialogues, arguments.chat)
    except (UserError, OSError) as error:
        parser.exit(2, f"chitchat_report.py: {error}\n")
    write_atomically(arguments.run_dir / "curves.png", draw(tuned))
    write_atomically(arguments.run_dir / "report.md", text.encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    main()
