"""llada chat --workdir=DIR [--system=TEXT] [--gen_length=128 --block_length=32 ...] [--watch] [--json] [--serve[=PORT]]

A dialogue with a model that was tuned to answer. In a terminal: lines can be edited, a backslash at the end of one
continues it, /help lists what can be set, Ctrl-C ends a reply, Ctrl-D the program; --watch draws the masks becoming
words. From a pipe: each line is a turn of the user (or a /command; // is a slash), and standard output has the answers,
with --json one object a line. --serve answers an OpenAI-compatible API, with a page to chat on, instead.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada import processes
from llada.commands import joining, opening, sampling
from llada.commands.command_flags import CommandFlags, required
from llada.errors import UserError
from llada.paths import writable_target

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.inference.chat import Chat, Options

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS, sampling.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train or llada import")
STEP = FLAGS.define_integer("step", None, "checkpoint to talk to; default the latest")
SYSTEM = FLAGS.define_string("system", None, "what the dialogue begins with: a message of the role system")
TEMPLATE = FLAGS.define_string(
    "template", None, "chat template: plain, llada or a Jinja file; default the tokenizer's own"
)
TRIM = FLAGS.define_bool("trim", False, "drop the oldest turns when the context is full, rather than stop")
WATCH = FLAGS.define_bool("watch", False, "draw replies in the terminal while their masks become words")
JSON = FLAGS.define_bool("json", False, "print a line of JSON per reply: text, ids, finish_reason, seconds ...")
HISTORY = FLAGS.define_string("history", None, "file to keep the lines typed in a terminal in; default none")
SERVE = FLAGS.define_optional_integer(
    "serve", 8000, "answer over HTTP at this port, 8000 by default, 0 any free one", lower_bound=0, upper_bound=65535
)
HOST = FLAGS.define_string("host", "127.0.0.1", "address that --serve listens at; by default this machine only")
# Fields of `chat.Options`, each under its name.
OPTIONS = (
    FLAGS.define_integer("gen_length", 128, "tokens of a reply, at most; cut to what the context leaves"),
    *sampling.OPTIONS,
    sampling.SEED,
)


def run(overrides: dict[str, str]) -> int:
    """Talk, or serve, until there is nothing more to answer."""
    workdir = required(WORKDIR, "give a workdir of llada train")
    mesh = opening.mesh(overrides)
    history = None if HISTORY.value is None else writable_target(HISTORY.value, "--history")
    is_typed = sys.stdin.isatty() and sys.stdout.isatty()
    if WATCH.value and (SERVE.value is not None or JSON.value or not is_typed or os.environ.get("TERM") == "dumb"):
        why = "--serve" if SERVE.value is not None else "--json" if JSON.value else "no terminal there"
        raise UserError(f"--watch draws a dialogue in a terminal, and with {why} it cannot; leave it out")
    if HOST.present and SERVE.value is None:
        raise UserError(f"--host={HOST.value} is where --serve listens; give --serve too")
    own = [flag.name for flag in (SYSTEM, TRIM, JSON, HISTORY) if flag.value not in (None, False)]
    if own and SERVE.value is not None:
        raise UserError(f"--{own[0]} is for a dialogue here; with --serve, dialogues come from outside; leave one out")
    joining.join()
    if processes.count() > 1:
        raise UserError(
            f"a dialogue is held by one process, and there are {processes.count()}; run one (--processes=1), with "
            "the model spread over its devices by --config.mesh.*"
        )
    from llada.inference import chat as chat_lib

    opened = opening.open_run(workdir, STEP.value, mesh)
    chat = chat_lib.Chat(opened, TEMPLATE.value)
    given: dict[str, Any] = {flag.name: flag.value for flag in OPTIONS}
    options = chat_lib.Options(**given)
    chat.check_options(options)
    if SERVE.value is not None:
        return _serve(chat, options, Path(workdir).resolve().name)
    from llada.commands import chat_session, chat_terminal
    from llada.inference.replay import displayable

    session = chat_session.Session(chat, options, SYSTEM.value, TRIM.value)
    if is_typed:
        return chat_terminal.talk(session, WATCH.value, JSON.value, history)
    if JSON.value:
        return chat_session.answer_lines(session, chat_session.as_json)
    safe = displayable if sys.stdout.isatty() else str
    return chat_session.answer_lines(session, lambda reply: safe(reply.text))


def _serve(chat: "Chat", options: "Options", model_name: str) -> int:
    """Answer over HTTP until a signal ends it."""
    try:
        from llada.serving.server import serve
    except ImportError as error:
        if (error.name or "llada").startswith("llada"):
            raise
        raise UserError(
            f"--serve needs {error.name}, which is not installed: pip install 'llada-jax[serve]'"
        ) from error

    def ready(url: str) -> None:
        print(f"{model_name} answers at {url}v1/chat/completions; to chat, open {url} (Ctrl-C ends)", flush=True)

    serve(chat, HOST.value, SERVE.value or 0, model_name, options, ready)
    return 0
