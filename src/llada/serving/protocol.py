"""What clients of OpenAI's chat completions send and expect, and our extensions to it.

A field that would change the reply and that we cannot honour is refused, unless it has the value that changes nothing:
a client that asks for top_p=0.9 shall not believe that it got it. null is as good as absent.
"""

import difflib
import json
import math
import re
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from llada import json_files
from llada.data.tokenizer import Tokenizer, unicode_text
from llada.errors import UserError
from llada.inference.chat import Options, Reply
from llada.inference.generation import BATCH
from llada.inference.replay import displayable, pieces
from llada.serving.queue import Frame

MOST_STOPS = 16

# Fields of Options, by the names that clients use; the first two are OpenAI's old and new name for one thing.
_OPTIONS = {"max_tokens": "gen_length", "max_completion_tokens": "gen_length"} | {
    name: name for name in Options._fields if name != "gen_length"
}
_OTHERS = ("model", "messages", "n", "stop", "stream", "stream_options", "stream_canvas")
# They say who asks, or how to bill: no reply depends on them.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")
# Fields of OpenAI that are not served, and the values of theirs that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
# What the messages of replies carry besides role and content, all of it empty in ours.
_EMPTY_IN_MESSAGES = ("refusal", "annotations", "audio", "function_call", "tool_calls")


