"""Dialogues to token ids, through the chat template that travels with a tokenizer.

A template writes control tokens by their names, between texts of people. The texts are shielded before it sees them: a
character that occurs nowhere else breaks whatever spells a control token there, and fences off what could be a piece of
one beside the template's own text. So each name in the rendered text is the template's. The text is split at the names,
and what lies between is encoded as plain text, without the shield: no text can spell a control token, unless a template
takes texts apart and makes one of the pieces.

An answer is what a template writes for an assistant's message behind its own generation prompt: no marks in the
template are needed, and training sees what chat will see.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llada.data.continuation import encode_after
from llada.data.dialogues import joined_parts
from llada.data.jinja_sandbox import NotForThisDialogue, Template
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.objectives.contract import SpecialTokens

ROLES = ("system", "developer", "user", "assistant", "tool")
_FLAG = "--config.dialogues.template"
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd]")
_UNKNOWN = re.compile(r"<\|[^<>|\s]{1,60}\|>")
# Dialogues on which a template is tried, so that it fails before anything is read.
_TRIALS = ([("user", "0")], [("user", "0"), ("assistant", "1")], [("system", "2"), ("user", "0"), ("assistant", "1")])


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as far as an answer begins: as a text, in which people may have spelled control tokens, and as ids.

    after_text  whether text, and no control token, is what the answer follows
    """

    text: str
    ids: list[int]
    after_text: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One answer of a dialogue, and what is before it.

    index  which of the dialogue's answers it is, from 0
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    index: int


