"""Documents for launch/quickstart_in_context.sh: examples of a rule that no other document has, in lines like "fQ".

python experiments/in_context_data.py --out=DIR [--seed=N]

A rule maps a few letters to capitals, at random and one to one. A document is a rule's letters drawn again and again,
a line each: what stands behind a letter that came before can be read there, and nowhere else, since over all documents
every letter has every capital equally often. Held-out documents have rules of their own. Each is eight examples, of
different letters, and a letter that is asked for, the eight capitals of its rule being the candidates; the asked letter
is at each place of the eight equally often, so that among the first k examples it is in k/8 of the documents.
Writes into OUT:

  train.jsonl       documents to train on, {"text": ...}
  held_out.jsonl    {"text", "shots", "asked", "candidates", "gold", "answer", "place"}; the text is the examples with
                    the answered question behind them
  in_context_*.yaml tasks of lm-evaluation-harness on them, for each number of examples (shots): `choice`, the likeliest
                    of the candidates, and `write`, what the model writes

The examples are of the document, not lm-eval's few-shot examples: those it draws from other documents, whose rules are
others.
"""

import argparse
import json
import random
import string
from pathlib import Path
from typing import Any, NamedTuple

LETTERS, CAPITALS = string.ascii_lowercase, string.ascii_uppercase
SHOTS = (0, 1, 2, 4, 8)
MOST = max(SHOTS)  # letters of a held-out rule: each of them has been shown behind so many examples
LETTERS_OF_A_RULE = (2, MOST)  # few letters come again soon: they are what is learned first
LINES = (4, 3 * MOST)
DOCUMENTS, HELD_OUT = 40_000, 400
FORMS = ("choice", "write")
_LENGTH = 2  # tokens that are written: a capital and the end of its line

_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{ shots[:{shots}] | join('') }}}}{{{{ asked }}}}"
target_delimiter: ""
num_fewshot: 0
"""
_OF_FORM = {
    "choice": """output_type: multiple_choice
doc_to_choice: candidates
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "write": f"""output_type: generate_until
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: {_LENGTH}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}

Rule = tuple[tuple[str, str], ...]  # letters in their order, each with its capital


class Documents(NamedTuple):
    """Each side's rules, in the order of its documents, and the documents."""

    train_rules: list[Rule]
    train: list[str]
    held_out_rules: list[Rule]
    held_out: list[dict[str, Any]]


def line(pair: tuple[str, str]) -> str:
    """An example."""
    return f"{pair[0]}{pair[1]}\n"


def rule(rng: random.Random, size: int) -> Rule:
    """Letters and their capitals."""
    return tuple(zip(sorted(rng.sample(LETTERS, size)), rng.sample(CAPITALS, size), strict=True))


def question(rng: random.Random, own: Rule, place: int) -> dict[str, Any]:
    """A held-out document of a rule, whose asked letter is that of the example at `place`, 0 for the first."""
    shots = rng.sample(own, len(own))
    asked, answer = shots[place]
    candidates = sorted(capital for _, capital in own)
    text = "".join(map(line, [*shots, (asked, answer)]))
    return {
        "text": text,
        "shots": [line(pair) for pair in shots],
        "asked": asked,
        "candidates": candidates,
        "gold": candidates.index(answer),
        "answer": answer,
        "place": place,
    }


def documents(seed: int, train: int = DOCUMENTS, held_out: int = HELD_OUT) -> Documents:
    """So many documents of either side; no rule occurs twice on the held-out side, nor on both."""
    rng = random.Random(f"in context {seed}")
    asked: dict[Rule, None] = {}
    while len(asked) < held_out:
        asked[rule(rng, MOST)] = None
    rules: list[Rule] = []
    while len(rules) < train:
        own = rule(rng, rng.randint(*LETTERS_OF_A_RULE))
        if own not in asked:
            rules.append(own)
    texts = ["".join(line(rng.choice(own)) for _ in range(rng.randint(*LINES))) for own in rules]
    return Documents(rules, texts, list(asked), [question(rng, own, i % MOST) for i, own in enumerate(asked)])


def task(form: str, shots: int) -> str:
    """A task's name."""
    return f"in_context_{form}_{shots}"


def write(out: Path, found: Documents) -> None:
    """The files named above."""
    out.mkdir(parents=True, exist_ok=True)
    sides = {"train": [{"text": text} for text in found.train], "held_out": found.held_out}
    for name, records in sides.items():
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for form in FORMS:
        for shots in SHOTS:
            name, file = task(form, shots), json.dumps(str((out / "held_out.jsonl").resolve()))
            text = _TASK.format(name=name, file=file, shots=shots) + _OF_FORM[form]
            (out / f"{name}.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the files named above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--seed", type=int, default=0, help="which rules")
    arguments = parser.parse_args()
    try:
        write(arguments.out, documents(arguments.seed))
    except OSError as error:
        parser.exit(2, f"in_context_data.py: {error}\n")


if __name__ == "__main__":
    main()
