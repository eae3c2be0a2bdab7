"""What the formats' config.json files have in common."""

import math
from typing import Any, NamedTuple

from llada.errors import UserError

# The format of the files written here: what transformers of this version would write, and later ones read.
TRANSFORMERS_VERSION = "4.57.6"

# In the workdir of an import: the source's own config.json, which an export hands on where it still holds.
SOURCE_CONFIG = "source_config.json"

_NOTHING = object()


# Sizes and ids are counts of things that exist: nothing near this is one, and arithmetic with more may go wrong.
_MOST = 2**31 - 1


class Special(NamedTuple):
    """Ids that a config.json names; `start` is what rows of an ARM begin after."""

    mask: int | None
    eos: int
    pad: int
    eot: int | None = None
    bos: int | None = None

    @property
    def start(self) -> int:
        """The token that a text of an ARM begins after."""
        return self.eos if self.bos is None else self.bos


def field(values: dict[str, Any], name: str, kind: type, default: Any = _NOTHING) -> Any:
    """`values[name]`, which must be a `kind` in range; `default` where it is null or missing. UserError naming it."""
    value = values.get(name)
    if value is None and default is not _NOTHING:
        return default
    if name not in values:
        raise UserError(f"config.json lacks {name}")
    if kind is float and type(value) is int:
        value = float(min(max(value, -_MOST), _MOST))
    if type(value) is not kind:
        raise UserError(f"config.json has {name}={_short(value)}; it must be {kind.__name__}")
    if kind is int and abs(value) > _MOST or kind is float and not math.isfinite(value):
        raise UserError(f"config.json has {name}={_short(value)}, which is out of range")
    return value


def token_ids(values: dict[str, Any], name: str) -> list[int]:
    """The ids under `name`: one, several in a list, or none (missing, null, -1 in old files). UserError otherwise."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token > _MOST for token in ids):
        raise UserError(f"config.json has {name}={_short(value)}; it must be a token id or a list of them")
    return [token for token in ids if token >= 0]


def first_ids(values: dict[str, Any], roles: tuple[str, ...]) -> dict[str, int]:
    """Role to the first id of `<role>_token_id`, where there is one. Of several ends the others end turns."""
    found = {role: token_ids(values, f"{role}_token_id") for role in roles}
    return {role: ids[0] for role, ids in found.items() if ids}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
