"""What chips send each other: bytes of every collective per mesh axis, how long they take, what runs meanwhile.

A collective is hidden as far as other work runs between its start and its end. The compiler's schedule gives the order,
its cycle estimates give the work; the links are taken to carry one collective after the other.
"""

import dataclasses
import math
import re
from collections import defaultdict, deque
from typing import NamedTuple

import jax
import numpy as np

from llada.planning.hlo import Module, enclosed
from llada.planning.hlo_text import Array, Instruction, first
from llada.planning.topology import DCN, Slice

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "data (DCN)"
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_OPCODE = re.compile(rf"({'|'.join(KINDS)})(-start|-done)?$")
_SEARCH_DEPTH = 50  # operands that are followed from the end of a collective to its start


class Collective(NamedTuple):
    """One collective of the program, per device and step.

    bytes     that enter a device: all-gather and reduce-scatter (n - 1) / n of the array, all-reduce twice that
    seconds   they take on the links they cross
    hidden    of these seconds, under other work
    array     its largest array
    """

    kind: str
    axes: tuple[str, ...]
    times: float
    bytes: float
    seconds: float
    hidden: float
    asynchronous: bool
    array: Array
    path: str


class Links(NamedTuple):
    """The mesh laid on the slices: which devices stand where."""

    mesh: jax.sharding.Mesh
    slice: Slice

    def axes(self, group: list[int]) -> tuple[str, ...]:
        """Mesh axes along which the members of a group differ."""
        coordinates = np.unravel_index(group, self.mesh.devices.shape)
        return tuple(a for a, row in zip(self.mesh.axis_names, coordinates, strict=True) if len(set(row.tolist())) > 1)

    def rate(self, group: list[int]) -> float:
        """Bytes/s into a device from its group: the torus axes that the group spans, or the network between slices."""
        devices = [self.mesh.devices.flat[i] for i in group]
        chip = self.slice.chip
        if len({getattr(d, "slice_index", 0) or 0 for d in devices}) > 1:
            return DCN / chip.devices
        coordinates = np.array([d.coords[: chip.axes] for d in devices])
        spans = [len(set(column.tolist())) for column in coordinates.T]
        if max(spans) == 1:  # the devices of one chip
            return chip.ici * chip.axes
        # An axis counts as far as all of it is in the group; two chips of a ring have one link between them.
        rates = [
            chip.ici * (1.0 if self.slice.closed(axis) and span == self.slice.shape[axis] else 0.5)
            for axis, span in enumerate(spans)
            if span > 1
        ]
        return sum(rates) / chip.devices


