"""What `llada chat` does wherever its lines come from: a dialogue, its settings and /commands; and lines of a pipe."""

import sys
import threading
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from llada import json_files
from llada.errors import UserError
from llada.files import write_atomically
from llada.inference.chat import Chat, Message, Options, Reply, Watcher
from llada.paths import writable_target

# /name, what follows it, what it does. Besides them every field of `Options` is a command under its own name.
COMMANDS = {
    "help": ("", "this list"),
    "length": ("N", "tokens of a reply, at most"),
    "blocks": ("N", "fill block by block of N tokens, left to right"),
    "steps": ("N", "steps of the reverse process"),
    "temperature": ("X", "0: most likely tokens; 1: the model's own distribution"),
    "eos": ("RULE", "end tokens: keep, no_logits: never, no_confidence: last"),
    "seed": ("N", "of the sampling noise"),
    "system": ("TEXT", "what the dialogue begins with; without TEXT: nothing"),
    "reset": ("", "forget the dialogue, but for the system message"),
    "save": ("FILE", "write the dialogue; --config.data.source=dialogues:FILE reads it"),
    "quit": ("", "end"),
}
_FIELDS = {"length": "gen_length", "blocks": "block_length"}
_PATIENCE_SECONDS = 2.0
_SUFFIXES = (".json", ".jsonl")


class Quit(Exception):
    """The user has had enough."""


class Stopped(Exception):
    """The user does not want this reply any more."""


class Line(NamedTuple):
    """What a line is: a /command with its argument, or (command "") a turn of the user."""

    command: str
    text: str


def parse(line: str) -> Line:
    """A line as it was typed: "/steps 8" is a command, "//steps" the text "/steps"."""
    if line.startswith("//"):
        return Line("", line[1:])
    if not line.startswith("/"):
        return Line("", line)
    name, _, argument = line[1:].strip().partition(" ")
    return Line(name or "help", argument.strip())


