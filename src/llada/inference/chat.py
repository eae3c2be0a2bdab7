"""Dialogues answered by either family: rendered by the chat template, generated in batches, cut at the end of the turn.

The engine of `llada chat` and of its server. At temperature 0 a reply is what `llada sample --prompt_ids` writes behind
the same ids. Canvas lengths and batches are rounded up (`generation.generate`), so that a dialogue that grows from turn
to turn compiles a handful of programs.
Shapes: A positions of an answer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from llada import json_files
from llada.config import Config
from llada.data.chat_template import ChatTemplate, drop_start
from llada.data.control_tokens import BUILT_IN, builtin
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.inference import canvas as canvas_lib
from llada.inference import generation
from llada.inference import settings as settings_lib
from llada.model import transformer
from llada.paths import readable_file

Message = dict[str, Any]  # {"role": ..., "content": ...}

# Called after every step for each dialogue: (its index, tokens_A, step_A, step), where step_A < 0 marks what is not
# written yet. It may raise, which ends the reply with that exception.
Watcher = Callable[[int, np.ndarray, np.ndarray, int], None]


class Opened(Protocol):
    """What writing and scoring texts needs of a model: `llada.load(workdir)` is one."""

    @property
    def config(self) -> Config: ...
    @property
    def params(self) -> transformer.Parameters: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def mesh(self) -> jax.sharding.Mesh: ...


class Options(NamedTuple):
    """How to write a reply: as in `generation.Request`, which says what None is. `gen_length` is cut to the context."""

    gen_length: int = 128
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float | None = None
    remasking: str | None = None
    eos: str | None = None
    speculate: int | None = None
    cache: str | None = None
    confidence_threshold: float | None = None
    seed: int = 0


class Reply(NamedTuple):
    """An answer, and what it cost.

    text, ids          of the answer, without the token that ends it
    prompt_tokens      of the dialogue as the model read it
    completion_tokens  len(ids)
    gen_length         positions that were open; fewer than asked for where the context left no more
    finish_reason      "stop": an end token was written; "length": the positions were used up
    canvas, step       all ids, prompt and answer; and at which step each was written, -1 for the prompt
    forward_passes, seconds and compile_seconds are those of the batch.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    completion_tokens: int
    gen_length: int
    finish_reason: str
    forward_passes: int
    seconds: float
    compile_seconds: float
    canvas: list[int]
    step: list[int]


