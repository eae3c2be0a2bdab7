"""A source: dialogues from files of records, in the formats that people have them in, told apart by their fields.

  messages                       [{"role": ..., "content": ...}, ...]; tools beside it, tool_calls within it
  prompt, completion (response)  two strings, or two lists of messages
  instruction, input, output     Alpaca; system and history ([[question, answer], ...]) beside it
  conversations                  ShareGPT: [{"from": "human", "value": ...}, ...]; system and tools beside it

One file holds one format. A dialogue is a system message, or none, then a user's, then answers and questions in turn;
what tools return stands between two messages of the assistant.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llada.data import patterns, text_files
from llada.errors import UserError

PREFIX = "dialogues:"
_FLAG = "--config.data.source"
_ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_ALIASES |= {
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "developer": "system",
}
_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_FORMATS = (
    ("messages", ("messages",)),
    ("conversations", ("conversations",)),
    ("prompt and completion", ("prompt", "completion")),
    ("prompt and response", ("prompt", "response")),
    ("instruction and output", ("instruction", "output")),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages with role and content, as templates take them, and where they are from.

    tools  what the record says of tools, None without
    label  the record's task or category, "" without
    place  "FILE line N", for errors
    """

    messages: list[dict]
    tools: list | None
    label: str
    place: str


def is_dialogues(source: str) -> bool:
    """Whether a source is "dialogues:GLOB[,GLOB ...]"."""
    return source.startswith(PREFIX)


def read(argument: str, remark: Callable[[str], None] = lambda line: None, flag: str = _FLAG) -> Iterator[Dialogue]:
    """Yield every dialogue of the files that match "GLOB[,GLOB ...]", in the order of their names.

    `remark` is called with a line on what was left out, `flag` is what errors call the source. UserError naming file
    and record for the first one that is no dialogue, when its turn comes, and where there are none at all.
    """
    files = patterns.files(argument, flag)
    count = 0
    for count, dialogue in enumerate(patterns.read(files, _dialogues_of, remark), 1):  # noqa: B007
        yield dialogue
    if not count:
        raise UserError(f"the {len(files)} files matching {argument!r} hold no dialogue; check {flag}={PREFIX}GLOB")


def documents(argument: str, text_key: str, remark: Callable[[str], None], flag: str) -> tuple[Iterator[str], str]:
    """The texts of all dialogues, for those who want documents. The arguments are those of `sources.SOURCES`."""
    return map(text_of, read(argument, remark, flag)), f"no dialogue in {flag}={PREFIX}{argument} has any text"


def text_of(dialogue: Dialogue) -> str:
    """All contents, each on lines of its own: what a tokenizer can learn from."""
    return "\n".join(message["content"] for message in dialogue.messages if message.get("content"))


def key(dialogue: Dialogue) -> str:
    """The messages as one string, the same for the same messages: by it a dialogue is held out or not."""
    return json.dumps(dialogue.messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def joined_parts(parts: list, place: str) -> str:
    """Text of a content in parts. UserError naming the place for a part that is no text."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{place} has a part of type {kind!r}; only text is understood")
    return "".join(part["text"] for part in parts)


def _dialogues_of(path: Path) -> Iterator[Dialogue]:
    first: tuple[str, str] | None = None
    for place, record in text_files.records(path):
        name = _format(record, place)
        first = first or (name, place)
        if name != first[0]:
            raise UserError(
                f"{place} is of {name}, and {first[1].removeprefix(f'{path} ')} of {first[0]}: one file holds one "
                "format; split it"
            )
        yield _dialogue(record, name, place)


def _format(record: Any, place: str) -> str:
    """Which of _FORMATS a record is of. UserError for none."""
    fields = {name for name, value in record.items() if value is not None} if isinstance(record, dict) else set()
    found = next((name for name, needed in _FORMATS if fields.issuperset(needed)), None)
    if found is None:
        has = f"its fields are {', '.join(sorted(map(str, fields))[:20])}" if fields else "it has no fields"
        raise UserError(
            f"{place} is no dialogue: {has}; needed are messages, prompt and completion (or response), instruction "
            f"and output, or conversations; check {_FLAG}={PREFIX}GLOB"
        )
    return found


def _dialogue(record: dict, name: str, place: str) -> Dialogue:
    record = {field: value for field, value in record.items() if value is not None}
    if name in ("messages", "conversations"):
        messages = _listed(record[name], f"{place}: {name}")
    elif name == "instruction and output":
        messages = _alpaca(record, place)
    else:
        second = name.split()[-1]
        messages = _side(record["prompt"], "user", f"{place}: prompt")
        messages = messages + _side(record[second], "assistant", f"{place}: {second}")
    if (system := record.get("system")) and name != "messages":
        messages = [{"role": "system", "content": system}, *messages]
    messages = [_message(message, f"{place}: message {number}") for number, message in enumerate(messages, 1)]
    _check_order(messages, place)
    label = next((record[field] for field in ("task", "category") if isinstance(record.get(field), str)), "")
    dialogue = Dialogue(messages, _tools(record.get("tools"), place), label, place)
    try:
        key(dialogue).encode()
        json.dumps([dialogue.tools, label], ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        # JSON may spell half of a surrogate pair, and Parquet hold values that JSON has not.
        what = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else f"what is no JSON ({error})"
        raise UserError(f"{place} holds {what}; check {_FLAG}") from error
    return dialogue


def _alpaca(record: dict, place: str) -> list[dict]:
    history = record.get("history", [])
    pairs = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)
    if not isinstance(history, list | tuple) or not pairs:
        raise UserError(f"{place}: history must be a list of pairs, [[question, answer], ...]")
    question = record["instruction"]
    if more := record.get("input"):
        if not isinstance(question, str) or not isinstance(more, str):
            raise UserError(f"{place}: instruction and input must be text")
        question = f"{question}\n\n{more}"
    turns = [*history, (question, record["output"])]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _side(value: Any, role: str, place: str) -> list[dict]:
    """Messages of a prompt or completion."""
    return _listed(value, place) if isinstance(value, list) else [{"role": role, "content": value}]


def _listed(value: Any, place: str) -> list[dict]:
    if not (isinstance(value, list | tuple) and value and all(isinstance(each, dict) for each in value)):
        raise UserError(f"{place} must be a list of messages, each with role and content")
    return list(value)


def _message(message: dict, place: str) -> dict:
    """A message with a role of ours, and a content that is text. UserError for any other."""
    message = {field: value for field, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in _FOLLOWERS or role is None:
        allowed = ", ".join(each for each in _FOLLOWERS if each)
        raise UserError(f"{place} has the role {role!r}; roles are {allowed}")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""  # as many templates need one
    if isinstance(content, list):
        content = joined_parts(content, place)
    if not isinstance(content, str):
        raise UserError(f"{place} has no content that is text, but {type(content).__name__}")
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise UserError(f"{place} is an empty answer; leave the record out, or give its answer")
    return message | {"role": role, "content": content}


def _check_order(messages: list[dict], place: str) -> None:
    """UserError for roles that do not follow each other so, and for a dialogue without an answer."""
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _FOLLOWERS[before]:
            after = f"follows {before}" if before else "comes first"
            raise UserError(
                f"{place}: message {number} is of the role {role}, and {after}, where only "
                f"{' or '.join(_FOLLOWERS[before])} may stand"
            )
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place} has no answer: none of its messages is of the role assistant")


def _tools(value: Any, place: str) -> list | None:
    """Tools as templates take them: a list of objects, which some files hold as JSON in a string."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: tools is no JSON ({error})") from error
    if not value:
        return None
    if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise UserError(f"{place}: tools must be a list of objects")
    return value
