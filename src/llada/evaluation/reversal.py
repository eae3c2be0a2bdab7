"""The reversal curse: pairs (first, second) asked forward, for the second, and backward, for the first.

An answer is scored as it is written, and by likelihood among candidates: the answers of other pairs, drawn once and for
all, so that every model chooses among the same ones. Sources: LLaDA section 3.3 and appendix B.7 (couplets, asked
through a chat template, right where the line occurs in the reply); Berglund et al., arXiv 2309.12288 (made-up facts).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llada import json_files
from llada.config import Config
from llada.data.chat_template import ChatTemplate, drop_start
from llada.data.continuation import encode_after
from llada.data.tokenizer import Tokenizer, unicode_text
from llada.errors import UserError
from llada.evaluation.answers import wilson
from llada.inference import canvas, generation, likelihood
from llada.inference.mask_plans import Pair
from llada.model import transformer

FILE = "reversal.json"  # in a workdir
KEYS = ("first", "second")
# Direction: what is given, and what is asked for.
DIRECTIONS = {"forward": ("first", "second"), "backward": ("second", "first")}
ASK = ("text", "chat", "blank")
SCORING = ("both", "generation", "likelihood")
# The published evaluation's, in Chinese: "What is the line after (before) it? Answer with the line alone."
PUBLISHED = {
    "forward": "{first}的下一句是什么？ 直接输出句子即可。",
    "backward": "{second}的上一句是什么？ 直接输出句子即可。",
}
PUBLISHED_LENGTH = 28  # its gen_length, in as many steps and one block
CANDIDATES = 10
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
    scoring     one of SCORING
    """

    ask: str
    texts: dict[str, str]
    candidates: int = CANDIDATES
    scoring: str = "both"


class Opened(Protocol):
    """What is needed of a model: `llada.load(workdir)` is one."""

    @property
    def config(self) -> Config: ...
    @property
    def params(self) -> transformer.Parameters: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


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
        records = [
            (f"{name} record {n}", value) for n, value in enumerate(json_files.read(path, list, name=name), 1)
        ]  # fmt: skip
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
    return Item(*(value[key].strip() for key in KEYS), place)


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

    def request(self, question: _Question, options: dict[str, Any]) -> generation.Request:
        """The question as a request for text. UserError if the context is shorter."""
        tokenizer = self.run.tokenizer
        if self.asking.ask == "blank":
            before = question.before.rstrip(" ")
            tail = question.behind
            whole = tokenizer.encode(question.before + question.answer + tail)
            around = (tokenizer.encode(before) if before else []) + encode_after(tokenizer, tail)
            gap = max(1, len(whole) - len(around))
            options = {name: value for name, value in options.items() if name != "gen_length"}
            return generation.Request(infill=f"{before}[MASK:{gap}]{tail}", **options)
        prompt_ids = self.pair(question, question.answer).prompt
        self._check_length(question, len(prompt_ids) + options["gen_length"])
        return generation.Request(prompt_ids=list(prompt_ids), **options)

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
    settings: likelihood.LikelihoodConfig = likelihood.LikelihoodConfig(),
    progress: likelihood.OnRows | None = None,
) -> dict[str, Any]:
    """Both directions, ready for JSON; call it inside the mesh of `run`.

    `options` are fields of `generation.Request`; None for `gen_length` is room for the longest right answer of both
    directions. UserError for what cannot be asked, before anything is.
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
    run = asker.run
    requests = [asker.request(question, options) for question in asked]
    texts = generation.generate(run.config, run.params, run.tokenizer, requests, round_up=True)
    written = [_answer(run.tokenizer, *pair) for pair in zip(requests, texts, strict=True)]
    blank = asker.asking.ask == "blank"
    exact, within, wrong = [], [], []
    for question, text in zip(asked, written, strict=True):
        if blank:
            text = text.removeprefix(question.before.rstrip(" ")).removesuffix(question.behind)
        text, wanted = text.strip(), question.answer if blank else question.written
        exact.append(text == wanted.strip())
        within.append(question.answer in text)
        if not within[-1]:
            wrong.append({"asked": question.before, "expected": question.answer, "written": text})
    return {"exact": score(exact), "substring": score(within), "wrong": wrong[:_SHOWN]}


def _answer(tokenizer: Tokenizer, request: generation.Request, text: generation.Generated) -> str:
    """What was written behind a prompt, up to its end; of a filled statement all of it."""
    if request.infill is not None:
        return text.text
    start = len(request.prompt_ids or ())
    return tokenizer.decode(canvas.until_end(text.ids[start:], tokenizer.special.ends, 0))


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
