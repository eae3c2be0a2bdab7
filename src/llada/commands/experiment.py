"""From `--config=FILE[:ARGUMENT] --config.key=value ...` to a checked Config.

An experiment file is Python, and is executed. With ml_collections' own config flag a mistyped key ends in a
traceback; here it gets one line.
"""

import dataclasses
import difflib
import inspect
import runpy
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llada import config as config_lib
from llada import knobs, paths
from llada.commands.command_flags import CommandFlags
from llada.config import Config
from llada.errors import UserError

FLAGS = CommandFlags()
CONFIG = FLAGS.define_string("config", None, "experiment file, FILE or FILE:ARGUMENT; --config.key=value changes a key")
HELP_CONFIG = FLAGS.define_bool("help_config", False, "list every config key with kind, default and meaning, and stop")


def take_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split `--config.key=value` (or `--config.key value`) off a command line: the rest, and {key: value}.

    If a key is given twice the last value counts, as scripts rely on, and a line says so. UserError for an override
    without a key or a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name = word.lstrip("-")
        if not (word.startswith("-") and name.startswith("config.")):
            rest.append(word)
            continue
        key, equals, value = name.removeprefix("config.").partition("=")
        if not all(part.strip() for part in key.split(".")):
            raise UserError(f"{word} names no key; keys look like --config.train.steps=100; --help_config lists them")
        if not equals:
            value = next(words, "--")
            if value.startswith("--") or value == "=":
                raise UserError(f"{word} needs a value: {word}=... without spaces")
        if key in overrides:
            print(f"llada: --config.{key} is given twice; {value} counts, not {overrides[key]}", file=sys.stderr)
        overrides[key] = value
    return rest, overrides


