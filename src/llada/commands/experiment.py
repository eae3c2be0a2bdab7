"""From `--config=FILE[:ARGUMENT] --config.key=value ...` to a checked Config.

ml_collections' own flag would do this with a traceback for every slip of the keyboard; here each gets its line.
An experiment file is Python and is executed.
"""

import contextlib
import dataclasses
import runpy
import types
import typing
from pathlib import Path
from typing import Any

from absl import flags

from llada import config as config_lib
from llada.config import Config
from llada.errors import UserError

CONFIG = flags.DEFINE_string("config", None, "experiment file, FILE or FILE:ARGUMENT; --config.key=value changes a key")


def take_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split `--config.key=value` (or `--config.key value`) off a command line: the rest, and {key: value}."""
    rest, overrides = [], {}
    words = iter(arguments)
    for word in words:
        name = word.lstrip("-")
        if not (word.startswith("-") and name.startswith("config.")):
            rest.append(word)
            continue
        key, equals, value = name.removeprefix("config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise UserError(f"{word} needs a value: {word}=...")
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
    return override_sweep(_merged(config_lib.default_config().to_dict(), values), dict(group), overrides)


def override_sweep(
    base: dict[str, Any], group: dict[str, Any], overrides: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`base` and the group `sweep` with some keys changed; values are checked where they are used."""
    from llada.scaling.grid import SweepConfig

    own = {key.removeprefix("sweep."): text for key, text in overrides.items() if key.startswith("sweep.")}
    _put(group, own, SweepConfig, "sweep.")
    _put(base, {key: text for key, text in overrides.items() if not key.startswith("sweep.")}, Config)
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
                raise UserError(f"unknown config key config.{key}; config.{'.'.join(groups)} is a value, not a group")
        node[leaf] = _parse(text, _annotation(key, root), prefix + key)


def _call(experiment: str) -> dict[str, Any]:
    name, colon, argument = experiment.partition(":")
    path = Path(name)
    if not path.is_file():
        there = ", ".join(sorted(str(p) for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
        raise UserError(f"--config={experiment}: there is no file {path}" + (f"; there are {there}" if there else ""))
    try:
        module = runpy.run_path(str(path))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--config={experiment}: {path} is not a Python experiment file ({error})") from error
    if "get_config" not in module:
        raise UserError(f"--config={experiment}: {path} defines no get_config(argument)")
    values = module["get_config"](argument) if colon else module["get_config"]()
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


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
        fields = {f.name: f.type for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
        if part not in fields:
            return None
        node = fields[part]
    return node


def _parse(text: str, annotation, key: str):
    if annotation is None or dataclasses.is_dataclass(annotation):
        return text
    if isinstance(annotation, types.UnionType):
        if text == "None":
            return None
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    try:
        if annotation is tuple:
            return tuple(_number_or_word(word) for word in text.strip("()[]").split(",") if word.strip())
        if annotation is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if annotation is int:
            # 1e6 is how people write a million; 1.5 is a mistake.
            return int(text) if "e" not in text.lower() else _whole(float(text))
        return annotation(text)
    except (ValueError, KeyError) as error:
        kind = {bool: "True or False", int: "a whole number", float: "a number"}[annotation]
        raise UserError(f"--config.{key}={text} is not {kind}") from error


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text.strip()


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)
