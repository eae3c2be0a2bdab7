"""Reading a compiled program: computations, instructions, who calls whom and how often, and matrix FLOPs.

The text is what XLA prints of an optimised module. XLA's own cost analysis counts the body of a loop once, so loops are
multiplied out here: a counted loop's turns are read from its condition; turns that depend on data are asked for.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from llada.planning import kernels

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}

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
        """Without padding."""
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
        """The arrays that it makes."""
        return _arrays(self.shape)

    @property
    def path(self) -> str:
        """Where in the source it came from, as JAX names it."""
        return _found(r'op_name="([^"]*)"', self.attributes) or ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 where it makes none."""
        return int(_found(r'"estimated_cycles":"(\d+)"', self.attributes) or 0)

    def called(self, kind: str) -> list[str]:
        """Computations in the attribute `kind`: calls, body, condition, branch_computations."""
        return [name for key, text in _CALLED.findall(self.attributes) if key == kind for name in _NAME.findall(text)]


class Loop(NamedTuple):
    """A loop that was met: its turns each time it is entered, how often it is, and `why` turns are not `counted`."""

    path: str
    turns: float
    entries: float
    counted: bool
    why: str


class Module:
    """A parsed program and how often each of its computations runs.

    `trips(path)` gives (expected turns, why) of loops whose turns depend on data. Kernels are opaque: whether attention
    is `causal` and how many FLOPs a device does per cycle at its peak is told.
    """

    def __init__(
        self,
        text: str,
        trips: Callable[[str], tuple[float, str]] | None = None,
        causal: bool = False,
        flops_per_cycle: float = math.inf,
    ):
        self.causal, self.flops_per_cycle = causal, flops_per_cycle
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._parse(text)
        self.by_name = {name: {i.name: i for i in body} for name, body in self.computations.items()}
        self.loops: list[Loop] = []
        self.executions: dict[str, float] = dict.fromkeys(self.computations, 0.0)
        self.turns: dict[str, float] = {}  # of each while instruction
        self._trips = trips or (lambda path: (1.0, "not known; counted once"))
        self._walk(self.entry, 1.0)

    def _parse(self, text: str) -> None:
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(_instruction(line, found))

    def _walk(self, name: str, times: float) -> None:
        self.executions[name] += times
        for instruction in self.computations[name]:
            if instruction.opcode == "while":
                turns, counted, why = self._turns(name, instruction)
                self.turns[instruction.name] = turns
                self.loops.append(Loop(instruction.path, turns, times, counted, why))
                self._walk(instruction.called("body")[0], times * turns)
            elif instruction.opcode == "conditional":
                # The branch with the most products; branches of one conditional exclude each other.
                branches = instruction.called("branch_computations") or instruction.called("called_computations")
                self._walk(max(branches, key=self.products), times)
            else:
                for called in callees(instruction):
                    self._walk(called, times)

    @functools.cache  # noqa: B019 -- a module lives as long as its report
    def products(self, name: str) -> float:
        """Matrix FLOPs of a computation and all it calls, loop bodies once."""
        total = 0.0
        for instruction in self.computations[name]:
            total += self.flops(name, instruction)
            inner = [*callees(instruction), *instruction.called("body"), *instruction.called("branch_computations")]
            total += sum(self.products(called) for called in inner)
        return total

    def operand(self, computation: str, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that made an operand."""
        return self.by_name[computation].get(instruction.operands[index])

    def _turns(self, computation: str, loop: Instruction) -> tuple[float, bool, str]:
        """(turns, whether they are counted, why if not) of a while loop."""
        if known := _found(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known), True, ""
        condition, body = loop.called("condition")[0], loop.called("body")[0]
        counter, end, inclusive = self._limit(computation, loop, condition)
        start = None if counter is None else self._constant(computation, self._element(computation, loop, counter))
        step = None if counter is None else self._step(body, counter)
        if end is not None and start is not None and step:
            return max(0, math.ceil((end - start + inclusive) / step)), True, ""
        turns, why = self._trips(loop.path)
        # A counter that starts late belongs to a loop whose first turns the compiler wrote out before it.
        return max(0.0, turns - (start or 0)), False, why

    def _limit(self, computation, loop, condition) -> tuple[int | None, int | None, int]:
        """(place of the counter in the loop's tuple, its limit, 1 if inclusive) of a condition counter < limit.

        None for what cannot be read, and for a limit that depends on data.
        """
        root = next((i for i in self.computations[condition] if i.root), None)
        if root is not None and root.opcode == "fusion":
            root = next((i for i in self.computations[root.called("calls")[0]] if i.root), None)
        direction = _found(r"direction=(L[TE])", root.attributes) if root and root.opcode == "compare" else None
        names = self.by_name[condition]
        if direction is None or any(name not in names for name in root.operands):
            return None, None, 0
        left, right = (names[name] for name in root.operands)
        if left.opcode != "get-tuple-element":
            return None, None, 0
        if right.opcode == "get-tuple-element":
            end = self._constant(computation, self._element(computation, loop, _index(right)))
        else:
            end = self._constant(condition, right)
        return _index(left), end, int(direction == "LE")

    def _element(self, computation: str, loop: Instruction, index: int) -> Instruction | None:
        start = self.operand(computation, loop, 0)
        if start is None or start.opcode != "tuple":
            return None
        return self.operand(computation, start, index)

    def _constant(self, computation: str, instruction: Instruction | None) -> int | None:
        """The integer that an instruction always makes, through copies; None if there is no such."""
        while instruction is not None:
            if instruction.opcode == "constant":
                return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
            if instruction.opcode not in (
                "copy",
                "bitcast",
                "convert",
                "copy-done",
                "copy-start",
                "broadcast",
                "reshape",
            ):
                return None
            instruction = self.operand(computation, instruction, 0)
        return None

    def _step(self, body: str, index: int) -> int | None:
        """What a turn adds to the counter: the constant of the addition that makes the next one."""
        root = next(i for i in self.computations[body] if i.root)
        if root.opcode != "tuple":
            return None
        made = self.operand(body, root, index)
        while made is not None and made.opcode in ("copy", "bitcast", "get-tuple-element"):
            made = self.operand(body, made, 0)
        home = body
        if made is not None and made.opcode == "fusion":
            home = made.called("calls")[0]
            made = next((i for i in self.computations[home] if i.root), None)
        if made is None or made.opcode != "add":
            return None
        found = [self._constant(home, self.operand(home, made, k)) for k in range(2)]
        return next((value for value in found if value), None)

    def flops(self, computation: str, instruction: Instruction) -> float:
        """Matrix FLOPs of one execution of an instruction itself: dots, convolutions, declared ones of kernels."""
        if instruction.opcode == "dot":
            left = self.operand(computation, instruction, 0).arrays[0].dims
            contracted = _integers(_found(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes) or "")
            return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[i] for i in contracted)
        if instruction.opcode == "convolution":
            shapes = [self.operand(computation, instruction, k).arrays[0].dims for k in range(2)]
            return _convolution_flops(instruction, *shapes)
        if kernels.is_kernel(instruction.opcode, instruction.attributes):
            shapes = self._operand_shapes(computation, instruction)
            results = len(instruction.arrays)
            return kernels.flops(instruction.name, instruction.attributes, shapes, results, self.causal)
        return 0.0

    def _operand_shapes(self, computation: str, instruction: Instruction) -> list[tuple[int, ...]]:
        """Shapes of the numbers that a kernel works on; integers say which of them."""
        names = self.by_name[computation]
        made = [names[name].arrays[0] for name in instruction.operands if name in names]
        return [array.dims for array in made if array.dtype in FLOATS]

    def cycles(self, name: str) -> float:
        """The compiler's cycles for one execution of a computation, loops multiplied out."""
        return sum(self.instruction_cycles(name, instruction) for instruction in self.computations[name])

    @functools.cache  # noqa: B019
    def instruction_cycles(self, computation: str, instruction: Instruction) -> float:
        """Of one execution of an instruction, with the loops and calls within; of kernels by `kernels.efficiency`."""
        if instruction.opcode == "while":
            return self.turns.get(instruction.name, 0) * self.cycles(instruction.called("body")[0])
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations")
            return max((self.cycles(branch) for branch in branches), default=0.0)
        if instruction.opcode == "call":
            return sum(self.cycles(called) for called in callees(instruction))
        if kernels.is_kernel(instruction.opcode, instruction.attributes) and not instruction.cycles:
            share = kernels.efficiency(instruction.name, self._operand_shapes(computation, instruction))
            return self.flops(computation, instruction) / (self.flops_per_cycle * share)
        return instruction.cycles


def callees(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs once: of a fusion, a call, or the start of either on another thread."""
    runs = instruction.opcode in ("call", "call-start", "async-start")
    return instruction.called("calls") + (instruction.called("to_apply") if runs else [])


def enclosed(module: Module) -> set[str]:
    """Computations that are part of one scheduled instruction: of fusions and of what runs on other threads."""
    todo = [
        called
        for body in module.computations.values()
        for instruction in body
        if instruction.opcode in ("fusion", "call-start", "async-start")
        for called in callees(instruction)
    ]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [called for instruction in module.computations[name] for called in callees(instruction)]
    return found


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """2 x output x input features x the places of the window that meet data: TPUs write most products this way.

    Places in the padding or between dilated elements are not computed, as in a batched product written as a window
    that meets data once.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = _found(r"window=\{([^}]*)\}", instruction.attributes) or ""
    output = instruction.arrays[0].dims
    spatial = sorted(int(label) for label in labels[1] if label.isdigit())

    def per_axis(key: str, default: str) -> list[str]:
        found = _found(rf"(?:^| ){key}=(\S+)", window)
        return found.split("x") if found else [default] * len(spatial)

    meets = 1
    pads, strides = per_axis("pad", "0_0"), per_axis("stride", "1")
    left_gaps, right_gaps = per_axis("lhs_dilate", "1"), per_axis("rhs_dilate", "1")
    for axis in spatial:
        size, kernel = left[labels[1].index(str(axis))], right[labels[2].index(str(axis))]
        places = output[labels[3].index(str(axis))]
        before = int(pads[axis].split("_")[0])
        stride, gap, spread = int(strides[axis]), int(left_gaps[axis]), int(right_gaps[axis])
        meets *= _meetings(size, kernel, places, before, stride, gap, spread)
    batch, features = output[labels[3].index("b")], output[labels[3].index("f")]
    groups = int(_found(r"batch_group_count=(\d+)", instruction.attributes) or 1)
    return 2.0 * batch * features * right[labels[2].index("i")] * meets / groups


@functools.cache
def _meetings(size: int, kernel: int, places: int, before: int, stride: int, gap: int, spread: int) -> int:
    """Pairs (output place, window place) of one axis whose input is an element, not padding and not a gap."""
    if kernel == 1 and before == 0 and gap == 1:
        return places
    count = 0
    for k in range(kernel):
        at = k * spread - before
        if gap == 1:  # 0 <= place * stride + at < size
            first, last = max(0, -(at // stride)), min(places - 1, (size - 1 - at) // stride)
            count += max(0, last - first + 1)
        else:
            inside = (place * stride + at for place in range(places))
            count += sum(x % gap == 0 and 0 <= x // gap < size for x in inside)
    return count


def _instruction(line: str, found: re.Match) -> Instruction:
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    arguments = rest[:close]
    return Instruction(
        found[2], shape, opcode, tuple(_NAME.findall(arguments)), arguments, rest[close + 1 :], bool(found[1])
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"parentheses do not close: {text[:80]}")


@functools.lru_cache(maxsize=50_000)
def _arrays(shape: str) -> list[Array]:
    found = _ARRAY.findall(shape)
    return [Array(dtype, _integers(dims), "S(" in layout and "S(5)" not in layout) for dtype, dims, layout in found]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


def _index(instruction: Instruction) -> int:
    return int(_found(r"index=(\d+)", instruction.attributes))


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None
