"""Requests of an evaluation harness, answered by either family: log-likelihoods of answers and texts, and texts.

Batches are ours: requests are sorted by length and settings, finished in portions, and each portion is kept before the
next is begun. Batches are filled up to one size for each length, so a request gets the same bits whatever the others
are, and whatever was finished before.
Letters: A answer tokens, L tokens of prompt and answer.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from llada import processes
from llada.data.chat_template import ChatTemplate, Rendered, drop_start
from llada.data.continuation import spelled_bytes
from llada.errors import UserError
from llada.evaluation.harness_cache import RequestCache
from llada.inference import canvas, generation, greedy, likelihood
from llada.inference.chat import Opened, Options, fitted
from llada.inference.compiled_loop import forbidden_list
from llada.inference.likelihood import LikelihoodConfig, LogLikelihood
from llada.inference.mask_plans import Pair, most_rows, padded_length
from llada.objectives.vocabulary_head import scoring_tokens

Text = str | Rendered  # a context: plain, or of a dialogue
OnDone = Callable[[int, int], None]  # (requests done, of so many)
_PORTION = 16  # batches of rows that are scored before their requests count as finished


class Settings(NamedTuple):
    """How the requests of a task are answered.

    scoring     estimator, draws and guidance of log-likelihoods; nothing of it concerns an ARM
    writing     blocks, steps, guidance, end tokens, temperature and seed of texts; its gen_length is not read
    gen_length  tokens that are written; None: the request's own number
    window      tokens per window of a long text; None: half the context
    greedy      whether to find out if an answer is what the model writes by itself (`inference/greedy.py`)
    """

    scoring: LikelihoodConfig = LikelihoodConfig()
    writing: Options = Options()
    gen_length: int | None = None
    window: int | None = None
    greedy: bool = True

    def described(self, causal: bool) -> dict[str, Any]:
        """For results, JSON-ready: what counts for log-likelihoods, and for texts, of an ARM or a mask predictor."""
        scoring = {"exact": True} if causal else dataclasses.asdict(self.scoring)
        writing = {name: value for name, value in self.writing._asdict().items() if value is not None}
        return {
            "scoring": scoring | {"window": self.window, "is_greedy": self.greedy},
            "writing": writing | {"gen_length": self.gen_length or "the task's"},
        }


class Until(NamedTuple):
    """A request for text: behind `prompt`, cut where the first of `until` begins, of `gen_length` tokens at most.

    `repeat` counts equal requests, which get different noise; `options` are fields of `Options` that it brings itself.
    """

    prompt: Text
    until: tuple[str, ...]
    gen_length: int
    repeat: int = 0
    options: tuple[tuple[str, Any], ...] = ()


class Scored(NamedTuple):
    """A log-likelihood in nats with its standard error over draws, and whether the answer is the model's own.

    `is_greedy` is False where nobody asked.
    """

    log_likelihood: float
    stderr: float
    is_greedy: bool


@dataclass
class Tally:
    """What happened to requests on their way.

    truncated  contexts that were cut on the left, as they did not fit the model's context beside their answer
    shortened  texts that got fewer tokens than asked for, as the context has no more
    cached     results that were there already, or were asked for twice
    rows       sequences that went through the model
    """

    requests: int = 0
    truncated: int = 0
    shortened: int = 0
    cached: int = 0
    rows: int = 0


class _Job(NamedTuple):
    """A request as ids: of a text to be written the options, of an answer to be scored the pair (or pairs)."""

    key: str
    pairs: tuple[Pair, ...]
    settings: Settings
    options: Options | None = None
    dialogue: bool = False


class Harness:
    """A model that answers requests."""

    def __init__(self, run: Opened, template: ChatTemplate | None = None, progress: OnDone | None = None):
        """`template` renders dialogues; without one only plain texts can be contexts."""
        self.run, self.template, self.tally = run, template, Tally()
        self.cache: RequestCache | None = None
        self._progress = progress
        model = run.config.model
        self._forbidden_V = canvas.forbidden_ids(run.tokenizer, model.vocab_size)
        self._forbidden_F = forbidden_list(self._forbidden_V, run.tokenizer.special.mask)

    def score(self, requests: Sequence[tuple[Text, str]], settings: Sequence[Settings]) -> list[Scored]:
        """log p(answer | context) of each, with the settings of each. UserError for an answer that fits no context."""
        jobs = [self._pair_job(request, own) for request, own in zip(requests, settings, strict=True)]
        return [Scored(*result) for result in self._answered(jobs, self._score)]

    def score_texts(self, texts: Sequence[str], settings: Sequence[Settings]) -> list[Scored]:
        """log p of whole texts, window by window: `likelihood.rolling`. UserError for an empty one."""
        jobs = [self._windows_job(text, own) for text, own in zip(texts, settings, strict=True)]
        return [Scored(*result) for result in self._answered(jobs, self._score)]

    def write(self, requests: Sequence[Until], settings: Sequence[Settings]) -> list[str]:
        """The text behind each prompt, without its end token and what follows a stop."""
        jobs = [self._text_job(request, own) for request, own in zip(requests, settings, strict=True)]
        texts = self._answered(jobs, self._write)
        return [_cut(text, request.until) for text, request in zip(texts, requests, strict=True)]

    def planned(self, kind: str, requests: Sequence[Any], settings: Sequence[Settings]) -> dict[str, int]:
        """What `kind` (score, score_texts, write) will do, without the model: requests, most rows, their tokens."""
        before = dataclasses.replace(self.tally)
        makers: dict[str, Callable[..., _Job]] = {
            "score": self._pair_job,
            "score_texts": self._windows_job,
            "write": self._text_job,
        }
        jobs = {job.key: job for job in (makers[kind](*each) for each in zip(requests, settings, strict=True))}
        costs = [self._cost(job) for job in jobs.values()]
        found = {"requests": len(requests), "truncated": self.tally.truncated - before.truncated}
        self.tally = before
        return found | {"rows": sum(rows for rows, _ in costs), "tokens": sum(tokens for _, tokens in costs)}

    def ids_of(self, text: Text, name: str = "the context") -> list[int]:
        """Ids of a context."""
        if isinstance(text, str):
            return canvas.encode_text(self.run.tokenizer, text, name)
        return drop_start(text.ids, self.run.tokenizer.special, self.run.config.model.causal)

    # Requests to ids.

    def _pair_job(self, request: tuple[Text, str], settings: Settings) -> _Job:
        context, answer = request
        tokenizer, longest = self.run.tokenizer, self.run.config.model.max_length
        if isinstance(context, str):
            prompt, ids = canvas.encode_pair(tokenizer, context, answer, ("the context", "the answer"))
        else:
            assert self.template is not None
            prompt, ids = self.ids_of(context), self.template.answer_ids(context, answer)
        if len(ids) > longest:
            raise UserError(
                f"an answer has {len(ids)} tokens and the model's context is model.max_length={longest}: "
                f"{answer[:40]!r}; leave its task out"
            )
        room = longest - len(ids)
        self.tally.truncated += len(prompt) > room
        pair = Pair(prompt[max(0, len(prompt) - room) :], ids)
        likelihood.check_pair(self.run.config.model, pair, tokenizer.special)
        return self._scoring_job((pair,), settings)

    def _windows_job(self, text: str, settings: Settings) -> _Job:
        ids = canvas.encode_text(self.run.tokenizer, text, "the text")
        pairs = likelihood.windows(self.run.config.model, ids, settings.window)
        return self._scoring_job(tuple(pairs), settings._replace(greedy=False))

    def _scoring_job(self, pairs: tuple[Pair, ...], settings: Settings) -> _Job:
        scoring = None if self.run.config.model.causal else dataclasses.asdict(settings.scoring)
        ids = [[list(map(int, pair.prompt)), list(map(int, pair.answer)), pair.salt] for pair in pairs]
        return _Job(_key("score", scoring, settings.greedy, ids), pairs, settings)

    def _text_job(self, request: Until, settings: Settings) -> _Job:
        causal, longest = self.run.config.model.causal, self.run.config.model.max_length
        ids = self.ids_of(request.prompt)
        asked = request.gen_length if settings.gen_length is None else settings.gen_length
        options = settings.writing._replace(**dict(request.options), gen_length=asked)
        # The answer keeps its length, or half of the context; what is left of the prompt is its end.
        length = min(asked, max(longest - len(ids), longest // 2, 1))
        room = longest - length
        self.tally.truncated += len(ids) > room
        self.tally.shortened += length < asked
        ids = ids[max(0, len(ids) - room) :]
        options = options._replace(gen_length=length) if causal else fitted(options, length)
        if options.temperature > 0 or (options.remasking or "").startswith("random"):
            options = options._replace(seed=(options.seed + request.repeat) % (1 << 32))
        dialogue = not isinstance(request.prompt, str)
        pair = Pair(ids, [])
        generation.check(self.run.config, _generation_request(pair, options))
        if not causal:
            generation.sampler_settings(_generation_request(pair, options), length)
        key = _key("write", dialogue, options._asdict(), [int(token) for token in ids])
        return _Job(key, (pair,), settings, options, dialogue)

    # Ids to results.

    def _answered(self, jobs: Sequence[_Job], portions: Callable[[list[_Job]], Iterator[dict[str, Any]]]) -> list[Any]:
        """The result of each job, from the cache of the first process or of `portions`, each distinct job once."""
        distinct = {job.key: job for job in jobs}
        found = processes.from_first(self.cache.find(distinct) if self.cache is not None else {})
        self.tally.requests += len(jobs)
        self.tally.cached += len(jobs) - len(distinct) + len(found)
        left = [job for job in distinct.values() if job.key not in found]
        with jax.set_mesh(self.run.mesh):
            done = 0
            for results in portions(left):
                found |= results
                with processes.agreement():  # of several processes only the first has a cache
                    if self.cache is not None:
                        self.cache.add(results)
                done += len(results)
                if self._progress is not None:
                    self._progress(done, len(left))
        return [found[job.key] for job in jobs]

    def _score(self, jobs: list[_Job]) -> Iterator[dict[str, Any]]:
        """Scores of jobs in portions of equal settings and similar length."""
        model, params, special = self.run.config.model, self.run.params, self.run.tokenizer.special

        def order(job: _Job):
            return repr(job.settings), max(len(pair.prompt) + len(pair.answer) for pair in job.pairs)

        for settings, group in itertools.groupby(sorted(jobs, key=order), lambda job: job.settings):
            scoring = LikelihoodConfig(batch_tokens=settings.scoring.batch_tokens) if model.causal else settings.scoring
            for portion in self._portions(list(group), scoring.batch_tokens or scoring_tokens(full=True)):
                pairs = [pair for job in portion for pair in job.pairs]
                scores = likelihood.log_likelihoods(
                    model, params, pairs, special, scoring, forbidden_V=self._forbidden_V, full=True
                )
                own = np.zeros(len(pairs), bool)
                if settings.greedy:
                    own = greedy.are_greedy(model, params, pairs, special, self._forbidden_F, scoring)
                self.tally.rows += sum(score.rows for score in scores)
                yield _by_job(portion, scores, own)

    def _portions(self, jobs: list[_Job], batch_tokens: int) -> Iterator[list[_Job]]:
        """The jobs in their order, in portions of so many tokens that little of a batch is left empty."""
        portion, tokens = [], 0
        for job in jobs:
            portion.append(job)
            tokens += self._cost(job)[1]
            if tokens >= _PORTION * batch_tokens:
                yield portion
                portion, tokens = [], 0
        if portion:
            yield portion

    def _write(self, jobs: list[_Job]) -> Iterator[dict[str, Any]]:
        """Texts of jobs in batches of equal options and similar length."""
        run = self.run

        def order(job: _Job):
            return repr(job.options), len(job.pairs[0].prompt)

        def open_of(job: _Job) -> int:
            return 0 if job.options is None or run.config.model.causal else job.options.gen_length

        def alike(job: _Job):
            assert job.options is not None
            return repr(job.options._replace(seed=0)), generation.rounded_up(len(job.pairs[0].prompt) + open_of(job))

        for _, group in itertools.groupby(sorted(jobs, key=lambda job: (alike(job), order(job))), alike):
            for batch in _batched(list(group), generation.BATCH):
                requests = [_generation_request(job.pairs[0], job.options) for job in batch]
                texts = generation.generate(run.config, run.params, run.tokenizer, requests, round_up=True, full=True)
                self.tally.rows += texts[0].forward_passes * len(texts)
                yield {job.key: self._text(job, text.ids) for job, text in zip(batch, texts, strict=True)}

    def _text(self, job: _Job, ids: list[int]) -> str:
        """What was written behind the prompt: of plain text all of it, of a dialogue as `llada chat` shows it."""
        tokenizer, start = self.run.tokenizer, len(job.pairs[0].prompt)
        written = canvas.until_end(ids, tokenizer.special.ends, start)[start:]
        if job.dialogue:
            return tokenizer.decode(written)
        return spelled_bytes(tokenizer, written).decode(errors="replace")

    def _cost(self, job: _Job) -> tuple[int, int]:
        """Rows that a job sends through the model, at most, and their tokens."""
        causal, scoring = self.run.config.model.causal, job.settings.scoring
        if job.options is not None:
            options, L = job.options, len(job.pairs[0].prompt) + job.options.gen_length
            if causal:  # its cache: each token goes through once
                return options.gen_length, L
            rows = (options.steps or options.gen_length) * (2 if options.cfg_scale else 1)
            return rows, rows * L
        rows = tokens = 0
        for pair in job.pairs:
            A, L = len(pair.answer), padded_length(len(pair.prompt) + len(pair.answer))
            ordered = scoring.estimator in likelihood.ORDERED
            each = 1 if causal else A if ordered else most_rows(A, scoring.estimator, scoring.draws)
            each += (1 if causal else A) * job.settings.greedy
            each *= 2 if scoring.cfg_scale and not causal else 1
            rows, tokens = rows + each, tokens + each * L
        return rows, tokens


def _key(*content: Any) -> str:
    """The digest of all that a result depends on, beside the model."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _generation_request(pair: Pair, options: Options | None) -> generation.Request:
    assert options is not None
    return generation.Request(prompt_ids=list(pair.prompt), **options._asdict())


def _by_job(jobs: list[_Job], scores: list[LogLikelihood], own: np.ndarray) -> dict[str, Any]:
    """Results, JSON-ready, by the keys of jobs whose pairs the scores are of, in their order."""
    results, start = {}, 0
    for job in jobs:
        end = start + len(job.pairs)
        total = likelihood.joined(scores[start:end])
        results[job.key] = [total.log_likelihood, total.stderr, bool(job.settings.greedy and own[start:end].all())]
        start = end
    return results


def _batched(jobs: list[_Job], size: int) -> Iterator[list[_Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to where the first stop begins."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]
