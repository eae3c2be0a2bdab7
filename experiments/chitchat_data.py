"""Dialogues of people, for launch/chitchat.sh: to fine-tune on, held-out ones, and text to pre-train on.

python experiments/chitchat_data.py --out=runs/chitchat/data [--dataset=FILE]

The dialogues are those of the package chitchat-dataset (MIT licence; FILE is its dataset.json). Whoever writes first is
the user, and whoever answers is the assistant. A twentieth is held out, by a hash of a dialogue's name, before anything
else is done. Writes into OUT:

  train.jsonl, held_out.jsonl  stretches of dialogues, a line each, that begin with the user and fit a row: `messages`
  text.jsonl                   all that was written on the training side, and English that comes with Python
  questions.txt                what the users of five held-out dialogues say first, for llada chat
  counts.json                  what became of the dialogues
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llada.data import standard_library
from llada.errors import UserError

HELD_OUT_SHARE = 0.05
STRETCH = 600  # characters, at most; a single exchange may be longer
ASKED, TURNS = 5, 3  # dialogues whose users llada chat hears, and how many turns of each
RUDE = re.compile(r"\b(\w*fuck\w*|\w*shit\w*|bitch\w*|ass(hole)?s?|cunt\w*|dick\w*|nigg\w*|fag\w*|porn\w*)\b", re.I)
PERSONAL = re.compile(r"@|https?:|www\.|\d{3}\D?\d{3}\D?\d{4}")  # addresses and telephone numbers


class Message(NamedTuple):
    """What one person wrote until the other did."""

    sender: str
    text: str


def is_held_out(name: str) -> bool:
    """Whether the dialogue of this name is held out."""
    return int(_digest(name)[:8], 16) < HELD_OUT_SHARE * 2**32


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def messages_of(record: dict) -> list[Message]:
    """The messages of a dialogue, what one person wrote in a row being one."""
    merged: list[Message] = []
    for written in (each for group in record["messages"] for each in group):
        sender, text = written["sender"], " ".join(written["text"].split())
        if not text:
            continue
        if merged and merged[-1].sender == sender:
            merged[-1] = Message(sender, f"{merged[-1].text} {text}")
        else:
            merged.append(Message(sender, text))
    return merged


def why_not(messages: list[Message]) -> str | None:
    """Why nothing is made of a dialogue, None where something is."""
    text = " ".join(message.text for message in messages)
    if not messages:
        return "empty"
    if PERSONAL.search(text):
        return "with addresses"
    return "with rude words" if RUDE.search(text) else None


def exchanges_of(messages: list[Message]) -> list[tuple[str, str]]:
    """(what the user says, what the assistant answers) of a dialogue of two; a last message without answer is left."""
    if len({message.sender for message in messages}) != 2:
        return []
    texts = [message.text for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=False))


def stretches_of(exchanges: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The exchanges in groups of at most STRETCH characters, or of one."""
    group: list[tuple[str, str]] = []
    for exchange in exchanges:
        if group and sum(len(text) for each in [*group, exchange] for text in each) > STRETCH:
            yield group
            group = []
        group.append(exchange)
    if group:
        yield group


def as_messages(exchanges: list[tuple[str, str]]) -> list[dict[str, str]]:
    """The exchanges as a record's `messages`."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for each in exchanges for role, text in zip(roles, each, strict=True)]


def english() -> Iterator[str]:
    """Text that comes with Python: the topics of its help, and the documentation strings of its library."""
    yield from pydoc_data.topics.topics.values()
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for code in standard_library.documents("", "", None, "")[0]:
        strings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
        if text := "\n\n".join(each for each in strings if len(each) >= 80):
            yield text


def questions_of(dialogues: Iterable[list[tuple[str, str]]]) -> list[str]:
    """Lines for llada chat: the first turns of the users of the first ASKED dialogues that are long enough."""
    asked = [exchanges[:TURNS] for exchanges in dialogues if len(exchanges) >= TURNS][:ASKED]
    lines: list[str] = []
    for exchanges in asked:
        # A slash would begin a command.
        lines += [f"/{user}" if user.startswith("/") else user for user, _ in exchanges] + ["/reset"]
    return lines


def write(out: Path, dataset: dict[str, dict]) -> None:
    """Write the files."""
    out.mkdir(parents=True, exist_ok=True)
    fates: Counter[str] = Counter()
    text: list[str] = []
    sides: dict[str, list[list[tuple[str, str]]]] = {"train": [], "held_out": []}
    for name in sorted(dataset, key=_digest):
        side = "held_out" if is_held_out(name) else "train"
        messages = messages_of(dataset[name])
        exchanges = exchanges_of(messages)
        fate = why_not(messages) or ("of two people" if exchanges else "of one person")
        fates[f"{side}, {fate}"] += 1
        if fate == "of two people":
            sides[side].append(exchanges)
        if side == "train" and fate.startswith("of"):
            text.append("\n".join(message.text for message in messages) + "\n")
    counts = {f"dialogues, {name}": fates[name] for name in sorted(fates)}
    for side, dialogues in sides.items():
        stretches = [stretch for exchanges in dialogues for stretch in stretches_of(exchanges)]
        _write(out / f"{side}.jsonl", [{"messages": as_messages(stretch)} for stretch in stretches])
        counts |= {f"stretches, {side}": len(stretches), f"answers, {side}": sum(map(len, stretches))}
    library = list(english())
    _write(out / "text.jsonl", [{"text": each} for each in [*text, *library]])
    for name, texts in (("dialogues", text), ("Python's English", library)):
        counts[f"characters of text, {name}"] = sum(map(len, texts))
    (out / "questions.txt").write_text("".join(f"{line}\n" for line in questions_of(sides["held_out"])))
    (out / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def installed() -> Path:
    """The dataset.json of the package. UserError where that is not installed."""
    # Not imported: 40 MB of JSON are all that is needed of it.
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError("the package chitchat-dataset is not installed: pip install -r requirements-chitchat.txt")
    return Path(spec.origin).with_name("dataset.json")


def main() -> None:
    """Write the files named above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--dataset", type=Path, help="a dataset.json; default that of the package")
    arguments = parser.parse_args()
    try:
        path = arguments.dataset or installed()
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError) as error:
        parser.exit(2, f"chitchat_data.py: {error}\n")
    write(arguments.out, dataset)


if __name__ == "__main__":
    main()