class Session:
    """A dialogue and the options of its replies; both change only where nothing is wrong."""

    def __init__(self, chat: Chat, options: Options, system: str | None, trim: bool):
        """`trim`: the oldest turns are dropped where the context is full. UserError for a system message it refuses."""
        self.chat, self.options, self._defaults, self._trim = chat, options, options, trim
        self.messages: list[Message] = []
        self.dropped = 0  # messages that the context had no room for at the last question
        self._set_system(system)

    def asked(self, text: str) -> list[Message]:
        """The dialogue with a further turn of the user, shortened if that was asked for. UserError if unanswerable."""
        messages = [*self.messages, {"role": "user", "content": text}]
        fitting = self.chat.trimmed(messages, self.options) if self._trim else messages
        self.chat.check(fitting, self.options)
        self.dropped = len(messages) - len(fitting)
        return fitting

    def reply(self, messages: list[Message]) -> Reply:
        """The reply to `asked` messages, which becomes part of the dialogue."""
        return self._take(messages, self.chat.reply([messages], [self.options])[0])

    def watched_reply(self, messages: list[Message], watcher: Watcher) -> Reply:
        """The same, with `watcher` called after each step. Ctrl-C ends the reply and leaves no trace.

        The model runs on a thread of its own: Python handles signals on the main one, between its own instructions.
        JAX does not cache watched programs on disk, which is why `reply` has one of its own.
        """
        stop, done = threading.Event(), threading.Event()
        outcome: list[Reply | BaseException] = []

        def watch(*state):
            if stop.is_set():
                raise Stopped
            watcher(*state)

        def work():
            try:
                outcome.append(self.chat.reply([messages], [self.options], watch)[0])
            except BaseException as error:  # raised below, on the main thread
                outcome.append(error)
            finally:
                done.set()

        threading.Thread(target=work, name="model", daemon=True).start()
        try:
            done.wait()
        except KeyboardInterrupt:
            stop.set()
            # For the present step. The compiler cannot be stopped, but it need not be waited for.
            done.wait(_PATIENCE_SECONDS)
            raise
        reply = outcome[0]
        if isinstance(reply, BaseException):
            raise reply
        return self._take(messages, reply)

    def _take(self, messages: list[Message], reply: Reply) -> Reply:
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        return reply

    def run(self, line: Line) -> str:
        """Do what a /command says; returns what to show. UserError for what cannot be done, Quit for /quit."""
        name, text = _FIELDS.get(line.command, line.command), line.text
        if name in Options._fields:
            return self._set(name, text) if text else f"{name} is {_shown(getattr(self.options, name))}"
        if name not in COMMANDS:
            raise UserError(f"there is no /{line.command}; there are /{', /'.join(COMMANDS)}")
        if text and not COMMANDS[name][0]:
            raise UserError(f"/{name} takes no value, and {text!r} is given")
        if name == "quit":
            raise Quit
        if name == "help":
            return self._help()
        if name == "save":
            return self._save(text)
        if name == "system":
            return self._set_system(text or None)
        self.messages = self._system()
        return "a new dialogue"

    def _system(self) -> list[Message]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _set_system(self, text: str | None) -> str:
        system = [] if text is None else [{"role": "system", "content": text}]
        self.chat.check([*system, {"role": "user", "content": "?"}], self.options)
        self.messages = [*system, *self.messages[len(self._system()) :]]
        return "no system message" if text is None else f"the dialogue begins with: {text}"

    def _set(self, name: str, text: str) -> str:
        """Set an option, if the model can follow it together with the others."""
        value = getattr(self._defaults, name) if text == "default" else _parsed(name, text)
        options = self.options._replace(**{name: value})
        self.chat.check_options(options)
        self.options = options
        return f"{name} is {_shown(value)}"

    def _help(self) -> str:
        lines = [f"  {f'/{name} {argument}':<16}{meaning}" for name, (argument, meaning) in COMMANDS.items()]
        others = [name for name in Options._fields if name not in COMMANDS and name not in _FIELDS.values()]
        given = {name: value for name, value in self.options._asdict().items() if value is not None}
        return "\n".join(
            [
                *lines,
                f"  and /{', /'.join(others)}",
                "  Without a value the present one is shown; `default` is a value for each.",
                "  A backslash at the end of a line continues it; // begins a text with a slash.",
                f"now: {', '.join(f'{name} {value}' for name, value in given.items())}; the others at their defaults",
            ]
        )

    def _save(self, name: str) -> str:
        """Write the dialogue, without turns that have no answer: training could not read them."""
        if not name:
            raise UserError("/save needs a file: /save FILE.json")
        path = writable_target(name, "/save")
        if path.suffix.lower() not in _SUFFIXES:
            raise UserError(
                f"/save {name}: the name must end in {' or '.join(_SUFFIXES)}, as readers of dialogues expect"
            )
        system = self._system()
        rest = self.messages[len(system) :]
        turns = list(zip(rest[::2], rest[1::2], strict=True))
        answered = [turn for turn in turns if turn[1]["content"].strip()]
        if not answered:
            raise UserError("there is no answer to save yet")
        messages = [*system, *(message for turn in answered for message in turn)]
        write_atomically(path, (json_files.dumps({"messages": messages}) + "\n").encode())
        left_out = len(turns) - len(answered)
        return f"{len(messages)} messages in {path}" + (f"; {left_out} empty answers left out" if left_out else "")


def _parsed(name: str, text: str) -> Any:
    """The value of an option from text. UserError for text that is no such value."""
    kind = Options.__annotations__[name]
    kind = next(iter(typing.get_args(kind)), kind)
    try:
        return kind(text)
    except ValueError:
        word = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"/{name} {text}: {text!r} is not {word}") from None


def _shown(value: object) -> str:
    return "the default" if value is None else str(value)


def as_json(reply: Reply) -> str:
    """A reply as a line of JSON, without its prompt."""
    fields = reply._asdict()
    del fields["canvas"]
    return json_files.dumps(fields | {"step": reply.step[reply.prompt_tokens :]})


def answer_lines(session: Session, shown: Callable[[Reply], str]) -> int:
    """Answer each line of standard input on standard output. UserError naming the line for what cannot be answered."""
    for number, content in enumerate(sys.stdin.buffer, 1):
        try:
            line = parse(_decoded(content))
            if line.command:
                print(session.run(line), file=sys.stderr)
            elif line.text.strip():
                print(shown(session.reply(session.asked(line.text))), flush=True)
        except UserError as error:
            raise type(error)(f"line {number}: {error}") from error
        except Quit:
            break
    return 0


def _decoded(content: bytes) -> str:
    """A line of a pipe without its end. UserError for what is no UTF-8."""
    try:
        return content.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} is not UTF-8; convert the input") from error
