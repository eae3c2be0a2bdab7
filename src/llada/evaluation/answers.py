"""Held-out answers written by the model and compared with the given ones: exact match, per label and per turn.

An answer is right where its text, up to the first end token, is the given one: the right words and one more are wrong.
Shares come with Wilson's interval, which holds near 0 and 1 too, for examples that are independent.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import json_files
from llada.config import Config
from llada.data import examples
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.files import write_atomically
from llada.inference import canvas, generation
from llada.model import transformer

FILE = "answers.json"  # in a workdir
LEVEL = 1.959964  # standard normal quantile of 97.5 %: intervals hold 95 %
_MULTIPLE = 8  # the default gen_length is one of these, so that blocks divide it
_SHOWN = 20  # wrong answers that are listed
# Of wrong answers, by their words: others, as many; the right ones in another order; more or fewer.
KINDS = ("words", "order", "length")


class Answer(NamedTuple):
    """One held-out example, and what the model wrote. `turn` counts the assistant's turns from 1."""

    label: str
    turn: int
    prompt: str
    expected: str
    written: str

    @property
    def right(self) -> bool:
        """Whether the texts are equal."""
        return self.written == self.expected

    @property
    def kind(self) -> str:
        """How the texts differ: see KINDS."""
        written, expected = self.written.split(), self.expected.split()
        if len(written) != len(expected):
            return "length"
        return "order" if sorted(written) == sorted(expected) else "words"


class Written(NamedTuple):
    """Answers to all examples, how they were written, and what that cost; forward passes are those of all batches."""

    answers: list[Answer]
    settings: dict[str, Any]
    seconds: float


def sampled(held_out: examples.HeldOut, count: int) -> np.ndarray:
    """Indices of `count` held-out examples (all, if there are fewer), drawn once and for all, in their order."""
    indices = np.random.default_rng(0).permutation(len(held_out))[:count]
    return np.sort(indices)


def write(
    config: Config,
    params: transformer.Parameters,
    tokenizer: Tokenizer,
    held_out: examples.HeldOut,
    labels: Sequence[str],
    count: int,
    options: dict[str, Any],
) -> Written:
    """Have the model answer `count` held-out prompts; call it inside its mesh.

    `options` are fields of `generation.Request`; None for `gen_length` is room for the longest of the given answers.
    An answer gets fewer positions where the context leaves no more. UserError for options that cannot work.
    """
    indices = sampled(held_out, count).tolist()
    pairs = [held_out.pair(index) for index in indices]
    if options.get("gen_length") is None:
        longest = max(len(answer_ids) for _, answer_ids in pairs)
        options = options | {"gen_length": -(-longest // _MULTIPLE) * _MULTIPLE}
    requests = [_request(config, prompt_ids, options) for prompt_ids, _ in pairs]
    texts = generation.generate(config, params, tokenizer, requests, round_up=True)
    answers = []
    for index, (prompt_ids, answer_ids), text in zip(indices, pairs, texts, strict=True):
        turn, label = held_out.turn_and_label(index)
        expected = tokenizer.decode(canvas.until_end(answer_ids, tokenizer.special.ends, 0))
        written = tokenizer.decode(canvas.until_end(text.ids[len(prompt_ids) :], tokenizer.special.ends, 0))
        answers.append(Answer(labels[label], turn + 1, _shown(tokenizer, prompt_ids), expected, written))
    given = {name: value for name, value in options.items() if value is not None}
    return Written(answers, given, _seconds(texts))


def _request(config: Config, prompt_ids: list[int], options: dict[str, Any]) -> generation.Request:
    room = config.model.max_length - len(prompt_ids)
    if room < 1:
        most = f"model.max_length={config.model.max_length}"
        raise UserError(f"a held-out prompt of {len(prompt_ids)} tokens leaves no room for an answer in {most}")
    return generation.Request(prompt_ids=prompt_ids, **options | {"gen_length": min(options["gen_length"], room)})


def _seconds(texts: Sequence[generation.Generated]) -> float:
    """Of all batches: what texts of one batch share is counted once."""
    return sum({(text.seconds, text.forward_passes, text.tokens_per_second): text.seconds for text in texts}.values())


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A prompt as text, with its control tokens spelled."""
    parts: list[str] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is None or tokenizer.token_bytes_V[token] == 0:
            parts.append(tokenizer.decode(run))
            run = []
            parts.append("" if token is None else tokenizer.piece(token))
        else:
            run.append(token)
    return "".join(parts)


def wilson(right: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Ends of Wilson's score interval for a share of `right` in `count` independent trials; (0, 1) for none."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, level**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = level * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def score(answers: Sequence[Answer]) -> dict[str, Any]:
    """Right answers of how many, their share, and the ends of its 95 % interval."""
    right, count = sum(answer.right for answer in answers), len(answers)
    low, high = wilson(right, count)
    return {"right": right, "count": count, "share": right / count if count else math.nan, "low": low, "high": high}


def scores(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The score of all answers, of each label, of each turn, and of each label's turns.

    Each says what it is of by `label` and `turn`; None stands for all of them. Dialogues without a label have "".
    """
    labels = sorted({answer.label for answer in answers})
    turns = sorted({answer.turn for answer in answers})
    return [
        {"label": label, "turn": turn} | score(chosen)
        for label in (None, *labels)
        for turn in (None, *turns)
        if (chosen := [a for a in answers if label in (None, a.label) and turn in (None, a.turn)])
    ]


def summary(written: Written) -> dict[str, Any]:
    """What `llada evaluate` reports: settings, scores, how wrong answers differ, some of them, one of each label."""
    wrong = [answer for answer in written.answers if not answer.right]
    first = {answer.label: answer for answer in reversed(written.answers)}
    return {
        "settings": written.settings,
        "scores": scores(written.answers),
        "wrong_by": {kind: sum(answer.kind == kind for answer in wrong) for kind in KINDS},
        "wrong": [answer._asdict() for answer in wrong[:_SHOWN]],
        "first": [first[label]._asdict() for label in sorted(first)],
        "seconds": written.seconds,
    }


def record(path: Path, step: int, digest: str, new: dict[str, Any]) -> None:
    """Add a `summary` to those of the same step and dialogues in a file; one with the same settings is replaced."""
    same = {"step": step, "corpus_digest": digest}
    results = []
    if path.exists():
        values = json_files.read(path)
        if all(values.get(key) == value for key, value in same.items()):
            results = [old for old in values.get("results", []) if old.get("settings") != new["settings"]]
    text = json_files.dumps(same | {"results": [*results, new]}, indent=2)
    write_atomically(path, f"{text}\n".encode())
