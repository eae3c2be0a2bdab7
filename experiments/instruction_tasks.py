"""Instructions made by rule, for launch/quickstart_sft.sh: dialogues to fine-tune on, and plain text to pre-train on.

python experiments/instruction_tasks.py --out=runs/quickstart_sft/data [--dialogues=N] [--held_out=N] [--seed=N]

Writes OUT/train.jsonl and OUT/held_out.jsonl (a dialogue a line: `messages`, and the kind of instruction as `task`) and
OUT/text.jsonl. Five tasks, each of one to three turns, whose later turns refer back: to the list that the assistant
gave last, to its sum, or to the table. The material of an instruction (its words, digits, numbers or table) is on one
side only, by a hash of it: no held-out list, pair of numbers or table is in a training dialogue or in the text.
"""

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TASKS = ("copy", "reverse", "sort", "add", "look-up")
HELD_OUT_SHARE = 0.1  # of all materials
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
WORDS = [a + b for a, b in itertools.product(SYLLABLES, SYLLABLES)]
random.Random(0).shuffle(WORDS)
WORDS = sorted(WORDS[:32])
# Lists and tables of one size: where an item stands then says, from both sides of a mask, which one it is.
ITEMS, ROWS = 4, 3
MOST = 49  # of the numbers that are added
EXTREMES = (("smallest", min), ("largest", max))

Turn = tuple[str, str]  # what the user writes, what the assistant answers


class Draw:
    """Random material that belongs to one side."""

    def __init__(self, held_out: bool, seed: str):
        self.rng, self.held_out = random.Random(f"{seed} {held_out}"), held_out

    def material(self, make: Callable[[random.Random], Sequence]) -> list:
        """Draws of `make` until one belongs to this side; the order within it is not what decides."""
        while True:
            made = list(make(self.rng))
            if is_held_out(made) == self.held_out:
                return made

    def words(self) -> list[str]:
        return self.material(lambda rng: rng.sample(WORDS, ITEMS))

    def digits(self) -> list[int]:
        return self.material(lambda rng: rng.choices(range(10), k=ITEMS))

    def table(self) -> dict[str, str]:
        """Words by words."""
        words = self.material(lambda rng: rng.sample(WORDS, 2 * ROWS))
        return dict(zip(words[::2], words[1::2], strict=True))

    def numbers(self) -> list[int]:
        """Two to be added."""
        return self.material(lambda rng: (rng.randint(1, MOST), rng.randint(1, MOST)))

    def addend(self, number: int) -> int:
        """A number to add; where none makes a pair of this side, any."""
        every = range(1, MOST + 1)
        return self.rng.choice([n for n in every if is_held_out((number, n)) == self.held_out] or every)