class ApiError(Exception):
    """A request that gets no reply: status of HTTP, a reason for people, and the field to change."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        """`code` is a word for programs; `headers` go with the answer."""
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Asked(NamedTuple):
    """A request for chat completions, checked; `options` has one entry for each of its n choices."""

    messages: list[dict]
    options: list[Options]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    canvas: bool


def read_request(content: bytes, model: str, defaults: Options, seed: int) -> Asked:
    """Read the body of a request; `seed` is for those that name none. ApiError for what cannot be served as asked."""
    try:
        body = json_files.parse(content, "the body")
    except UserError as error:
        raise ApiError(str(error)) from error
    fields = {name: value for name, value in body.items() if value is not None}
    _check_fields(fields)
    _check_model(fields, model)
    stream = _typed(fields, "stream", bool, False)
    if "stream_options" in fields and not stream:
        raise ApiError("stream_options is for stream=true", "stream_options")
    canvas = _typed(fields, "stream_canvas", bool, False)
    if canvas and not stream:
        raise ApiError("stream_canvas is for stream=true", "stream_canvas")
    n = _typed(fields, "n", int, 1)
    if not 1 <= n <= BATCH:
        raise ApiError(f"n={n} must be between 1 and {BATCH}", "n")
    options = _options(fields, defaults)
    first = options.seed if "seed" in fields else seed
    return Asked(
        _messages(fields),
        [options._replace(seed=first + i) for i in range(n)],
        _stops(fields.get("stop")),
        stream,
        _include_usage(fields),
        canvas,
    )


def of_user_error(error: UserError) -> ApiError:
    """A mistake in a prompt or an option, in words of the protocol: options are named by fields, not by flags."""
    message = str(error).replace("--gen_length", "--max_tokens")
    # The engine's advice is for the terminal.
    message = re.sub("; /reset .*", "; leave out its oldest messages, or start a new one", message)
    flag = re.search(r"--(\w+)=", message)
    return ApiError(re.sub(r"--(?=\w)", "", message), flag and flag[1])


def _check_fields(fields: dict[str, Any]) -> None:
    known = (*_OTHERS, *_OPTIONS, *_IGNORED)
    for name, value in fields.items():
        if name in known:
            continue
        if name not in _NEUTRAL:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; fields: {', '.join((*_OTHERS, *_OPTIONS))}"
            raise ApiError(f"there is no field {_short(name)}{hint}", name[:100], code="unknown_parameter")
        # Python's False is 0, and its True is 1.
        if not any(value == it and isinstance(value, bool) == isinstance(it, bool) for it in _NEUTRAL[name]):
            raise ApiError(
                f"{name} is not served: it would be ignored; leave it out, or give {json.dumps(_NEUTRAL[name][0])}",
                name,
                code="unsupported_parameter",
            )


def _check_model(fields: dict[str, Any], model: str) -> None:
    asked = _typed(fields, "model", str, model)
    if asked != model:
        message = f"there is no model {_short(asked)} here; this server has {model!r}"
        raise ApiError(message, "model", status=404, code="model_not_found")


def _options(fields: dict[str, Any], defaults: Options) -> Options:
    lengths = [_typed(fields, name, int) for name in ("max_tokens", "max_completion_tokens") if name in fields]
    if len({*lengths}) > 1:
        raise ApiError("max_tokens and max_completion_tokens are one thing and differ; give one", "max_tokens")
    chosen = {}
    for name, field in _OPTIONS.items():
        annotation = Options.__annotations__[field]
        if (value := _typed(fields, name, (typing.get_args(annotation) or (annotation,))[0])) is not None:
            chosen[field] = value
    return defaults._replace(**chosen)


def _messages(fields: dict[str, Any]) -> list[dict]:
    """The messages with their contents as text; what roles there are, the chat's template says."""
    messages = _typed(fields, "messages", list)
    if not messages:
        raise ApiError('messages is missing; give [{"role": "user", "content": "..."}]', "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict:
    if not isinstance(message, dict):
        raise ApiError(f"{place} must be an object with role and content, not {_short(message)}", place)
    for name, value in message.items():
        if name not in ("role", "content") and not (name in _EMPTY_IN_MESSAGES and not value):
            raise ApiError(f"{place} has {_short(name)}, which is not served; a message has role and content", place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ApiError(f"{place}.role must be text: system, user or assistant", f"{place}.role")
    if isinstance(content, list):  # the newer form: a list of parts
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise ApiError(f'{place}.content may have parts {{"type": "text", "text": ...}} only', f"{place}.content")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ApiError(f"{place}.content must be text", f"{place}.content")
    return {"role": "system" if role == "developer" else role, "content": _unicode(content, f"{place}.content")}


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if value is None or value == []:
        return ()
    if not 1 <= len(stops) <= MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(f"stop must be a text, or a list of at most {MOST_STOPS} texts, none of them empty", "stop")
    return tuple(_unicode(stop, "stop") for stop in stops)


def _include_usage(fields: dict[str, Any]) -> bool:
    options = _typed(fields, "stream_options", dict, {})
    for name in options:
        if name != "include_usage" and options[name] not in (None, False):
            raise ApiError(f"stream_options has {_short(name)}; include_usage is all there is", "stream_options")
    return _typed({k: v for k, v in options.items() if v is not None}, "include_usage", bool, False)


def _typed(fields: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """The value of a field, of the type that it must have; `default` where it is absent."""
    value = fields.get(name)
    if value is None:
        return default
    whole = isinstance(value, float) and kind is int and value.is_integer()
    number = isinstance(value, int) and kind is float and abs(value) < 1 << 53
    if isinstance(value, bool) != (kind is bool) or not (isinstance(value, kind) or whole or number):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
        raise ApiError(f"{name} must be {words.get(kind, 'an object')}, not {_short(value)}", name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ApiError(f"{name} must be a finite number, not {value}", name)
    return _unicode(value, name) if kind is str else kind(value)


def _unicode(text: str, name: str) -> str:
    try:
        return unicode_text(text, name)
    except UserError as error:
        raise ApiError(str(error), name) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- what is sent ----------------------------------------------------------------------------------------------------


class Heading(NamedTuple):
    """What every object about one request begins with."""

    id: str
    created: int
    model: str

    def completion(self, choices: list[dict], usage: dict, figures: dict) -> dict:
        """The answer to a request that does not stream; `figures` is what OpenAI's has not."""
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        return head | {"choices": choices, "usage": usage, "llada": figures}

    def chunk(self, choices: list[dict], **more: Any) -> dict:
        """One event of a stream."""
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return head | {"choices": choices} | more


def choice(index: int, text: str, finish_reason: str) -> dict:
    """One of the n replies of a request."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


def delta(index: int, content: dict, finish_reason: str | None = None) -> dict:
    """What a stream adds to one of the n replies."""
    return {"index": index, "delta": content, "logprobs": None, "finish_reason": finish_reason}


def usage(replies: Sequence[Reply]) -> dict:
    """Tokens of a request: its prompt once, and all that was written."""
    prompt, written = replies[0].prompt_tokens, sum(reply.completion_tokens for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def figures(replies: Sequence[Reply], options: Sequence[Options]) -> dict:
    """What a reply of a diffusion model has besides: passes and seconds of its batch, and the seeds of the choices."""
    first = replies[0]
    seeds = [option.seed for option in options]
    return {"forward_passes": first.forward_passes, "seconds": round(first.seconds, 6), "seeds": seeds}


def canvas(index: int, frame: Frame, tokenizer: Tokenizer) -> dict:
    """A step as an event's field: the canvas of choice `index`, piece by piece.

    `steps[i]` is the step that wrote `pieces[i]`, null where that is still masked, its piece empty. `end` is the first
    position with an end token, null if there is none: the reply is what comes before.
    """
    texts = pieces(tokenizer, frame.ids_A)
    steps = [int(step) if step >= 0 else None for step in frame.step_A]
    shown = [displayable(text) if step is not None else "" for text, step in zip(texts, steps, strict=True)]
    ends = (i for i, token in enumerate(frame.ids_A) if steps[i] is not None and token in tokenizer.special.ends)
    return {"index": index, "step": frame.step, "pieces": shown, "steps": steps, "end": next(ends, None)}


def encoded(value: dict) -> bytes:
    """A JSON object as it is sent. Half a surrogate pair that a client has sent comes back escaped."""
    return json_files.dumps(value).encode("utf-8", "backslashreplace")
