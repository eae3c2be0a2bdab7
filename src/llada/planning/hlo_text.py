"""The text of a compiled program, as XLA prints an optimised module: computations and their instructions.

Only syntax is read here; what instructions do is read in `hlo.py`. A line of a computation is

    ROOT %name = shape opcode(%operand, ...), attribute=value, ..., metadata={op_name="path in the source"}
"""

import functools
import math
import re
from typing import NamedTuple

BYTES: dict[str, float] = {
    **dict.fromkeys(("token",), 0),
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
FLOATS = ("bf16", "f16", "f32", "f8e4m3fn", "f8e5m2")

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?(%[^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[^\s=]+) = ")
_NAME = re.compile(r"%[\w.\-]+")
_CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")


class Array(NamedTuple):
    """One array of a shape; `fast` where it lies in on-chip memory instead of HBM."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> float:
        """Without padding; 0 for a type that is not in BYTES."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line; `attributes` is the rest of it, unread."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result."""
        return _arrays(self.shape)

    @property
    def path(self) -> str:
        """Where in the source it came from, as JAX names it."""
        return first(r'op_name="([^"]*)"', self.attributes) or ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 where it makes none."""
        return int(first(r'"estimated_cycles":"(\d+)"', self.attributes) or 0)

    @property
    def element(self) -> int:
        """Of a get-tuple-element: which element."""
        return int(first(r"index=(\d+)", self.attributes) or 0)

    def called(self, kind: str) -> list[str]:
        """Computations in the attribute `kind`: calls, body, condition, branch_computations."""
        return [name for key, text in _CALLED.findall(self.attributes) if key == kind for name in _NAME.findall(text)]

    @property
    def callees(self) -> list[str]:
        """Computations that it runs once: of a fusion, a call, or the start of either on another thread."""
        runs = self.opcode in ("call", "call-start", "async-start")
        return self.called("calls") + (self.called("to_apply") if runs else [])


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions of each computation in the order of the schedule, name of the entry computation)."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_instruction(line, match))
    return computations, entry


def integers(text: str) -> tuple[int, ...]:
    """(1, 2) of "1,2"."""
    return tuple(int(word) for word in text.split(",") if word)


def first(pattern: str, text: str) -> str | None:
    """The first group of the first match; None where there is none."""
    match = re.search(pattern, text)
    return match[1] if match else None


def _instruction(line: str, start: re.Match) -> Instruction:
    rest = line[start.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest) - 1
    arguments, attributes = rest[:close], rest[close + 1 :]
    return Instruction(
        start[2], shape, opcode, tuple(_NAME.findall(arguments)), arguments, attributes, root=bool(start[1])
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that `text` begins with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"parentheses do not close: {text[:80]}")


@functools.lru_cache(maxsize=50_000)
def _arrays(shape: str) -> list[Array]:
    return [
        # S(5) is the host's memory, any other S(n) memory on the chip.
        Array(dtype, integers(dims), "S(" in layout and "S(5)" not in layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]
