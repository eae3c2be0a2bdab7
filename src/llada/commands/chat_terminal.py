"""`llada chat` in a terminal: lines that can be edited, a spinner or the denoising while the model writes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llada.commands import endings
from llada.commands.chat_session import COMMANDS, Line, Quit, Session, as_json, parse
from llada.errors import UserError
from llada.inference import replay
from llada.inference.chat import Reply, Watcher

_WATCHABLE_SECONDS = 3.0  # a small model writes faster than anybody can see
_HISTORY_LINES = 1000


def talk(session: Session, watch: bool, json: bool, history: Path | None) -> int:
    """Read and answer until the user ends it; returns the exit status."""
    console = Console(highlight=False)
    _show(console, "/help lists what can be set; Ctrl-D ends", "dim")
    interrupted = False
    with _line_editing(history):
        while True:
            try:
                line = parse(_read(console))
                interrupted = False
                if line.command or line.text.strip():
                    _take(session, line, console, watch, json)
            except (EOFError, Quit):
                return 0
            except KeyboardInterrupt:
                if interrupted:
                    return 0
                interrupted = True
                _show(console, "\nCtrl-C again, Ctrl-D or /quit ends", "dim")
            except UserError as error:
                _show(console, str(error), "red")


def _take(session: Session, line: Line, console: Console, watch: bool, json: bool) -> None:
    """Do what a line says. UserError for what a user can fix; a reply that is interrupted leaves no trace."""
    try:
        if line.command:
            return _show(console, session.run(line), "cyan")
        reply = _reply(session, line.text, console, watch)
    except KeyboardInterrupt:
        return _show(console, "stopped; the dialogue is as before", "dim")
    except Exception as error:
        known = endings.as_user_error(error, "llada chat ran")
        if known is None or isinstance(error, Quit):
            raise
        raise known from error
    if json:
        print(as_json(reply), flush=True)
        return None
    _show(console, reply.text or "(an empty answer)", "" if reply.text else "dim", whole_lines=True)
    return _show(console, _figures(session, reply), "dim")


def _reply(session: Session, text: str, console: Console, watch: bool) -> Reply:
    """The reply, with a spinner, or the canvas if it is watched, until it is there."""
    messages = session.asked(text)
    steps = session.chat.total_steps(messages, session.options)
    with contextlib.ExitStack() as until_there:
        status = console.status("compiling")
        until_there.callback(status.stop)
        status.start()
        drawn: list[Watcher] = []

        def draw(index, tokens_A, step_A, step):
            if not watch:
                return status.update(f"step {step + 1} of {steps}")
            if not drawn:
                status.stop()
                drawn.append(_watcher(session, steps, console, until_there))
            return drawn[0](index, tokens_A, step_A, step)

        return session.watched_reply(messages, draw)


def _watcher(session: Session, steps: int, console: Console, until_there: contextlib.ExitStack) -> Watcher:
    """A watcher that draws the answer in place, slowly enough to see."""
    run = session.chat.run
    watch = replay.Watch(run.tokenizer, run.tokenizer.mask_id, steps, console, leave=False)
    draw = replay.paced(until_there.enter_context(watch), steps, _WATCHABLE_SECONDS)

    def on_step(index, tokens_A, step_A, step):
        # An ARM has no masks: what it has not written is not there yet.
        shown = int((step_A >= 0).sum()) if run.config.model.causal else len(tokens_A)
        draw(tokens_A[:shown], step_A[:shown], step)

    return on_step


def _figures(session: Session, reply: Reply) -> str:
    """What a reply took, and what the context did to it."""
    ended = "" if reply.finish_reason == "stop" else ", not ended"
    facts = [f"{reply.completion_tokens} tokens{ended}", f"{reply.forward_passes} passes", f"{reply.seconds:.1f} s"]
    if session.dropped:
        facts.append(f"the oldest {session.dropped} messages are forgotten")
    if reply.gen_length < session.options.gen_length:
        facts.append(f"the context left {reply.gen_length} tokens: /reset begins a new dialogue")
    return " · ".join(facts)


def _show(console: Console, text: str, style: str, whole_lines: bool = False) -> None:
    """Print a text of whatever origin, in which nothing can act; `whole_lines` are the terminal's to wrap."""
    console.print(Text(replay.displayable(text), style), soft_wrap=whole_lines)


def _read(console: Console) -> str:
    """What is typed, over several lines where each but the last ends in a backslash."""
    lines = [_input(console, "> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_input(console, ". "))
    return "\n".join(lines)


def _input(console: Console, mark: str) -> str:
    """A line. Its mark is coloured in the brackets by which readline knows what takes no room."""
    coloured = console.color_system is not None and not console.no_color and not console.is_dumb_terminal
    try:
        return input(f"\001\x1b[1;36m\002{mark}\001\x1b[0m\002" if coloured else mark)
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} of the line is not {error.encoding}; type it again") from error


@contextlib.contextmanager
def _line_editing(history: Path | None) -> Iterator[None]:
    """Editing keys, earlier lines by the arrows, /commands by the tabulator; lines of other days from `history`."""
    try:
        import readline
    except ImportError:  # a Python built without it
        yield
        return
    readline.set_history_length(_HISTORY_LINES)
    readline.set_completer_delims("")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    try:
        if history is not None and history.exists():
            readline.read_history_file(history)
        yield
    finally:
        if history is not None:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def _complete(text: str, state: int) -> str | None:
    """The command number `state` that begins as typed."""
    names = [f"/{name} ".rstrip() for name in COMMANDS if text.startswith("/") and f"/{name}".startswith(text)]
    return names[state] if state < len(names) else None