def is_held_out(material: Sequence) -> bool:
    """Whether this material, in any order, is of the held-out side."""
    digest = hashlib.sha256(repr(sorted(material)).encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE


def dialogue(task: str, draw: Draw) -> list[dict[str, str]]:
    """The messages of one dialogue, of one to three turns."""
    turns = itertools.islice(TURNS[task](draw), draw.rng.choice((1, 1, 1, 2, 2, 3)))
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _copy(draw: Draw) -> Iterator[Turn]:
    words = draw.words()
    yield f"{draw.rng.choice(['Copy', 'Repeat'])}: {spaced(words)}", listed(words)
    yield from _about_words(draw, words)


def _reverse(draw: Draw) -> Iterator[Turn]:
    words = draw.words()
    yield f"{draw.rng.choice(['Reverse', 'Backwards'])}: {spaced(words)}", listed(words[::-1])
    yield from _about_words(draw, words[::-1])


def _about_words(draw: Draw, words: list[str]) -> Iterator[Turn]:
    """Questions about the list that the assistant gave last."""
    while True:
        if draw.rng.random() < 0.5:
            words = words[::-1]
            yield "Now reverse the list.", listed(words)
        else:
            place = draw.rng.randrange(len(words))
            yield f"What is word {place + 1}?", f"It is {words[place]}"


def _sort(draw: Draw) -> Iterator[Turn]:
    digits = sorted(given := draw.digits())
    yield f"Sort: {spaced(given)}", listed(digits)
    while True:
        if draw.rng.random() < 0.5:
            digits = digits[::-1]
            yield "Now reverse the list.", listed(digits)
        else:
            name, choose = draw.rng.choice(EXTREMES)
            yield f"What is the {name}?", f"It is {choose(digits)}"


def _add(draw: Draw) -> Iterator[Turn]:
    total, addend = draw.numbers()
    words = f"Add {total} and {addend}"
    while True:
        total += addend
        yield words, f"It is {total}"
        addend = draw.addend(total)
        words = f"Add {addend} more"


def _look_up(draw: Draw) -> Iterator[Turn]:
    table = draw.table()
    keys = draw.rng.choices(sorted(table), k=3)
    # The row is answered, not its value alone: what follows a word is what it stands beside.
    yield f"Table: {_rows(table)}. What is {keys[0]}?", _rows({keys[0]: table[keys[0]]})
    for key in keys[1:]:
        yield f"And {key}?", _rows({key: table[key]})


TURNS = dict(zip(TASKS, (_copy, _reverse, _sort, _add, _look_up), strict=True))


def passage(draw: Draw) -> str:
    """A document of the text: statements of the same kinds, without a dialogue."""
    return "".join(f"{draw.rng.choice(LINES)(draw)}\n" for _ in range(12))


def _repeated(draw: Draw) -> str:
    words = listed(draw.words())
    return f"{words}. {draw.rng.choice(['Copy', 'Repeat'])}: {words}"


def _mirrored(draw: Draw) -> str:
    words = draw.words()
    return (
        f"{listed(words)}. {draw.rng.choice(['Reverse', 'Backwards', 'Now reverse the list'])}: {listed(words[::-1])}"
    )


def _placed(draw: Draw) -> str:
    words = draw.words()
    place = draw.rng.randrange(len(words))
    return f"{listed(words)}. What is word {place + 1}? It is {words[place]}"


def _ordered(draw: Draw) -> str:
    digits = draw.digits()
    return f"{listed(digits)}. Sort: {listed(sorted(digits))}"


def _extreme(draw: Draw) -> str:
    digits = draw.digits()
    name, choose = draw.rng.choice(EXTREMES)
    return f"{listed(digits)}. What is the {name}? It is {choose(digits)}"


def _sum(draw: Draw) -> str:
    number, addend = draw.numbers()
    return f"Add {number} and {addend} more. It is {number + addend}"


def _facts(draw: Draw) -> str:
    table = draw.table()
    return f"Table: {_rows(table)}. {_rows(dict(draw.rng.sample(sorted(table.items()), len(table))))}"


# Looking up is learned last: most of the text is about it.
LINES = (_repeated, _mirrored, _placed, _ordered, _extreme, _sum, *(_facts,) * 6)


def _rows(table: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in table.items())


def listed(items: Sequence) -> str:
    """A list as it is answered. A word in front of the first item makes a tokenizer spell all items alike."""
    return f"List: {spaced(items)}"


def spaced(items: Sequence) -> str:
    """The items with a space between them."""
    return " ".join(map(str, items))


def write(out: Path, dialogues: int, held_out: int, documents: int, seed: int) -> None:
    """The three files. Tasks take turns, so that every one has its share; no dialogue is there twice."""
    out.mkdir(parents=True, exist_ok=True)
    for name, held, number in (("train", False, dialogues), ("held_out", True, held_out)):
        pairs = itertools.islice(_distinct(Draw(held, f"dialogues {seed}")), number)
        records = [{"task": task, "messages": messages} for task, messages in pairs]
        _write(out / f"{name}.jsonl", records)
    draw = Draw(False, f"text {seed}")
    _write(out / "text.jsonl", [{"text": passage(draw)} for _ in range(documents)])


def _distinct(draw: Draw) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Tasks in turn, each with a dialogue that was not there before."""
    seen = set()
    for task in itertools.cycle(TASKS):
        while (key := repr(messages := dialogue(task, draw))) in seen:
            pass
        seen.add(key)
        yield task, messages


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def main() -> None:
    """Write the files named above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the three files")
    parser.add_argument("--dialogues", type=int, default=40_000, help="to train on")
    parser.add_argument("--held_out", type=int, default=2_000, help="dialogues held out")
    parser.add_argument("--documents", type=int, default=12_000, help="of text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.dialogues, arguments.held_out, arguments.documents, arguments.seed)


if __name__ == "__main__":
    main()
