"""Config keys that say what they are: a dataclass's fields with meaning and limits, and values coming in for them."""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from llada.errors import UserError


class Knob(NamedTuple):
    """What a key is for and what it may be: numbers with above < x, least <= x, x < below, x <= most, or `choices`.

    changeable    a later call on the same workdir may give another value: it alters how long and how the run is
                  executed, not which model it is or what it sees at a given step
    """

    meaning: str = ""
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    changeable: bool = False

    @property
    def limits(self) -> str:
        """What is allowed, in words: "positive", "in [0, 1)", "positive and at most 131,072"; empty where all is."""
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
        """The rule that `value` breaks, in words; None where it breaks none."""
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
    """A field of a config dataclass, with its `Knob`; a mutable default is copied for every instance."""
    found = {"knob": Knob(meaning, **limits)}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=found)
    return dataclasses.field(default=default, metadata=found)


class Key(NamedTuple):
    """A dotted key of a config dataclass, and what is known of it."""

    name: str
    annotation: Any
    default: Any
    knob: Knob


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key that holds a value, groups in the order of their declaration."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            yield Key(prefix + field.name, field.type, default, field.metadata.get("knob", Knob()))


def build(cls: type, values: dict, path: str, root: type | None = None):
    """A config dataclass from nested dicts; `path` names it in the UserError for an unknown key or a wrong type.

    `root` is the dataclass that all groups belong to, for advice on a key of another group (default `cls`).
    """
    root = root or cls
    fields = {field.name: field for field in dataclasses.fields(cls)}
    out = {}
    for key, value in values.items():
        if key not in fields:
            hint = _meant(str(key), cls, path, root)
            raise UserError(f"unknown config key {path}.{key}; {hint}known keys of {path}: {', '.join(sorted(fields))}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{path}.{key}={value!r} must be a group of keys, not one value")
            out[key] = build(kind, value, f"{path}.{key}", root)
        elif isinstance(value, str) and scalar(kind) is not str:
            raise UserError(f"--{path}.{key}={_cut(value)!r} is a str; it must be {named(kind)}")
        else:
            out[key] = coerce(value, kind, f"--{path}.{key}")
    return cls(**out)


def _meant(key: str, cls: type, path: str, root: type) -> str:
    """`did you mean ...? `, or nothing: a name of this group like it, else the same name, or one like it, elsewhere."""
    if close := difflib.get_close_matches(key, [field.name for field in dataclasses.fields(cls)], n=1):
        return f"did you mean --{path}.{close[0]}? "
    top = path.partition(".")[0]
    everywhere = [found.name for found in keys(root)]
    leaf = key.rpartition(".")[2]
    same = [name for name in everywhere if name.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in everywhere], n=1, cutoff=0.75)
    same = same or [name for name in everywhere if close and name.rpartition(".")[2] == close[0]]
    return f"did you mean {' or '.join(f'--{top}.{name}' for name in same)}? " if same else ""


def check(config: Any, path: str) -> None:
    """UserError for the first value, of all keys, that breaks its knob's limits."""
    for key in keys(type(config)):
        value = config
        for part in key.name.split("."):
            value = getattr(value, part)
        if (rule := key.knob.broken(value)) is not None:
            raise UserError(f"--{path}.{key.name}={_cut(str(value))}: {rule}")


def scalar(annotation: Any) -> Any:
    """`int` from `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def coerce(given: Any, annotation: Any, name: str) -> Any:
    """A value of the kind that `annotation` names, from text as people type it or from a value of a file.

    `annotation` is bool, int, float, str, tuple or dict, alone or "| None". UserError naming `name` ("--config.seed")
    and what it must be. Text: 1e6 is a whole number, 1.5 none; True, false, 1, 0; None where None may be; tuples are
    numbers and words between commas.
    """
    wanted = scalar(annotation)
    optional = wanted is not annotation
    if optional and (given is None or given == "None" or (wanted is not str and given == "none")):
        return None
    if isinstance(given, str):
        return given if wanted is str else _parse(given, wanted, name)
    is_bool = isinstance(given, bool) or type(given).__name__ == "bool"
    try:
        if wanted is int and isinstance(given, numbers.Integral) and not is_bool:
            return int(given)
        if wanted is float and isinstance(given, numbers.Real) and not is_bool:
            return float(given)
    except OverflowError as error:
        raise UserError(f"{name}={_cut(str(given))} is too large a number") from error
    if wanted is tuple and isinstance(given, list):
        return tuple(given)
    if type(given) is not wanted:
        raise UserError(f"{name}={_cut(repr(given))} is a {type(given).__name__}; it must be {named(annotation)}")
    return given


def _parse(text: str, wanted: Any, name: str) -> Any:
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if wanted is int:
            return _whole(text)
        if wanted is float:
            return float(text)
        if wanted is tuple:
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
    raise UserError(f"{name}={_cut(text)} is not {rule[wanted]}")


def _whole(text: str) -> int:
    """1e6 is how people write a million; 1.5 is a mistake."""
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