class ChatTemplate:
    """A template and the tokenizer that it writes for."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, name: str = "the chat template"):
        """Compile `source`, by default the tokenizer's own; `name` is what errors call it.

        UserError if there is none, if it cannot be used, or if it writes control tokens that the tokenizer lacks.
        """
        source = tokenizer.template if source is None else source
        if source is None:
            raise UserError(f"the tokenizer has no chat template; set {_FLAG} to plain, llada or a file")
        self.source, self._name, self._tokenizer = source, name, tokenizer
        self._template = Template(source, name)
        self._variables = {name: text for name, text in tokenizer.named.items() if isinstance(text, str)}
        # One character cannot be broken: such a token stays text.
        self._controls = {text: token for text, token in tokenizer.controls.items() if len(text) > 1}
        names = "|".join(map(re.escape, sorted(self._controls, key=len, reverse=True)))
        self._split = re.compile(f"({names})" if names else "((?!))")
        # Each place where a name begins, in capitals or not; and "<|", of names that the template might make up.
        begins = {(text[0], re.escape(text[1:])) for text in (*self._controls, "<|")}
        rests = {first: "|".join(rest for at, rest in begins if at == first) for first, _ in begins}
        pattern = "|".join(f"{re.escape(first)}(?={rest})" for first, rest in rests.items())
        self._breakable = re.compile(f"(?i:{pattern})")
        self._pieces = _Pieces(self._controls)
        self._words = self._template.words.union(ROLES)  # fields that it looks up, roles and types that it compares
        self._reserved = set(_PRIVATE.findall(self._template.literals))
        files = getattr(tokenizer, "files", {})
        described = files.get("tokenizer.json", "{}")
        # Of Hugging Face's tokenizers: whether only the first text of all gets a space before it, not each behind a
        # control token; and the control tokens that swallow the spaces on their left or right.
        self._first_text_alone = re.search(r'"prepend_scheme":\s*"first"', described) is not None
        added = json.loads(described).get("added_tokens") or ()
        self._swallowing = {
            side: {each["content"] for each in added if each.get(f"{side}strip")} & set(self._controls) for side in "lr"
        }
        self._short_ids = functools.lru_cache(maxsize=1 << 14)(self._text_ids)
        self._try()

    def prompt_ids(self, messages: Sequence[dict], tools: Any = None) -> list[int]:
        """Ids of the dialogue so far and of whatever begins an answer. UserError if it cannot be rendered."""
        dialogue = _Shielded(self, messages, tools)
        return self._ids(dialogue, dialogue.prompt(len(messages)))

    def rendered(self, messages: Sequence[dict], tools: Any = None) -> Rendered:
        """The dialogue so far and whatever begins an answer. UserError if it cannot be rendered."""
        dialogue = _Shielded(self, messages, tools)
        prompt = dialogue.prompt(len(messages))
        text = prompt.replace(dialogue.shield, "")
        return Rendered(text, self._ids(dialogue, prompt), self._ends_in_text(prompt))

    def _ends_in_text(self, prompt: str) -> bool:
        """Whether a prompt ends in text, and not in a control token."""
        return bool(prompt) and self._split.split(prompt)[-1] != ""

    def answer_ids(self, rendered: Rendered, text: str) -> list[int]:
        """Ids of the plain text that an answer begins with; it spells no control token. [] for no text."""
        place = "text" if rendered.after_text else "token" if rendered.ids else "start"
        return self._text_ids(text, place) if text else []

    def turns(self, messages: Sequence[dict], tools: Any = None) -> list[Turn]:
        """Every answer of a dialogue with its prompt: prompt_ids are `prompt_ids` of the messages before it.

        An answer ends with the first token of the template's that ends a text or a turn, or else with the first control
        token behind its content, or else where the message does. UserError if the dialogue cannot be rendered.
        """
        dialogue = _Shielded(self, messages, tools)
        found: list[Turn] = []
        for k, message in enumerate(dialogue.messages):
            if message["role"] == "assistant":
                prompt = dialogue.prompt(k)
                full = dialogue.render(k + 1, False)
                if not full.startswith(prompt):
                    raise UserError(f"{self._name} does not write an answer after its generation prompt")
                answer = self._until_end(full[len(prompt) :])
                if not self._split.sub("", answer, count=1).strip():  # but for the token that ends it
                    raise UserError(f"{self._name} writes nothing for message {k + 1}, an answer")
                prompt_ids = self._ids(dialogue, prompt)
                answer_ids = self._ids(dialogue, answer, self._ends_in_text(prompt), not prompt)
                found.append(Turn(prompt_ids, answer_ids, len(found)))
        return found

    def _until_end(self, text: str) -> str:
        """The answer that a rendered text begins with."""
        names = list(self._split.finditer(text))
        ends = [match for match in names if self._controls[match[0]] in self._tokenizer.special.ends]
        behind = [match for match in names if match.start() > 0]
        return text[: next((match.end() for match in (*ends, *behind)), len(text))]

    def _try(self) -> None:
        """UserError for control tokens that the tokenizer lacks, and for templates that fail on every trial."""
        failures = []
        for trial in _TRIALS:
            try:
                self.prompt_ids([{"role": role, "content": content} for role, content in trial])
            except NotForThisDialogue as error:
                failures.append(error)
        if len(failures) == len(_TRIALS):
            raise failures[0]

    def _ids(self, dialogue: "_Shielded", text: str, after_text: bool = False, is_start: bool = True) -> list[int]:
        """Ids of a rendered text, which stands at the start, or behind a control token or a text."""
        ids: list[int] = []
        parts = self._split.split(text)
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self._controls[part])
                continue
            if number and parts[number - 1] in self._swallowing["r"]:
                part = part.lstrip()
            if number + 1 < len(parts) and parts[number + 1] in self._swallowing["l"]:
                part = part.rstrip()
            if part:
                for unknown in _UNKNOWN.findall(part):
                    self._require_token(unknown, dialogue.shield)
                part = part.replace(dialogue.shield, "")
                place = "start" if number == 0 and is_start else "text" if number == 0 and after_text else "token"
                ids += (self._short_ids if len(part) <= 40 else dialogue.text_ids)(part, place)
        return ids

    def _text_ids(self, text: str, place: str) -> list[int]:
        """Ids of plain text at the `start`, behind a control `token` or behind other `text`."""
        if place == "text" or (place == "token" and self._first_text_alone):
            return encode_after(self._tokenizer, text)
        return self._tokenizer.encode(text)

    def _require_token(self, name: str, shield: str) -> None:
        if shield not in name and len(self._tokenizer.encode(name)) != 1:  # a token that text can spell, too, is one
            raise UserError(
                f"{self._name} writes {name}, which the tokenizer has no token for; set {_FLAG} to another template"
            )

    def _broken(self, value: Any, shield: str) -> Any:
        """A copy of messages or tools in which no string, nor a piece of one, spells a control token."""
        if isinstance(value, str):
            before, after = self._pieces.reach(value.strip())
            broken = self._breakable.sub(rf"\g<0>{shield}", value)
            if before or after:  # inside of spaces, which templates trim
                text = broken.strip()
                broken = broken.replace(text, f"{shield * before}{text}{shield * after}", 1)
            return broken
        if isinstance(value, dict):
            return {
                key if key in self._words else self._broken(key, shield): each
                if key in ("role", "type") and isinstance(each, str) and each in self._words
                else self._broken(each, shield)
                for key, each in value.items()
            }
        return [self._broken(each, shield) for each in value] if isinstance(value, list | tuple) else value

    def _free_character(self, texts: Iterable[str]) -> str:
        """A private-use character that neither the texts nor the template hold."""
        taken = self._reserved.union(*(_PRIVATE.findall(text) for text in texts))
        for code in itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)):
            if chr(code) not in taken:
                return chr(code)
        raise UserError("the dialogue holds every private-use character of Unicode, which no text does")


class _Pieces:
    """The beginnings, ends and middles of names."""

    def __init__(self, names: Iterable[str]):
        names = list(names)
        self._length = max(map(len, names), default=0)
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._ends = {name[start:] for name in names for start in range(1, len(name))}
        self._first, self._last = {name[0] for name in names}, {name[-1] for name in names}
        self._all = "\n".join(names)

    def reach(self, text: str) -> tuple[bool, bool]:
        """Whether text before `text`, and text after it, could make it part of a name."""
        if len(text) < self._length and text in self._all:
            return bool(text), bool(text)
        head, tail = text[: self._length], text[-self._length :]
        before = any(each in self._last and head[: i + 1] in self._ends for i, each in enumerate(head))
        after = any(each in self._first and tail[i:] in self._beginnings for i, each in enumerate(tail))
        return before, after


class _Shielded:
    """A dialogue as the template sees it, and its renders."""

    def __init__(self, template: ChatTemplate, messages: Sequence[dict], tools: Any):
        self._template = template
        messages = [_as_text(message, number) for number, message in enumerate(messages, 1)]
        texts = list(_strings([messages, tools]))
        self.shield = template._free_character(texts)
        self._characters = sum(map(len, texts))
        self.messages: list[dict] = template._broken(messages, self.shield)
        self._tools = template._broken(tools, self.shield)
        self.text_ids = functools.cache(template._text_ids)  # turns share their history

    def prompt(self, count: int) -> str:
        """The first messages rendered with the generation prompt."""
        prompt = self.render(count, True)
        return prompt if "add_generation_prompt" in self._template._template.mentions else prompt + self._header(count)

    def _header(self, count: int) -> str:
        """What a template that has no generation prompt writes before an answer, whatever the answer; not spaces."""
        before = self.render(count, False)
        try:
            written = [self.render(count, False, [{"role": "assistant", "content": each}]) for each in "01"]
        except NotForThisDialogue:  # nor is any answer: it ends with one
            return ""
        if not all(text.startswith(before) for text in written):
            return ""
        one, other = (text[len(before) :] for text in written)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        header = "".join(pair[0] for pair in same)
        return header if header.strip() else ""

    def render(self, count: int, add_generation_prompt: bool, more: Sequence[dict] = ()) -> str:
        """The first messages, and `more`, as the template writes them, shields included."""
        variables = self._template._variables | {
            "messages": [*self.messages[:count], *more],
            "tools": self._tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._template._template.render(variables, self._characters, count + len(more), self.shield)


def drop_start(ids: list[int], special: SpecialTokens, causal: bool) -> list[int]:
    """Ids without the token that a `causal` model reads before every text anyway."""
    return ids[1:] if causal and ids[:1] == [special.start] else ids


def _as_text(message: Any, number: int) -> dict:
    """A message whose content is text. UserError naming its number for what no template is given."""
    if not isinstance(message, dict):
        raise UserError(f"message {number} is no object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") not in ROLES:
        raise UserError(f"message {number} has the role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = joined_parts(content, f"message {number}")
    if not isinstance(content, str | None):
        raise UserError(f"message {number} has a content that is no text but {type(content).__name__}")
    return message if content is None else message | {"content": content}


def _strings(value: Any) -> Iterator[str]:
    """Every string of a value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value:
            yield from _strings(each)
        yield from _strings(list(value.values())) if isinstance(value, dict) else ()
