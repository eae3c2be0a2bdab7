"""What a compiled program does: how often each computation runs, and the matrix FLOPs and cycles of its instructions.

XLA's own cost analysis counts the body of a loop once, so loops are multiplied out here: the trip count of a counted
loop is read from its condition, and one that depends on data is estimated by whoever planned the program.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from llada.planning import kernels
from llada.planning.hlo_text import BYTES, FLOATS, Instruction, first, integers, parse

# From the source path of a loop to (expected trip count, why), None where it is not known.
Trips = Callable[[str], tuple[float, str] | None]

# Instructions whose result is their first operand, as far as an integer is concerned.
_COPIES = ("copy", "bitcast", "convert", "copy-done", "copy-start", "broadcast", "reshape")


class Loop(NamedTuple):
    """A loop of the program: its trip count each time it is entered, how often it is, why that is not `counted`."""

    path: str
    trip_count: float
    entries: float
    counted: bool
    why: str


class Module:
    """A parsed program and how often each of its computations runs.

    trips             estimates loops whose trip count depends on data
    causal            whether attention is: kernels are opaque to the compiler
    flops_per_cycle   of a device at its peak, from which the cycles of a kernel are estimated

    What could not be read is in `unknown`: what was assumed instead, and the names it was assumed of.
    """

    def __init__(self, text: str, trips: Trips | None = None, causal: bool = False, flops_per_cycle: float = math.inf):
        self.causal, self.flops_per_cycle = causal, flops_per_cycle
        self.computations, self.entry = parse(text)
        self.by_name = {name: {i.name: i for i in body} for name, body in self.computations.items()}
        self.loops: list[Loop] = []
        self.executions: dict[str, float] = dict.fromkeys(self.computations, 0.0)
        self.trip_counts: dict[str, float] = {}  # of each while instruction
        self.unknown: dict[str, set[str]] = defaultdict(set)
        self._trips = trips or (lambda path: None)
        self._products: dict[str, float] = {}
        self._cycles: dict[tuple[str, str], float] = {}
        self._walk(self.entry, 1.0)
        self._note_unknown()

    def _walk(self, name: str, times: float) -> None:
        self.executions[name] += times
        for instruction in self.computations[name]:
            if instruction.opcode == "while":
                loop = self._loop(name, instruction, times)
                self.trip_counts[instruction.name] = loop.trip_count
                self.loops.append(loop)
                self._walk(instruction.called("body")[0], times * loop.trip_count)
            elif instruction.opcode == "conditional":
                # The branch with the most products; branches of one conditional exclude each other.
                branches = instruction.called("branch_computations") or instruction.called("called_computations")
                self._walk(max(branches, key=self.products), times)
            else:
                for called in instruction.callees:
                    self._walk(called, times)

    def _note_unknown(self) -> None:
        for name, body in self.computations.items():
            for i in body if self.executions[name] else ():
                for dtype in {array.dtype for array in i.arrays} - BYTES.keys():
                    self.unknown[f"arrays of type {dtype}, counted as no bytes"].add(i.name)
                if kernels.is_kernel(i.opcode, i.attributes) and self._kernel_flops(name, i) is None:
                    self.unknown["kernels that declare no FLOPs, counted as none"].add(i.name)

    def products(self, name: str) -> float:
        """Matrix FLOPs of a computation and all it calls, loop bodies once."""
        if name not in self._products:
            total = 0.0
            for instruction in self.computations[name]:
                total += self.flops(name, instruction)
                inner = [*instruction.callees, *instruction.called("body"), *instruction.called("branch_computations")]
                total += sum(self.products(called) for called in inner)
            self._products[name] = total
        return self._products[name]

    def operand(self, computation: str, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction whose result an operand is; None where that is of another computation."""
        return self.by_name[computation].get(instruction.operands[index])

    def root(self, computation: str) -> Instruction | None:
        """The instruction whose result a computation returns."""
        return next((i for i in self.computations[computation] if i.root), None)

    def _loop(self, computation: str, loop: Instruction, entries: float) -> Loop:
        """A while loop, with the trip count that the compiler prints, that can be counted here, or that is expected."""
        if known := first(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return Loop(loop.path, int(known), entries, True, "")
        counter, end, inclusive = self._limit(computation, loop, loop.called("condition")[0])
        start = None if counter is None else self._constant(computation, self._element(computation, loop, counter))
        step = None if counter is None else self._step(loop.called("body")[0], counter)
        if end is not None and start is not None and step:
            return Loop(loop.path, max(0, math.ceil((end - start + inclusive) / step)), entries, True, "")
        expected = self._trips(loop.path)
        if expected is None:
            self.unknown["loops of unknown trip count, counted once"].add(loop.name)
            expected = 1.0, "not known; counted once"
        trip_count, why = expected
        # A counter that starts late belongs to a loop whose first iterations the compiler wrote out before it.
        return Loop(loop.path, max(0.0, trip_count - (start or 0)), entries, False, why)

    def _limit(self, computation: str, loop: Instruction, condition: str) -> tuple[int | None, int | None, int]:
        """(index of the counter in the loop's tuple, its limit, 1 if inclusive) of a condition counter < limit.

        None for what cannot be read, and for a limit that depends on data.
        """
        root = self.root(condition)
        if root is not None and root.opcode == "fusion":
            root = self.root(root.called("calls")[0])
        names = self.by_name[condition]
        if root is None or root.opcode != "compare" or any(name not in names for name in root.operands):
            return None, None, 0
        direction = first(r"direction=(L[TE])", root.attributes)
        left, right = (names[name] for name in root.operands)
        if direction is None or left.opcode != "get-tuple-element":
            return None, None, 0
        if right.opcode == "get-tuple-element":
            end = self._constant(computation, self._element(computation, loop, right.element))
        else:
            end = self._constant(condition, right)
        return left.element, end, int(direction == "LE")

    def _element(self, computation: str, loop: Instruction, index: int) -> Instruction | None:
        """What the element `index` of a loop's tuple is before the first iteration."""
        start = self.operand(computation, loop, 0)
        if start is None or start.opcode != "tuple":
            return None
        return self.operand(computation, start, index)

    def _constant(self, computation: str, instruction: Instruction | None) -> int | None:
        """The integer that an instruction always returns, through copies; None if there is no such."""
        while instruction is not None and instruction.opcode in _COPIES:
            instruction = self.operand(computation, instruction, 0)
        if instruction is None or instruction.opcode != "constant":
            return None
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None

    def _step(self, body: str, index: int) -> int | None:
        """What an iteration adds to the counter: the constant of the addition whose result is the next one."""
        root = self.root(body)
        if root is None or root.opcode != "tuple":
            return None
        sum_ = self.operand(body, root, index)
        while sum_ is not None and sum_.opcode in ("copy", "bitcast", "get-tuple-element"):
            sum_ = self.operand(body, sum_, 0)
        home = body
        if sum_ is not None and sum_.opcode == "fusion":
            home = sum_.called("calls")[0]
            sum_ = self.root(home)
        if sum_ is None or sum_.opcode != "add":
            return None
        constants = [self._constant(home, self.operand(home, sum_, k)) for k in range(2)]
        return next((value for value in constants if value), None)

    def flops(self, computation: str, instruction: Instruction) -> float:
        """Matrix FLOPs of one execution of an instruction itself: dots, convolutions, declared ones of kernels."""
        names = self.by_name[computation]
        if instruction.opcode in ("dot", "convolution"):
            left, right = (names[name].arrays[0].dims for name in instruction.operands[:2])
            if instruction.opcode == "convolution":
                return _convolution_flops(instruction, left, right)
            contracted = integers(first(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes) or "")
            return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[i] for i in contracted)
        if kernels.is_kernel(instruction.opcode, instruction.attributes):
            return self._kernel_flops(computation, instruction) or 0.0
        return 0.0

    def _kernel_flops(self, computation: str, instruction: Instruction) -> float | None:
        shapes, results = self._operand_shapes(computation, instruction), len(instruction.arrays)
        return kernels.flops(instruction.name, instruction.attributes, shapes, results, self.causal)

    def _operand_shapes(self, computation: str, instruction: Instruction) -> list[tuple[int, ...]]:
        """Shapes of the numbers that a kernel works on; integers say which of them."""
        names = self.by_name[computation]
        arrays = [names[name].arrays[0] for name in instruction.operands if name in names]
        return [array.dims for array in arrays if array.dtype in FLOATS]

    def cycles(self, name: str) -> float:
        """The compiler's cycles for one execution of a computation, loops multiplied out."""
        return sum(self.instruction_cycles(name, instruction) for instruction in self.computations[name])

    def instruction_cycles(self, computation: str, instruction: Instruction) -> float:
        """Of one execution of an instruction, with the loops and calls within; of kernels by `kernels.efficiency`."""
        key = computation, instruction.name
        if key not in self._cycles:
            self._cycles[key] = self._count_cycles(computation, instruction)
        return self._cycles[key]

    def _count_cycles(self, computation: str, instruction: Instruction) -> float:
        if instruction.opcode == "while":
            return self.trip_counts.get(instruction.name, 0) * self.cycles(instruction.called("body")[0])
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations")
            return max((self.cycles(branch) for branch in branches), default=0.0)
        if instruction.opcode == "call":
            return sum(self.cycles(called) for called in instruction.callees)
        if kernels.is_kernel(instruction.opcode, instruction.attributes) and not instruction.cycles:
            share = kernels.efficiency(instruction.name, self._operand_shapes(computation, instruction))
            return self.flops(computation, instruction) / (self.flops_per_cycle * share)
        return instruction.cycles


