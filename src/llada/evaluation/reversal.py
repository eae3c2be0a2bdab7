"""The reversal curse: pairs (first, second) asked forward, for the second, and backward, for the first.

An answer is scored as it is written, and by likelihood among candidates: the answers of other pairs, drawn once and for
all, so that every model chooses among the same ones. Sources: LLaDA section 3.3 and appendix B.7 (couplets, asked
through a chat template, right where the line occurs in the reply); Berglund et al., arXiv 2309.12288 (made-up facts).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llada import json_files
from llada import mesh as mesh_lib
from llada.config import Config
from llada.data.chat_template import ChatTemplate, drop_start
from llada.data.continuation import spelled_bytes
from llada.data.tokenizer import unicode_text
from llada.errors import UserError
from llada.evaluation.answers import wilson
from llada.inference import canvas, generation, likelihood, sampler
from llada.inference.chat import Opened
from llada.inference.mask_plans import Pair

FILE = "reversal.json"  # in a workdir
KEYS = ("first", "second")
# Direction: what is given, and what is asked for.
DIRECTIONS = {"forward": ("first", "second"), "backward": ("second", "first")}
# The published evaluation's, in Chinese: "What is the line after (before) it? Answer with the line alone."
PUBLISHED = {
    "forward": "{first}的下一句是什么？ 直接输出句子即可。",  # noqa: RUF001
    "backward": "{second}的上一句是什么？ 直接输出句子即可。",  # noqa: RUF001
}
PUBLISHED_LENGTH = 28  # its gen_length, in as many steps and one block
_MULTIPLE = 8  # the default gen_length is one of these, so that blocks divide it
_SHOWN = 10  # wrong answers that are listed


class Item(NamedTuple):
    """A pair, and where it is from: "facts.json record 3"."""

    first: str
    second: str
    place: str


class Asking(NamedTuple):
    """How pairs are asked.

    ask         text: continue a text; chat: answer a user, through the tokenizer's chat template; blank: fill what is
                missing from a statement, which an ARM cannot write but can score
    texts       by direction, with {first} and {second}: of "text" and "blank" the asked one stands behind the given
                one, and what follows it is part of what is to be written; "chat" asks without naming it. "blank" has
                the forward statement in both directions
    candidates  among which likelihood chooses, the right one included
    scoring     generation, likelihood or both
    """

    ask: str
    texts: dict[str, str]
    candidates: int
    scoring: str


class _Question(NamedTuple):
    """One pair in one direction: the text up to the answer, the answer, and the text behind it."""

    before: str
    answer: str
    behind: str
    place: str

    @property
    def written(self) -> str:
        """What is written by a model that is right, and writes on to the end of the statement."""
        return self.answer + self.behind


def read_items(path: Path, flag: str = "--facts") -> list[Item]:
    """The pairs of a JSON list, or of JSON lines: objects with the texts `first` and `second` and nothing else.

    UserError naming the record for anything else, and for no record at all.
    """
    name = f"{flag}={path}"
    if path.suffix in (".jsonl", ".ndjson"):
        records = [(f"{name} line {number}", value) for number, value in json_files.read_lines(path, name, object)]
    else:
        values = json_files.read(path, list, name=name)
        records = [(f"{name} record {number}", value) for number, value in enumerate(values, 1)]
    if not records:
        raise UserError(f"{name} holds no record; give objects with {' and '.join(KEYS)}")
    return [_item(value, place) for place, value in records]


def _item(value: Any, place: str) -> Item:
    if not isinstance(value, dict):
        raise UserError(f"{place} is {type(value).__name__}; it must be an object with {' and '.join(KEYS)}")
    if set(value) != set(KEYS):
        has = ", ".join(sorted(map(str, value))[:10]) or "none"
        raise UserError(f"{place} has the keys {has}; it must have {' and '.join(KEYS)}, and no others")
    for key in KEYS:
        if not isinstance(value[key], str) or not value[key].strip():
            raise UserError(f"{place}: {key} must be a text that is not empty")
        unicode_text(value[key], f"{place}: {key}")
    return Item(value["first"].strip(), value["second"].strip(), place)


def check(config: Config, asking: Asking) -> None:
    """UserError for texts that do not ask what they should, and for what this family cannot do."""
    for direction, (given, asked) in DIRECTIONS.items():
        flag, text = f"--{direction}", asking.texts.get(direction)
        if asking.ask == "blank" and direction == "backward":
            if text is not None:
                raise UserError("--backward is not for --ask=blank, which leaves gaps in the statement of --forward")
            continue
        if text is None:
            example = "'{first} is {second}.'" if direction == "forward" else "'{second} is {first}.'"
            raise UserError(f"{flag} is missing: the text that is asked, such as {flag}={example}")
        unicode_text(text, flag)
        needed = (given,) if asking.ask == "chat" else (given, asked)
        counts = {key: text.count(f"{{{key}}}") for key in KEYS}
        ordered = asking.ask == "chat" or text.find(f"{{{given}}}") < text.find(f"{{{asked}}}")
        if counts != {key: int(key in needed) for key in KEYS} or not ordered:
            then = " and then ".join(f"{{{key}}}" for key in needed)
            raise UserError(f"{flag}={text} must hold {then}, once, for --ask={asking.ask}")
    if config.model.causal and asking.ask == "blank" and asking.scoring != "likelihood":
        raise UserError("--ask=blank has gaps filled, which an ARM cannot; with --scoring=likelihood it can be scored")


def questions(items: Sequence[Item], asking: Asking, direction: str) -> list[_Question]:
    """The pairs in one direction."""
    given, asked = DIRECTIONS[direction]
    text = asking.texts["forward" if asking.ask == "blank" else direction]
    before, _, behind = text.partition(f"{{{asked}}}")
    return [
        _Question(
            before.replace(f"{{{given}}}", getattr(item, given)),
            getattr(item, asked),
            behind.replace(f"{{{given}}}", getattr(item, given)),
            item.place,
        )
        for item in items
    ]


def candidates(answers: Sequence[str], index: int, count: int) -> list[str]:
    """The answer of one pair, then others drawn from those of all pairs: `count` different ones, or as many as exist.

    They depend on the pairs and the index alone, so that all models choose among the same.
    """
    others = sorted(set(answers) - {answers[index]})
    drawn = np.random.default_rng((len(answers), index)).permutation(len(others))[: count - 1]
    return [answers[index], *(others[i] for i in drawn)]


class Asker:
    """A model and how it is asked."""

    def __init__(self, run: Opened, asking: Asking):
        """UserError as `check`, and where a chat template is needed and the tokenizer has none."""
        check(run.config, asking)
        self.run, self.asking = run, asking
        if asking.ask == "chat":
            if run.tokenizer.template is None:
                raise UserError("--ask=chat needs a chat template, and the model's tokenizer has none; use --ask=text")
            self._template = ChatTemplate(run.tokenizer)

    def pair(self, question: _Question, answer: str) -> Pair:
        """Ids of what is given, and of an answer with the token that ends it. UserError if the context is shorter."""
        tokenizer, config = self.run.tokenizer, self.run.config.model
        if self.asking.ask == "chat":
            messages = [{"role": "user", "content": question.before}, {"role": "assistant", "content": answer}]
            turn = self._template.turns(messages)[0]
            prompt_ids, answer_ids = drop_start(turn.prompt_ids, tokenizer.special, config.causal), turn.answer_ids
        else:
            given, scored = question.before, answer + question.behind
            if self.asking.ask == "blank":
                given, scored = "", question.before + scored
            prompt_ids, answer_ids = canvas.encode_pair(tokenizer, given, scored)
            answer_ids = [*answer_ids, tokenizer.eos_id]
        self._check_length(question, len(prompt_ids) + len(answer_ids))
        return Pair(prompt_ids, answer_ids)

    def gap(self, question: _Question) -> tuple[list[int], list[int]]:
        """Ids of a statement and the token that ends it, and at which positions they spell the answer."""
        tokenizer = self.run.tokenizer
        text = question.before + question.written
        ids = canvas.encode_text(tokenizer, text, question.place)
        spelled = np.cumsum([0, *(len(spelled_bytes(tokenizer, [token])) for token in ids)])
        # Some tokenizers put a space before every text.
        start = spelled[-1] - len(text.encode()) + len(question.before.encode())
        end = start + len(question.answer.encode())
        self._check_length(question, len(ids) + 1)
        inside = (spelled[:-1] < end) & (spelled[1:] > start)
        return [*ids, tokenizer.eos_id], np.flatnonzero(inside).tolist()

    def request(self, question: _Question, options: dict[str, Any]) -> generation.Request:
        """The question as a request for text. UserError if the context is shorter."""
        prompt_ids = list(self.pair(question, question.answer).prompt)
        self._check_length(question, len(prompt_ids) + options["gen_length"])
        return generation.Request(prompt_ids=prompt_ids, **options)

    def room(self, asked: Sequence[_Question]) -> int:
        """Tokens for the longest right answer and its end; of `chat` as many as the published evaluation gives."""
        if self.asking.ask == "chat":
            return PUBLISHED_LENGTH
        longest = max(len(self.pair(question, question.answer).answer) for question in asked)
        return -(-longest // _MULTIPLE) * _MULTIPLE

    def _check_length(self, question: _Question, length: int) -> None:
        most = self.run.config.model.max_length
        if length > most:
            raise UserError(
                f"{question.place}: question and answer have {length} tokens, more than the model's context, "
                f"model.max_length={most}; shorten them, or --gen_length"
            )


def evaluate(
    run: Opened,
    items: Sequence[Item],
    asking: Asking,
    options: dict[str, Any],
    settings: likelihood.LikelihoodConfig,
    progress: likelihood.OnRows | None = None,
) -> dict[str, Any]:
    """Both directions, ready for JSON; call it inside the mesh of `run`.

    `options` are fields of `generation.Request`; None for `gen_length` is room for the longest right answer of both
    directions. UserError for what cannot be asked.
    """
    asker = Asker(run, asking)
    asked = {direction: questions(items, asking, direction) for direction in DIRECTIONS}
    if options.get("gen_length") is None and asking.ask != "blank":
        options = options | {"gen_length": max(asker.room(each) for each in asked.values())}
    given = {name: value for name, value in options.items() if value is not None}
    facts: dict[str, Any] = {"ask": asking.ask, "items": len(items), "settings": given, "texts": asking.texts}
    for direction, each in asked.items():
        facts[direction] = {}
        if asking.scoring != "likelihood":
            facts[direction] |= _written(asker, each, options)
        if asking.scoring != "generation":
            facts[direction]["likelihood"] = _chosen(asker, each, settings, progress)
    return facts


def _written(asker: Asker, asked: Sequence[_Question], options: dict[str, Any]) -> dict[str, Any]:
    """Scores of what the model writes, `exact` and by `substring`, and some of what is wrong."""
    pairs = (_filled if asker.asking.ask == "blank" else _continued)(asker, asked, options)
    exact, within, wrong = [], [], []
    for question, (text, wanted) in zip(asked, pairs, strict=True):
        exact.append(text.strip() == wanted.strip())
        within.append(question.answer in text)
        if not within[-1]:
            given = f"{question.before}____{question.behind}" if asker.asking.ask == "blank" else question.before
            wrong.append({"asked": given, "expected": question.answer, "written": text.strip()})
    return {"exact": score(exact), "substring": score(within), "wrong": wrong[:_SHOWN]}


def _continued(asker: Asker, asked: Sequence[_Question], options: dict[str, Any]) -> list[tuple[str, str]]:
    """What is written behind each question, up to its end, and what should be."""
    run, special = asker.run, asker.run.tokenizer.special
    requests = [asker.request(question, options) for question in asked]
    texts = generation.generate(run.config, run.params, run.tokenizer, requests, round_up=True)
    return [
        (run.tokenizer.decode(canvas.until_end(text.ids[len(r.prompt_ids or ()) :], special.ends, 0)), question.written)
        for question, r, text in zip(asked, requests, texts, strict=True)
    ]


def _filled(asker: Asker, asked: Sequence[_Question], options: dict[str, Any]) -> list[tuple[str, str]]:
    """What fills the gap of each statement, and what should; gaps of one length are filled together."""
    run = asker.run
    config, tokenizer = run.config.model, run.tokenizer
    gaps = [asker.gap(question) for question in asked]
    L, forbidden_V = max(len(ids) for ids, _ in gaps), canvas.forbidden_ids(tokenizer, config.vocab_size)
    request = generation.Request(infill="", **{**options, "gen_length": None})
    texts: dict[int, tuple[str, str]] = {}
    for K in sorted({len(positions) for _, positions in gaps}):
        settings = generation.sampler_settings(request, K)
        indices = [i for i, (_, positions) in enumerate(gaps) if len(positions) == K]
        for start in range(0, len(indices), generation.BATCH):
            batch = indices[start : start + generation.BATCH]
            B = mesh_lib.local_batch(generation.BATCH, jax.sharding.get_abstract_mesh())
            canvas_BL = np.full((B, L), tokenizer.pad_id, np.int32)
            lengths_B = np.full(B, L)
            for row_L, b, i in zip(canvas_BL, range(B), [*batch, *[batch[-1]] * (B - len(batch))], strict=True):
                ids, positions = gaps[i]
                row_L[: len(ids)], lengths_B[b] = ids, len(ids)
                row_L[positions] = tokenizer.special.mask_id
            seed_B = np.full(B, request.seed)
            written = sampler.reverse_process(
                config, run.params, canvas_BL, settings, tokenizer.special, forbidden_V, seed_B, lengths_B
            )
            for i, row_L in zip(batch, written.tokens_BL, strict=False):
                ids, positions = gaps[i]
                filled, right = row_L[positions].tolist(), [ids[at] for at in positions]
                texts[i] = tokenizer.decode(filled), tokenizer.decode(right)
    return [texts[i] for i in range(len(asked))]


def _chosen(
    asker: Asker,
    asked: Sequence[_Question],
    settings: likelihood.LikelihoodConfig,
    progress: likelihood.OnRows | None,
) -> dict[str, Any]:
    """The score of choosing the most likely candidate. One that ties with the right one counts as wrong."""
    run = asker.run
    answers = [question.answer for question in asked]
    choices = [candidates(answers, index, asker.asking.candidates) for index in range(len(asked))]
    pairs = [asker.pair(question, text) for question, texts in zip(asked, choices, strict=True) for text in texts]
    values = likelihood.log_likelihoods(run.config.model, run.params, pairs, run.tokenizer.special, settings, progress)
    log_N = np.array([value.log_likelihood for value in values])
    ends = np.cumsum([len(texts) for texts in choices])[:-1]
    right = [bool(len(x) == 1 or x[0] > x[1:].max()) for x in np.split(log_N, ends)]
    chance = float(np.mean([1 / len(texts) for texts in choices]))
    most = max(map(len, choices))
    return score(right) | {"candidates": most, "chance": chance, "estimator": values[0].estimator}


def score(right: Sequence[bool]) -> dict[str, Any]:
    """Right ones of how many, their share, and the ends of its 95 % interval (Wilson)."""
    low, high = wilson(sum(right), len(right))
    return {"right": sum(right), "count": len(right), "share": sum(right) / len(right), "low": low, "high": high}