class Chat:
    """A model that answers dialogues: lists of messages, {"role": "user", "content": "..."} the last of them."""

    def __init__(self, run: Opened, template: str | None = None):
        """`template`: plain, llada, or a file; None is the tokenizer's own. UserError where there is none."""
        self.run = run
        source, name = (None, "the chat template") if template is None else template_source(template, "--template")
        if source is None and run.tokenizer.template is None:
            raise UserError(
                "the model's tokenizer has no chat template; give one: --template=plain, --template=llada or "
                "--template=FILE, the one that it was tuned with"
            )
        self.template = ChatTemplate(run.tokenizer, source, name)

    def check(self, messages: list[Message], options: Options) -> None:
        """UserError for anything that `reply` would refuse, before any work."""
        self._request(messages, options)

    def check_options(self, options: Options) -> None:
        """UserError for options that the model cannot follow, whatever it is asked."""
        settings_lib.check_types(options._asdict(), Options.__annotations__)
        config = self.run.config
        # How much of it the context leaves, each dialogue decides.
        length = min(options.gen_length, config.model.max_length)
        generation.check(config, _request("", options._replace(gen_length=length)))
        if not config.model.causal:
            steps = _one_per_token(options) if options.steps is None else options.steps
            generation.sampler_settings(_request("", options._replace(steps=steps)), options.gen_length)

    def total_steps(self, messages: list[Message], options: Options) -> int:
        """The last step that the reply can take, counted from 1. UserError as `check`."""
        return generation.total_steps(self.run.config, self.run.tokenizer, self._request(messages, options))

    def trimmed(self, messages: list[Message], options: Options) -> list[Message]:
        """The messages without the oldest turns: as few as leave room for `gen_length`, or half of the context.

        The system message and the last turn stay, however long they are.
        """
        longest = self.run.config.model.max_length
        wanted = min(options.gen_length, longest // 2)
        system = [message for message in messages[:1] if message.get("role") == "system"]
        rest = messages[len(system) :]
        while longest - len(self._prompt_ids([*system, *rest])) < wanted:
            turns = [i for i, message in enumerate(rest) if i > 0 and message.get("role") == "user"]
            if not turns:
                break
            rest = rest[turns[0] :]
        return [*system, *rest]

    def reply(
        self,
        conversations: Sequence[list[Message]],
        options: Sequence[Options],
        observe: Watcher | None = None,
    ) -> list[Reply]:
        """The next message of each conversation, those whose settings agree in one batch. UserError as `check`."""
        requests = [self._request(*pair) for pair in zip(conversations, options, strict=True)]
        starts = [len(request.prompt_ids or ()) for request in requests]

        watching = None if observe is None else _of_answers(observe, starts)
        run = self.run
        with jax.set_mesh(run.mesh):
            answers = generation.generate(run.config, run.params, run.tokenizer, requests, watching, round_up=True)
        return [self._reply(answer, start) for answer, start in zip(answers, starts, strict=True)]

    def _reply(self, answer: generation.Generated, start: int) -> Reply:
        ids = canvas_lib.until_end(answer.ids, self.run.tokenizer.special.ends, start)[start:]
        return Reply(
            text=self.run.tokenizer.decode(ids),
            ids=ids,
            prompt_tokens=start,
            completion_tokens=len(ids),
            gen_length=answer.gen_length,
            finish_reason="length" if len(ids) == answer.gen_length else "stop",
            forward_passes=answer.forward_passes,
            seconds=answer.seconds,
            compile_seconds=answer.compile_seconds,
            canvas=answer.ids,
            step=answer.step,
        )

    def _prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids of the dialogue so far and of the header of the answer."""
        _check_messages(messages)
        ids = self.template.prompt_ids(messages)
        return drop_start(ids, self.run.tokenizer.special, self.run.config.model.causal)

    def _request(self, messages: list[Message], options: Options) -> generation.Request:
        """The dialogue as a request. UserError for what is wrong with either."""
        self.check_options(options)
        prompt_ids = self._prompt_ids(messages)
        longest = self.run.config.model.max_length
        room = longest - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the dialogue has {len(prompt_ids)} tokens and the model's context is model.max_length={longest}: no "
                "room for an answer; /reset starts a new one, --trim drops its oldest turns"
            )
        if not self.run.config.model.causal:
            options = fitted(options, room)
        return _request(prompt_ids, options._replace(gen_length=min(options.gen_length, room)))


def _request(prompt: str | list[int], options: Options) -> generation.Request:
    """The request for text behind `prompt`, a text or ids."""
    given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
    return generation.Request(**given, **options._asdict())


def _check_messages(messages: list[Message]) -> None:
    """UserError unless there is a message to answer; the template checks them one by one."""
    last = messages[-1].get("role") if messages and isinstance(messages[-1], dict) else None
    if last not in ("user", "tool"):
        raise UserError(f"the last message has the role {last}; what can be answered is one of the user")


def _of_answers(observe: Watcher, starts: list[int]) -> generation.Watcher:
    """A watcher of canvases that shows `observe` what is behind each prompt."""

    def watch(index, tokens_L, step_L, step):
        observe(index, tokens_L[starts[index] :], step_L[starts[index] :], step)

    return watch


def fitted(options: Options, room: int) -> Options:
    """A mask predictor's options for `room` open positions: blocks, and steps per block, stay while they fit."""
    length = min(options.gen_length, room)
    steps = _one_per_token(options) if options.steps is None else options.steps
    if length == options.gen_length:
        return options._replace(steps=steps)
    K = options.gen_length if options.block_length is None else options.block_length
    steps_per_block = steps // -(-options.gen_length // K)
    K = min(K, length)
    return options._replace(gen_length=length, block_length=K, steps=min(steps_per_block, K) * -(-length // K))


def _one_per_token(options: Options) -> int:
    """Steps where none are given: one per token, in as many a block where the blocks are not all full."""
    K = options.gen_length if options.block_length is None else options.block_length
    if K < 1 or options.gen_length < 1:
        return options.gen_length
    blocks = -(-options.gen_length // K)
    return options.gen_length if options.gen_length % blocks == 0 else blocks * K


def template_source(value: str, flag: str) -> tuple[str, str]:
    """The Jinja source that `flag` names, plain, llada or a file, and what errors call it. UserError if unreadable."""
    if value in BUILT_IN:
        return builtin(value), f"the {value} template"
    return json_files.read_text(readable_file(value, flag), name=f"{flag}={value}"), value