def enclosed(module: Module) -> set[str]:
    """Computations that are part of one scheduled instruction: of fusions and of what runs on other threads."""
    todo = [
        called
        for body in module.computations.values()
        for instruction in body
        if instruction.opcode in ("fusion", "call-start", "async-start")
        for called in instruction.callees
    ]
    inside: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo += [called for instruction in module.computations[name] for called in instruction.callees]
    return inside


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """2 x batch x output features x input features x the window positions on data: TPUs write most products this way.

    Window positions in the padding or between dilated elements are not computed, as in a batched product written as a
    window that meets data once. `dim_labels=b0f_0io->b0f` names the axes of input, window and output: b is the batch,
    f and o features of the output, i of the input, digits the spatial axes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.attributes[:80]}")
    of_input, of_window, of_output = labels.groups()
    window = first(r"window=\{([^}]*)\}", instruction.attributes) or ""
    output = instruction.arrays[0].dims
    spatial = sorted(int(label) for label in of_input if label.isdigit())

    def per_axis(key: str, default: str) -> list[str]:
        values = first(rf"(?:^| ){key}=(\S+)", window)
        return values.split("x") if values else [default] * len(spatial)

    on_data = 1
    pads, strides = per_axis("pad", "0_0"), per_axis("stride", "1")
    input_gaps, window_gaps = per_axis("lhs_dilate", "1"), per_axis("rhs_dilate", "1")
    for axis in spatial:
        on_data *= _positions_on_data(
            size=left[of_input.index(str(axis))],
            window=right[of_window.index(str(axis))],
            outputs=output[of_output.index(str(axis))],
            before=int(pads[axis].split("_")[0]),
            stride=int(strides[axis]),
            gap=int(input_gaps[axis]),
            window_gap=int(window_gaps[axis]),
        )
    batch, features = output[of_output.index("b")], output[of_output.index("f")]
    groups = int(first(r"batch_group_count=(\d+)", instruction.attributes) or 1)
    return 2.0 * batch * features * right[of_window.index("i")] * on_data / groups


@functools.cache
def _positions_on_data(
    size: int, window: int, outputs: int, before: int, stride: int, gap: int, window_gap: int
) -> int:
    """Pairs (output position, window position) of one axis whose input is an element, not padding and not a gap."""
    if window == 1 and before == 0 and gap == 1:
        return outputs
    count = 0
    for k in range(window):
        offset = k * window_gap - before
        if gap == 1:  # 0 <= position * stride + offset < size
            earliest, latest = max(0, -(offset // stride)), min(outputs - 1, (size - 1 - offset) // stride)
            count += max(0, latest - earliest + 1)
        else:
            inputs = (position * stride + offset for position in range(outputs))
            count += sum(x % gap == 0 and 0 <= x // gap < size for x in inputs)
    return count
