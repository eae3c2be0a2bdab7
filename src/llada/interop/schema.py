"""What the formats' config.json files have in common."""

from typing import Any, NamedTuple

from llada.errors import UserError

# The format of the files written here: what transformers of this version would write, and later ones read.
TRANSFORMERS_VERSION = "4.57.6"

_NOTHING = object()


class Special(NamedTuple):
    """Ids that a config.json names."""

    mask: int
    eos: int
    pad: int
    eot: int | None = None


def field(values: dict[str, Any], name: str, kind: type, default: Any = _NOTHING) -> Any:
    """`values[name]`, which must be a `kind` (or null, where `default` is None). UserError naming the field."""
    value = values.get(name, default)
    if value is _NOTHING:
        raise UserError(f"config.json lacks {name}")
    if value is None and default is None:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"config.json has {name}={value!r}; it must be {kind.__name__}")
    return value
