"""The `llada` program: finds the command, parses its flags, and ends a user's mistake with one line and a status.

Slow modules are imported where they are used: until `start` has run, Ctrl-C would end in a traceback.
"""

import difflib
import importlib
import sys
from types import ModuleType

from llada.commands import endings
from llada.errors import UserError

COMMANDS = {
    "train": "pre-train a model; continues from the checkpoint in the workdir, if there is one",
    "evaluate": "held-out bound (LLaDA) or NLL (ARM), with its standard error",
    "likelihood": "log p(answer | prompt): a bound with its standard error (LLaDA), or exact (ARM)",
    "lm_eval": "tasks of lm-evaluation-harness, at one checkpoint or at all, and scores against FLOPs",
    "sample": "text from a trained model: continue a prompt or fill gaps",
    "chat": "a dialogue with a tuned model: in the terminal, from a pipe, or over HTTP",
    "export": "a checkpoint as a Hugging Face directory, for PyTorch",
    "import": "a Hugging Face directory (LLaDA-8B, Llama ...) as a workdir",
    "plan": "memory, FLOPs and time of a program on a TPU slice, compiled on any machine",
    "sweep": "a grid of runs at fixed FLOP budgets: scaling-law fits, plots, report",
    "tokenize": "a corpus as ArrayRecord shards of rows, with a manifest; resumable, by many processes",
    "data": "what a run reads: rows as text, lengths, duplicates; all of it verified",
    "verify": "all that a workdir holds, read and compared with what was saved",
    "reproduce": "a run trained again from its workdir alone, and compared bit for bit",
    "compare": "curves and a report of a LLaDA and an ARM trained alike",
}
_HELP = ("-h", "--help", "-help")


def start() -> int:
    """Run the program as a process of its own; returns the exit status."""
    endings.open_streams()
    return endings.run(main)


def main(argv: list[str] | None = None) -> int:
    """Run `llada COMMAND --flags`; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in (*_HELP, "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-version"):
        print(_versions())
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UserError(_no_command(name))
        return _call(name, importlib.import_module(f"llada.commands.{name}"), rest)
    except KeyboardInterrupt:
        print(f"llada {name}: interrupted", file=sys.stderr)
        return endings.INTERRUPTED
    except Exception as error:
        known = endings.as_user_error(error, f"llada {name} ran")
        if known is None:
            raise
        print(f"llada{f' {name}' if name in COMMANDS else ''}: {_one_line(str(known))}", file=sys.stderr)
        return known.status


def _call(name: str, command: ModuleType, words: list[str]) -> int:
    """Parse the words after the command's name, and run it."""
    import inspect

    from llada.commands import environment, experiment
    from llada.commands.command_flags import CommandFlags

    takes_overrides = bool(inspect.signature(command.run).parameters)
    if any(word in _HELP for word in words):
        print(f"{command.__doc__}\n\nflags:\n{command.__name__}:\n{command.FLAGS.help_text()}")
        return 0
    # All commands have --help_config, and --config if only to refuse it.
    known = command.FLAGS if "config" in command.FLAGS else CommandFlags(command.FLAGS, experiment.FLAGS)
    words, overrides = experiment.take_overrides(words)
    keys = _config_keys(name) if takes_overrides else []
    known.parse(name, words, lambda flag: _no_flag(flag, name, list(known), keys))
    if experiment.HELP_CONFIG.value:
        print(experiment.help_config(_groups(name)))
        return 0
    if overrides and not takes_overrides:
        raise UserError(f"--config.{next(iter(overrides))} belongs to llada train; a workdir keeps its own config")
    environment.pin_jax_settings()
    environment.use_compilation_cache()
    return command.run(overrides) if takes_overrides else command.run()


def _no_command(name: str) -> str:
    """The message for a command that does not exist."""
    if name.startswith("-"):
        return f"{name}: the command comes first, as in llada train --workdir=DIR; commands: {', '.join(COMMANDS)}"
    hint = _did_you_mean(name, list(COMMANDS)) or ";"
    return f"there is no command {name!r}{hint} commands: {', '.join(COMMANDS)}"


def _no_flag(flag: str, command: str, flags: list[str], keys: list[str]) -> str:
    """The message for a flag that the command does not have; `keys` are the config keys that it takes."""
    same = [f"--config.{key}" for key in keys if flag in (key, key.rpartition(".")[2])]
    hint = f"; did you mean {' or '.join(same)}?" if same else _did_you_mean(flag, flags, "--") or ";"
    return f"--{flag} is no flag of llada {command}{hint} see llada {command} --help"


def _did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _config_keys(command: str) -> list[str]:
    from llada import knobs

    return [key.name for prefix, cls in _groups(command).items() for key in knobs.keys(cls, prefix)]


def _groups(command: str) -> dict[str, type]:
    """The dataclasses whose keys the command's --config.KEY can set, by the prefix of their names."""
    from llada.config import Config, MeshConfig

    if command in ("train", "import", "plan"):
        return {"": Config}
    if command != "sweep":
        return {"mesh.": MeshConfig}
    from llada.scaling.sweep_config import SweepConfig

    return {"": Config, "sweep.": SweepConfig}


def _one_line(text: str) -> str:
    """The text with its lines joined, and characters that would control or confuse a terminal escaped."""
    import re

    joined = re.sub(r"\s*[\r\n\v\f\x85\u2028\u2029]+\s*", " ", text.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in joined)


def _versions() -> str:
    import platform

    names = {"llada": "llada-jax", **{name: name for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")}}
    parts = [f"{name} {_version(package)}" for name, package in names.items()]
    return f"{', '.join(parts)}; Python {platform.python_version()} on {platform.platform()}"


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _usage() -> str:
    commands = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    return f"""llada COMMAND --flags

{commands}

llada COMMAND --help lists the flags, llada train --help_config the keys of --config.KEY=VALUE; llada --version"""
