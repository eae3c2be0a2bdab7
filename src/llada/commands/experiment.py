"""From `--config=FILE[:ARGUMENT] --config.key=value ...` to a checked Config.

ml_collections' own flag would do this with a traceback for every slip of the keyboard; here each gets its line.
An experiment file is Python and is executed.
"""

import dataclasses
import inspect
import runpy
import shutil
import sys
import textwrap
import traceback
from collections.abc import Mapping
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

    Of a key that is given twice the last value counts, and a line says so. UserError for one without name or value.
    """
    rest, overrides = [], {}
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
            value = next(words, None)
            if value is None or value.startswith("--") or value == "=":
                raise UserError(f"{word} needs a value: {word}=... without spaces")
        if key in overrides:
            # How scripts change what they were given: their words come last.
            print(f"llada: --config.{key} is given twice; {value} counts, not {overrides[key]}", file=sys.stderr)
        overrides[key] = value
    return rest, overrides


def read(experiment: str | None, overrides: dict[str, str]) -> Config:
    """The experiment with its overrides. UserError for a bad file, argument, key or value."""
    if not experiment:
        raise UserError("--config is missing; for example --config=experiments/quickstart.py:llada")
    values = _call(experiment)
    if "sweep" in values:
        raise UserError(f"--config={experiment} describes a sweep, many runs; use llada sweep --config={experiment}")
    return override(_merged(config_lib.default_config().to_dict(), values), overrides)


def read_sweep(experiment: str, overrides: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep's experiment with its overrides: all config keys that do not vary, and the group `sweep`."""
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

    rules = {field.name for field in dataclasses.fields(SweepConfig)}
    own, others = {}, {}
    for key, text in overrides.items():
        if key == "sweep":
            raise UserError(f"config.sweep={text!r} must be a group of keys, not one value")
        if key.startswith("sweep."):
            own[key.removeprefix("sweep.")] = text
        elif key.partition(".")[0] in rules:
            raise UserError(f"unknown config key config.{key}; did you mean --config.sweep.{key}?")
        else:
            others[key] = text
    _put(group, own, SweepConfig, "sweep.")
    _put(base, others, Config)
    return base, group


def override(tree: dict[str, Any], overrides: dict[str, str]) -> Config:
    """A nested dict of all keys with some of them changed. UserError for a bad key or value."""
    _put(tree, overrides, Config)
    # Steps and tokens exclude each other; naming one on the command line takes back the file's other.
    for given, other in (("steps", "tokens"), ("tokens", "steps")):
        if f"train.{given}" in overrides and f"train.{other}" not in overrides:
            tree["train"][other] = None
    return config_lib.from_config_dict(tree)


def _put(tree: dict[str, Any], overrides: dict[str, str], root: type, prefix: str = "") -> None:
    for key, text in overrides.items():
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                up = prefix + ".".join(groups)
                raise UserError(f"unknown config key config.{prefix}{key}; config.{up} is a value, not a group")
        kind = _annotation(key, root)
        # What is no key stays text, for the border to refuse.
        known = kind is not None and not dataclasses.is_dataclass(kind)
        node[leaf] = knobs.coerce(text, kind, f"--config.{prefix}{key}") if known else text


def _call(experiment: str) -> dict[str, Any]:
    """What the file's get_config returns, as plain dicts. UserError naming file and line for what goes wrong in it."""
    path, argument = _file_and_argument(experiment)
    flag = f"--config={experiment}"
    try:
        module = runpy.run_path(str(path))
        function = module.get("get_config")
        if not callable(function):
            raise UserError(f"{flag}: {path} defines no get_config(argument)")
        given = [] if argument is None else [argument]
        try:
            inspect.signature(function).bind(*given)
        except TypeError as error:
            how = f"takes no argument; leave out :{argument}" if given else "needs an argument: --config=FILE:ARGUMENT"
            raise UserError(f"{flag}: get_config of {path} {how}") from error
        values = _plain(function(*given))
    except UserError:
        raise
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path} is not a Python experiment file ({error})") from error
    except (Exception, SystemExit) as error:  # whatever the user's own code does is for the user to put right
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path} line {lines[-1]}" if lines else str(path)
        raise UserError(f"{flag}: {where}: {type(error).__name__}: {str(error)[:500]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{flag}: get_config of {path} returned {values!r:.80}; it must return a ConfigDict")
    return values


def _file_and_argument(experiment: str) -> tuple[Path, str | None]:
    """Split at a colon, so that a file is left of it. UserError where there is none."""
    whole = paths.user_path(experiment, "--config")
    for colon in [len(experiment), *(i for i in reversed(range(len(experiment))) if experiment[i] == ":")]:
        if experiment[:colon] and (path := paths.user_path(experiment[:colon], "--config")).is_file():
            return path, experiment[colon + 1 :] if colon < len(experiment) else None
    path = paths.user_path(experiment.partition(":")[0], "--config") if ":" in experiment[1:] else whole
    folder = path if path.is_dir() else path.parent
    there = sorted(str(p) for p in folder.glob("*.py"))[:12] if folder.is_dir() else []
    what = f"{path} is a directory" if path.is_dir() else f"there is no file {path}"
    what = f"{path} is no regular file" if path.exists() and not path.is_dir() else what
    raise UserError(f"--config={experiment}: {what}" + (f"; there are {', '.join(there)}" if there else ""))


def _plain(values: Any) -> Any:
    """ConfigDicts and other mappings as dicts, all the way down."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    return {key: _plain(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _merged(defaults: dict, values: dict) -> dict:
    """`values` over `defaults`, unknown keys kept for the border to refuse."""
    out = dict(defaults)
    for key, value in values.items():
        both_groups = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both_groups else value
    return out


def _annotation(key: str, root: type):
    """The declared type of a dotted key, or None where there is no such key (the border will say so)."""
    node = root
    for part in key.split("."):
        if node is dict:  # such as sweep.tokens_per_parameter.diffusion
            return tuple
        fields = {f.name: f.type for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
        if part not in fields:
            return None
        node = fields[part]
    return node


def help_config(groups: dict[str, type]) -> str:
    """All keys of some dataclasses, by the prefix of each ("" or "sweep."): kind, default, meaning, what is allowed."""
    found = [key for prefix, cls in groups.items() for key in knobs.keys(cls, prefix)]
    left = max(len(key.name) for key in found) + 2
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    lines = ["--config.KEY=VALUE; + may change on a later call for the same workdir, everything else is settled", ""]
    before = ""
    for key in found:
        group = key.name.rpartition(".")[0]
        if group != before:
            lines.append("")
        before = group
        mark = "+" if key.knob.changeable else " "
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
