"""From a compiled program to seconds: a projection, not a measurement.

Two estimates that share the collectives. `compiler`: the compiler's own cycles over the clock, and after them the link
time that its schedule leaves unhidden. `roofline`: the largest of matrix products at 80 % of peak, HBM traffic at 90 %
of its bandwidth, and each network; it assumes perfect overlap, so it is the floor.
"""

from typing import NamedTuple

from llada.planning.hlo import Module, enclosed
from llada.planning.hlo_text import Array, Instruction
from llada.planning.topology import Slice
from llada.planning.traffic import Traffic

MATH_SHARE = 0.8  # of peak FLOP/s that large products reach
HBM_SHARE = 0.9

_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call iota copy-done after-all partition-id "
    "replica-id".split()
)
_SLICES = ("dynamic-slice", "gather", "slice")


class Projection(NamedTuple):
    """Seconds of one run of the program; `binding` names what bounds the roofline."""

    matrix_flops: float  # executed, per chip
    hbm_bytes: float  # per chip
    math_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    exposed_seconds: float
    compiler_seconds: float
    binding: str

    @property
    def roofline_seconds(self) -> float:
        """The floor."""
        return max(self.math_seconds, self.hbm_seconds, self.ici_seconds, self.dcn_seconds)

    @property
    def seconds(self) -> float:
        """The figure to plan with: the larger of the two estimates."""
        return max(self.roofline_seconds, self.compiler_seconds)


def project(module: Module, traffic: Traffic, hardware: Slice) -> Projection:
    """Project one run."""
    chip, per_chip = hardware.chip, hardware.chip.devices
    flops = per_chip * matrix_flops(module)
    hbm = per_chip * hbm_bytes(module)
    bounds = {
        "matrix products": flops / (chip.peak_flops * MATH_SHARE),
        "HBM": hbm / (chip.hbm * HBM_SHARE),
        "ICI": traffic.ici_seconds,
        "DCN": traffic.dcn_seconds,
    }
    cycles = module.cycles(module.entry) / chip.clock
    return Projection(
        matrix_flops=flops,
        hbm_bytes=hbm,
        math_seconds=bounds["matrix products"],
        hbm_seconds=bounds["HBM"],
        ici_seconds=bounds["ICI"],
        dcn_seconds=bounds["DCN"],
        exposed_seconds=traffic.exposed_seconds,
        compiler_seconds=cycles + traffic.exposed_seconds,
        binding=max(bounds, key=lambda name: bounds[name]),
    )


def matrix_flops(module: Module) -> float:
    """Executed matrix FLOPs of one device: every dot, convolution and declared kernel times how often it runs."""
    return sum(
        module.executions[name] * module.flops(name, instruction)
        for name, body in module.computations.items()
        if module.executions[name]
        for instruction in body
    )


def hbm_bytes(module: Module) -> float:
    """HBM bytes read and written by one device: operands and results of every instruction outside fusions.

    What lies in on-chip memory is free; of an operand that is only sliced, the slices count.
    """
    fused = enclosed(module)
    total = 0.0
    for name, body in module.computations.items():
        if module.executions[name] and name not in fused:
            total += module.executions[name] * sum(_moved(module, name, i) for i in body if i.opcode not in _FREE)
    return total


def _moved(module: Module, name: str, instruction: Instruction) -> float:
    """HBM bytes that one execution of an instruction reads and writes."""
    called = instruction.called("calls") if instruction.opcode == "fusion" else []
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _change(module, name, instruction)
    written = _in_hbm(instruction.arrays)
    read = 0.0
    parameters = _parameters(module, called[0]) if called else {}
    for number, operand in enumerate(instruction.operands):
        origin = module.by_name[name].get(operand)
        size = _in_hbm(origin.arrays) if origin is not None else 0.0
        if instruction.opcode in _SLICES:
            size = min(size, sum(a.bytes for a in instruction.arrays))
        elif size and str(number) in parameters:
            size = _read(module, called[0], parameters[str(number)], size)
        read += size
    return read + max(written - sum(_updated_in_place(module, c) for c in called), 0.0)


def _in_hbm(arrays: list[Array]) -> float:
    return sum(a.bytes for a in arrays if not a.fast)


def _parameters(module: Module, computation: str) -> dict[str, str]:
    """Names of a computation's parameters by their number."""
    return {i.arguments: i.name for i in module.computations[computation] if i.opcode == "parameter"}


def _read(module: Module, computation: str, array: str, size: float) -> float:
    """Bytes, of `size`, that a fused computation reads of an array: of one that is only sliced or updated, less."""
    total = 0.0
    for user in module.computations[computation]:
        if array not in user.operands:
            continue
        if user.opcode in _SLICES:
            total += sum(a.bytes for a in user.arrays)
        elif _renames(user):
            total += _read(module, computation, user.name, size)
        elif user.opcode == "fusion":
            called = user.called("calls")[0]
            inner = _parameters(module, called)
            names = [inner[str(k)] for k, operand in enumerate(user.operands) if operand == array]
            total += sum(_read(module, called, name, size) for name in names)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != array:
            return size
    return min(total, size)


def _updated_in_place(module: Module, computation: str) -> float:
    """Bytes of a fused computation's result that it does not write: an array that a slice is put into stays."""
    total = 0.0
    for i in module.computations[computation]:
        if i.opcode == "fusion":
            total += sum(_updated_in_place(module, called) for called in i.called("calls"))
        if i.opcode != "dynamic-update-slice" or i.arrays[0].fast:
            continue
        origin = module.operand(computation, i, 0)
        while origin is not None and _renames(origin):
            origin = module.operand(computation, origin, 0)
        if origin is not None and origin.opcode == "parameter":
            total += sum(a.bytes for a in i.arrays) - _change(module, computation, i)
    return total


def _change(module: Module, computation: str, update: Instruction) -> float:
    """Bytes of the slice that an update puts into an array."""
    piece = module.operand(computation, update, 1)
    return sum(a.bytes for a in piece.arrays) if piece else 0.0


def _renames(instruction: Instruction) -> bool:
    return instruction.opcode == "bitcast" or "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