def first_group(attributes: str, devices: int) -> list[int] | None:
    """The first replica group of a collective, as positions in the mesh's flat order; None if it cannot be read.

    XLA writes groups as lists, as an iota reshaped and transposed, as named axes of a mesh, or not at all, for one
    group of all devices.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return [int(word) for word in match[1].split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := _MESH_GROUPS.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
        return _along(ids.reshape(tuple(sizes.values())), list(sizes), match[4])
    # Whatever else `replica_groups=` says, but for an empty list.
    return None if re.search(r"replica_groups=(?!\{\})", attributes) else list(range(devices))


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(k) for k in order.split(",")]) if order else ids


def _along(ids: np.ndarray, names: list[str], used: str) -> list[int]:
    """The group of device 0 along the named axes; `'a':(2)4` is a factor of axis a: 4, after 2 more major."""
    selected = [np.array([0])] * ids.ndim
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
        axis = names.index(name)
        length = ids.shape[axis]
        stride = length // (int(before) * int(size)) if size else 1
        selected[axis] = np.arange(int(size) if size else length) * stride
    return ids[np.ix_(*selected)].reshape(-1).tolist()


@dataclasses.dataclass(eq=False)
class _Flight:
    """An asynchronous collective while a schedule is followed: seconds of it still to come, seconds hidden so far."""

    collective: Collective
    channel: str | None
    remaining: float
    hidden: float = 0.0


class Traffic:
    """All collectives of a module on a mesh. What could not be read is in `unknown`, as in `Module`."""

    def __init__(self, module: Module, links: Links):
        self.module, self.links = module, links
        self.collectives: list[Collective] = []
        self.unknown: dict[str, set[str]] = defaultdict(set)
        fused = enclosed(module)
        for name in module.computations:
            if module.executions[name] and name not in fused:
                self._follow(name)

    @property
    def exposed_seconds(self) -> float:
        """Link time per step that nothing hides."""
        return sum(c.times * (c.seconds - c.hidden) for c in self.collectives)

    @property
    def ici_seconds(self) -> float:
        """Time per step on the links within slices, hidden or not."""
        return sum(c.times * c.seconds for c in self.collectives if c.axes != (BETWEEN_SLICES,))

    @property
    def dcn_seconds(self) -> float:
        """Time per step on the network between slices, hidden or not."""
        return sum(c.times * c.seconds for c in self.collectives if c.axes == (BETWEEN_SLICES,))

    def _follow(self, name: str) -> None:
        """Go through the schedule of a computation; work between a collective's start and its end hides it."""
        times = self.module.executions[name]
        flying: dict[str, _Flight] = {}  # by the name of their start, or that by which hosts match them
        ended: list[_Flight] = []
        for instruction in self.module.computations[name]:
            role, inner = self._role(instruction)
            if role == "done":
                start = self._start_of(name, instruction, inner, flying)
                if start is not None:
                    ended.append(flying.pop(start))
            elif inner is None:
                work = self.module.instruction_cycles(name, instruction) / self.links.slice.chip.clock
                for flight in flying.values():
                    share = min(work, flight.remaining)
                    flight.remaining -= share
                    flight.hidden += share
                    work -= share
            else:
                collective = self._measure(inner, times)
                if role == "start":
                    flight = _Flight(collective, _channel(inner), collective.seconds)
                    flying[_rendezvous(inner) or instruction.name] = flight
                else:
                    ended.append(_Flight(collective._replace(asynchronous=False), None, collective.seconds))
        if flying:
            self.unknown["asynchronous collectives whose end is not found"] |= flying.keys()
        self.collectives += [f.collective._replace(hidden=f.hidden) for f in [*ended, *flying.values()]]

    def _role(self, instruction: Instruction) -> tuple[str, Instruction | None]:
        """What an instruction is to a collective, "start", "done" or "synchronous", and the collective within it.

        ("", None) for other work.
        """
        if match := _OPCODE.match(instruction.opcode):
            role = {"-start": "start", "-done": "done"}.get(match[2], "synchronous")
            return role, None if role == "done" else instruction
        if instruction.opcode == "send" and _rendezvous(instruction):
            return "start", instruction
        if instruction.opcode == "recv-done":
            return "done", None
        if instruction.opcode in ("async-start", "call-start"):
            inner = self._inside(instruction)
            return ("start", inner) if inner is not None else ("", None)
        if instruction.opcode in ("async-done", "call-done"):
            return "done", None
        if instruction.opcode == "fusion":
            inner = self._inside(instruction)
            if inner is not None:
                for role in ("start", "done"):
                    if f"async-collective-{role}" in instruction.name:
                        return role, inner
                # A fusion that computes while collectives started before it go on is work; a collective with its
                # slicing is the collective.
                if "kind=kCustom" in instruction.attributes:
                    return "synchronous", inner
        return "", None

    def _inside(self, instruction: Instruction) -> Instruction | None:
        """The first collective in the computations that an instruction calls."""
        todo = deque(instruction.callees)
        while todo:
            for inner in self.module.computations[todo.popleft()]:
                if _OPCODE.match(inner.opcode):
                    return inner
                todo.extend(inner.callees)
        return None

    def _start_of(
        self, name: str, done: Instruction, inner: Instruction | None, flying: dict[str, _Flight]
    ) -> str | None:
        """Which of those under way ends with `done`: the only one of its channel, else by its operands.

        A channel names one collective, or, where it is 1, any number of them under way at once.
        """
        alike = [] if inner is None else [k for k, flight in flying.items() if flight.channel == _channel(inner)]
        if len(alike) == 1:
            return alike[0]
        names, todo = self.module.by_name[name], deque(done.operands)
        for _ in range(_SEARCH_DEPTH):
            operand = names.get(todo.popleft()) if todo else None
            if operand is None:
                continue
            if operand.name in flying:
                return operand.name
            if operand.opcode == "recv" and (met := _rendezvous(operand)) in flying:
                return met
            todo.extend(operand.operands[:1])
        return alike[0] if alike else None

    def _between_slices(self, send: Instruction, times: float) -> Collective:
        """A collective between slices: a send and a receive through the hosts, along the axis that crosses slices."""
        kind = first(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
        if kind is None:
            self.unknown["collectives between slices of unknown kind, taken for all-reduces"].add(send.name)
        kind = (kind or "all-reduce").lower().replace("_", "-")
        array, n = send.arrays[0], self.links.slice.slices
        size = array.bytes * (2.0 if kind == "all-reduce" else 1.0) * (n - 1) / n
        seconds = size / (DCN / self.links.slice.chip.devices)
        return Collective(kind, (BETWEEN_SLICES,), times, size, seconds, 0.0, True, array, send.path)

    def _measure(self, inner: Instruction, times: float) -> Collective:
        """A collective that runs so many times, as if nothing hid it and it were asynchronous."""
        match = _OPCODE.match(inner.opcode)
        if match is None:
            return self._between_slices(inner, times)
        kind, group = match[1], first_group(inner.attributes, self.links.mesh.devices.size)
        if group is None:
            self.unknown["collectives whose devices cannot be read, taken to be all"].add(inner.name)
            group = list(range(self.links.mesh.devices.size))
        n, arrays = len(group), inner.arrays
        if inner.opcode.endswith("-start") and inner.shape.startswith("(") and kind != "all-reduce":
            arrays = arrays[len(inner.operands) : 2 * len(inner.operands)]  # (operands, results, ...)
        # A reduce-scatter's result is one shard of n.
        moved = {"all-reduce": 2.0 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        size = sum(a.bytes for a in arrays) * moved.get(kind, (n - 1) / n)
        seconds = size / self.links.rate(group) if n > 1 else 0.0
        largest = max(arrays, key=lambda a: a.bytes)
        return Collective(kind, self.links.axes(group), times, size, seconds, 0.0, True, largest, inner.path)


def _rendezvous(instruction: Instruction) -> str | None:
    """The name by which hosts match what slices send each other; None for other instructions."""
    name = first(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return name if "_xla_megascale" in instruction.attributes else None


def _channel(instruction: Instruction) -> str | None:
    return first(r"(channel_id=\d+)", instruction.attributes)
