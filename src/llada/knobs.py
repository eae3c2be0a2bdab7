"""Config keys: dataclass fields that declare meaning and limits, and the conversion of text and file values to them."""

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from llada.errors import UserError


class Knob(NamedTuple):
    """The meaning of a key and its limits: above < x, least <= x, x < below, x <= most, or one of `choices`.

    changeable    a later call on the same workdir may give another value: it changes how long and how the run is
                  executed, not which model it is or what it sees at a given step
    recorded      a later call may give another value, which holds from its first step on and is recorded (changes.py)
    """

    meaning: str = ""
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    changeable: bool = False
    recorded: bool = False

    @property
    def limits(self) -> str:
        """What is allowed, in words: "positive", "in [0, 1)", "positive and at most 131,072"; empty if anything is."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        upper = self.most if self.below is None else self.below
        if self.least is not None and upper is not None:
            return f"in [{_short(self.least)}, {_short(upper)}{')' if self.most is None else ']'}"
        if self.above is not None and self.below is not None:
            return f"between {_short(self.above)} and {_short(self.below)}"
        low = "positive" if self.above == 0 else "not negative" if self.least == 0 else None
        high = None if self.most is None else f"at most {_short(self.most)}"
        return " and ".join(filter(None, (low, high)))

    def broken(self, value: Any) -> str | None:
        """The rule that `value` breaks, in words; None if it breaks none."""
        if isinstance(value, float) and not math.isfinite(value):
            return "it must be a finite number" + (f", {self.limits}" if self.limits else "")
        if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
            return "it must be Unicode text, without NUL"  # config.json holds it
        if self.choices:
            ok = value is None or value in self.choices
        elif isinstance(value, int | float) and not isinstance(value, bool):
            ok = (self.above is None or value > self.above) and (self.least is None or value >= self.least)
            ok = ok and (self.below is None or value < self.below) and (self.most is None or value <= self.most)
        else:
            ok = True
        return None if ok else f"it must be {self.limits}"


def knob(default: Any, meaning: str, **limits) -> Any:
    """A field of a config dataclass with its `Knob`; a mutable default is copied for every instance."""
    metadata = {"knob": Knob(meaning, **limits)}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Key(NamedTuple):
    """A dotted key of a config dataclass, with its type, default and limits."""

    name: str
    annotation: Any
    default: Any
    knob: Knob


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key that holds a value, in the order of declaration."""
    for field in dataclasses.fields(cls):
        if (group := _group(field.type)) is not None:
            yield from keys(group, f"{prefix}{field.name}.")
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield Key(prefix + field.name, field.type, default, field.metadata.get("knob", Knob()))


def _group(kind: Any) -> type | None:
    """`kind` if it is a dataclass: a group of keys."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def build(cls: type, values: dict, path: str, root: type | None = None) -> Any:
    """A config dataclass from nested dicts. UserError, naming the key under `path`, for an unknown key or a wrong type.

    `root` is the dataclass that holds all groups (default `cls`), to suggest the same key of another group.
    """
    root = root or cls
    fields = {field.name: field for field in dataclasses.fields(cls)}
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            hint = _suggestion(str(key), cls, path, root)
            raise UserError(f"unknown config key {path}.{key}; {hint}known keys of {path}: {', '.join(sorted(fields))}")
        kind = fields[key].type
        if (group := _group(kind)) is not None:
            if not isinstance(value, dict):
                raise UserError(f"{path}.{key}={value!r:.80} must be a group of keys, not one value")
            out[key] = build(group, value, f"{path}.{key}", root)
        elif isinstance(value, str) and scalar(kind) is not str:
            raise UserError(f"--{path}.{key}={_cut(value)!r} is a str; it must be {named(kind)}")
        else:
            out[key] = coerce(value, kind, f"--{path}.{key}")
    return cls(**out)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """The values of a config dataclass as a ConfigDict; None becomes a placeholder of the key's type."""
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = to_config_dict(value)
        else:
            out[field.name] = config_dict.placeholder(scalar(field.type)) if value is None else value
    return out


def _suggestion(key: str, cls: type, path: str, root: type) -> str:
    """`did you mean ...? ` with a similar name of this group, else the same or a similar name of another; or ""."""
    if close := difflib.get_close_matches(key, [field.name for field in dataclasses.fields(cls)], n=1):
        return f"did you mean --{path}.{close[0]}? "
    top = path.partition(".")[0]
    leaves = {known.name: known.name.rpartition(".")[2] for known in keys(root)}
    leaf = key.rpartition(".")[2]
    if leaf not in leaves.values():
        leaf = next(iter(difflib.get_close_matches(leaf, list(leaves.values()), n=1, cutoff=0.75)), leaf)
    same = [f"--{top}.{name}" for name, last in leaves.items() if last == leaf]
    return f"did you mean {' or '.join(same)}? " if same else ""


def value(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def check(config: Any, path: str) -> None:
    """UserError for the first value that breaks its knob's limits."""
    for key in keys(type(config)):
        if (rule := key.knob.broken(found := value(config, key.name))) is not None:
            raise UserError(f"--{path}.{key.name}={_cut(str(found))}: {rule}")


def scalar(annotation: Any) -> Any:
    """`int` from `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def coerce(value: Any, annotation: Any, name: str) -> Any:
    """Text from a command line, or a value from a file, as the type that `annotation` names.

    `annotation` is bool, int, float, str, tuple or dict, alone or "| None". UserError naming `name` ("--config.seed")
    and what is expected. As text: 1e6 is an int, 1.5 is not; bools are True, false, 1, 0; None stands for itself if it
    is allowed; tuples are numbers and words between commas.
    """
    kind = scalar(annotation)
    optional = kind is not annotation
    if optional and (value is None or value == "None" or (kind is not str and value == "none")):
        return None
    if isinstance(value, str):
        return value if kind is str else _parse(value, kind, name)
    is_bool = isinstance(value, bool) or type(value).__name__ == "bool"
    try:
        if kind is int and isinstance(value, numbers.Integral) and not is_bool:
            return int(value)
        if kind is float and isinstance(value, numbers.Real) and not is_bool:
            return float(value)
    except OverflowError as error:
        raise UserError(f"{name}={_cut(str(value))} is too large a number") from error
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not kind:
        raise UserError(f"{name}={_cut(repr(value))} is a {type(value).__name__}; it must be {named(annotation)}")
    return value


def _parse(text: str, kind: Any, name: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if kind is int:
            return _integer(text)
        if kind is float:
            return float(text)
        if kind is tuple:
            return tuple(_number_or_word(word.strip()) for word in text.strip("()[] ").split(",") if word.strip())
    except (ValueError, KeyError, OverflowError):
        pass
    rule = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        tuple: "numbers or words between commas",
        dict: "a group of values; set it in the experiment file",
    }
    raise UserError(f"{name}={_cut(text)} is not {rule[kind]}")


def _integer(text: str) -> int:
    """Also from 1e6, which is how people write a million; ValueError for 1.5."""
    if "e" not in text.lower():
        return int(text)
    value = float(text)
    if value != int(value):
        raise ValueError
    return int(value)


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def named(annotation: Any) -> str:
    """`int or None` for `int | None`."""
    return scalar(annotation).__name__ + (" or None" if scalar(annotation) is not annotation else "")


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _short(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) and limit < 10**12 else f"{limit:g}".replace("e+", "e")