def read(
    experiment: str | None, overrides: dict[str, str], change: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Config:
    """The experiment with its overrides. UserError for a bad file, argument, key or value.

    `change` may replace values before the overrides do.
    """
    if not experiment:
        raise UserError("--config is missing; for example --config=experiments/quickstart.py:llada")
    values = _call(experiment)
    if "sweep" in values:
        raise UserError(f"--config={experiment} describes a sweep, many runs; use llada sweep --config={experiment}")
    tree = _merged(config_lib.default_config().to_dict(), values)
    return override(change(tree) if change else tree, overrides)


def read_sweep(experiment: str, overrides: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep's experiment with its overrides: the config keys that all runs share, and the group `sweep`."""
    values = _call(experiment)
    if "sweep" not in values:
        raise UserError(f"--config={experiment} has no group `sweep`; use llada train, or see experiments/isoflop.py")
    group = values.pop("sweep")
    if not isinstance(group, dict):
        raise UserError(f"--config={experiment}: config.sweep={group!r} must be a group of keys, not one value")
    return override_sweep(_merged(config_lib.default_config().to_dict(), values), group, overrides)


def override_sweep(
    base: dict[str, Any], group: dict[str, Any], overrides: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`base` and the group `sweep` with some keys changed; values are checked where they are used."""
    from llada.scaling.sweep_config import SweepConfig

    sweep_keys = {field.name for field in dataclasses.fields(SweepConfig)}
    of_sweep, of_config = {}, {}
    for key, text in overrides.items():
        if key == "sweep":
            raise UserError(f"config.sweep={text!r} must be a group of keys, not one value")
        if key.startswith("sweep."):
            of_sweep[key.removeprefix("sweep.")] = text
        elif key.partition(".")[0] in sweep_keys:
            raise UserError(f"unknown config key config.{key}; did you mean --config.sweep.{key}?")
        else:
            of_config[key] = text
    _put(group, of_sweep, SweepConfig, "sweep.")
    _put(base, of_config, Config)
    return base, group


def override(tree: dict[str, Any], overrides: dict[str, str]) -> Config:
    """A nested dict of all keys with some of them changed. UserError for a bad key or value."""
    _put(tree, overrides, Config)
    # They exclude each other: one on the command line cancels the others of the file.
    lengths = ("steps", "tokens", "epochs")
    if any(f"train.{name}" in overrides for name in lengths):
        tree["train"] |= {name: None for name in lengths if f"train.{name}" not in overrides}
    return config_lib.from_config_dict(tree)


def _put(tree: dict[str, Any], overrides: dict[str, str], root: type, prefix: str = "") -> None:
    """Write the values into `tree`, typed as `root` declares; an unknown key stays text, to be refused when checked."""
    annotations = {key.name: key.annotation for key in knobs.keys(root)}
    for key, text in overrides.items():
        group, _, leaf = key.rpartition(".")
        node = tree
        for name in group.split(".") if group else ():
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(
                    f"unknown config key config.{prefix}{key}; config.{prefix}{group} is a value, not a group"
                )
        # The values of a dict, like sweep.tokens_per_parameter.diffusion, are tuples.
        annotation = tuple if annotations.get(group) is dict else annotations.get(key)
        node[leaf] = text if annotation is None else knobs.coerce(text, annotation, f"--config.{prefix}{key}")


def _call(experiment: str) -> dict[str, Any]:
    """The result of the file's get_config, as plain dicts. UserError naming file and line for any error in it."""
    path, argument = _file_and_argument(experiment)
    flag = f"--config={experiment}"
    try:
        module = runpy.run_path(str(path))
        function = module.get("get_config")
        if not callable(function):
            raise UserError(f"{flag}: {path} defines no get_config(argument)")
        arguments = [] if argument is None else [argument]
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError as error:
            rule = f"takes no argument; leave out :{argument}" if arguments else "needs an argument: FILE:ARGUMENT"
            raise UserError(f"{flag}: get_config of {path} {rule}") from error
        values = _plain(function(*arguments))
    except UserError:
        raise
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path} is not a Python experiment file ({error})") from error
    except (Exception, SystemExit) as error:  # whatever the user's own code raises is the user's to fix
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path} line {lines[-1]}" if lines else str(path)
        raise UserError(f"{flag}: {where}: {type(error).__name__}: {str(error)[:500]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{flag}: get_config of {path} returned {values!r:.80}; it must return a ConfigDict")
    return values


def _file_and_argument(experiment: str) -> tuple[Path, str | None]:
    """Split at the last colon that has an existing file before it. UserError if there is none."""
    unsplit = paths.user_path(experiment, "--config")
    for colon in [len(experiment), *(i for i in reversed(range(len(experiment))) if experiment[i] == ":")]:
        if experiment[:colon] and (path := paths.user_path(experiment[:colon], "--config")).is_file():
            return path, experiment[colon + 1 :] if colon < len(experiment) else None
    path = paths.user_path(experiment.partition(":")[0], "--config") if ":" in experiment[1:] else unsplit
    folder, problem = path.parent, f"there is no file {path}"
    if path.is_dir():
        folder, problem = path, f"{path} is a directory"
    elif path.exists():
        problem = f"{path} is no regular file"
    files = sorted(folder.glob("*.py")) if folder.is_dir() else []
    # The most alike first: of many files the one that was meant may not be among the first twelve.
    files.sort(key=lambda file: -difflib.SequenceMatcher(None, file.name, path.name).ratio())
    experiments = [str(file) for file in files[:12]]
    hint = f"; there are {', '.join(experiments)}" if experiments else ""
    raise UserError(f"--config={experiment}: {problem}{hint}")


def _plain(values: Any) -> Any:
    """ConfigDicts and other mappings as dicts, recursively."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    return {key: _plain(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _merged(defaults: dict, values: dict) -> dict:
    """`defaults` updated with `values`, recursively; unknown keys stay, to be refused when the config is checked."""
    out = dict(defaults)
    for key, value in values.items():
        both_groups = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both_groups else value
    return out


def help_config(groups: dict[str, type]) -> str:
    """All keys of some dataclasses, by the prefix of each ("" or "sweep."): kind, default, meaning, what is allowed."""
    keys = [key for prefix, cls in groups.items() for key in knobs.keys(cls, prefix)]
    left = max(len(key.name) for key in keys) + 2
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    first = "--config.KEY=VALUE; a later call on the same workdir may change + at will, * from its next step on"
    lines = [first, ""]
    before = ""
    for key in keys:
        group = key.name.rpartition(".")[0]
        if group != before:
            lines.append("")
        before = group
        mark = "+" if key.knob.changeable else "*" if key.knob.recorded else " "
        value = f'"{key.default}"' if isinstance(key.default, str) else key.default
        limits = "" if key.knob.choices and key.knob.limits in key.knob.meaning else key.knob.limits
        text = "; ".join(filter(None, (key.knob.meaning, limits)))
        kind = f"{knobs.named(key.annotation)} = {value}"
        lines += textwrap.wrap(
            f"{kind}: {text}" if text else kind,
            width,
            initial_indent=f"{mark} {key.name:<{left}}",
            subsequent_indent=" " * (left + 4),
        )
    return "\n".join(lines)
