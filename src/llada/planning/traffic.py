"""What chips send each other: bytes of every collective per mesh axis, how long they take, what runs meanwhile.

A collective is hidden as far as other work runs between its start and its end. The compiler's schedule gives the order,
its cycle estimates give the work; the links are taken to carry one collective after the other.
"""

import itertools
import math
import re
from collections import deque
from typing import NamedTuple

import jax
import numpy as np

from llada.planning.hlo import Array, Instruction, Module, callees, enclosed
from llada.planning.topology import DCN, Slice

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "data (DCN)"
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_SHARED = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start|-done)?$")


class Collective(NamedTuple):
    """One collective of the program, per device and step.

    bytes     that enter a device: all-gather and reduce-scatter (n - 1) / n of the whole, all-reduce twice that
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
        places = np.array(np.unravel_index(group, self.mesh.devices.shape))
        return tuple(a for a, row in zip(self.mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1)

    def rate(self, group: list[int]) -> float:
        """Bytes/s into a device from its group: the torus axes that the group spans, or the network between slices."""
        devices = [self.mesh.devices.flat[i] for i in group]
        chip = self.slice.chip
        if len({getattr(d, "slice_index", 0) or 0 for d in devices}) > 1:
            return DCN / chip.devices
        places = np.array([d.coords[: chip.axes] for d in devices])
        spans = [len(set(column.tolist())) for column in places.T]
        if max(spans) == 1:  # the devices of one chip
            return chip.ici * chip.axes
        # An axis counts as far as all of it is in the group; two chips of a ring have one link between them.
        rates = [
            chip.ici * (1.0 if self.slice.closed(axis) and span == self.slice.shape[axis] else 0.5)
            for axis, span in enumerate(spans)
            if span > 1
        ]
        return sum(rates) / chip.devices


def groups(attributes: str, devices: int) -> list[int]:
    """The first replica group of a collective, as places in the mesh's flat order.

    XLA writes groups as lists, as an iota reshaped and transposed, as named axes of a mesh, or not at all (everybody).
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return [int(word) for word in found[1].split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := _MESH_GROUPS.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))
        return _along(ids.reshape(tuple(sizes.values())), list(sizes), found[4])
    return list(range(devices))


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(k) for k in order.split(",")]) if order else ids


def _along(ids: np.ndarray, names: list[str], used: str) -> list[int]:
    """The group of device 0 along the named axes; `'a':(2)4` is a part of axis a: 4, after 2 more major."""
    pick: list[np.ndarray] = [np.array([0])] * ids.ndim
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
        axis = names.index(name)
        whole = ids.shape[axis]
        stride = whole // (int(before) * int(size)) if size else 1
        pick[axis] = np.arange(int(size) if size else whole) * stride
    return ids[np.ix_(*pick)].reshape(-1).tolist()


class _Flight(NamedTuple):
    """A collective under way while a schedule is followed."""

    record: list  # [remaining seconds, hidden seconds]
    channel: str | None = None


class Traffic:
    """All collectives of a module on a mesh; `seconds_of` turns cycles into seconds."""

    def __init__(self, module: Module, links: Links):
        self.module, self.links = module, links
        self.collectives: list[Collective] = []
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
        """Go through the schedule of a computation, giving work to what is under way."""
        module, times = self.module, self.module.executions[name]
        flying: deque[_Flight] = deque()
        ended: list[tuple[_Flight, dict]] = []
        started: dict[str, tuple[_Flight, dict]] = {}
        for instruction in module.computations[name]:
            role, inner = self._role(instruction)
            if role == "start":
                about = self._measure(inner)
                flight = _Flight([about["seconds"], 0.0], _channel(inner))
                flying.append(flight)
                started[_meeting(inner) or instruction.name] = (flight, about)
            elif role == "done":
                # A channel names one collective, or, where it is 1, any number of them under way at once.
                alike = [
                    k for k, (flight, _) in started.items() if inner is not None and flight.channel == _channel(inner)
                ]
                key = (
                    alike[0]
                    if len(alike) == 1
                    else self._starter(name, instruction, started) or next(iter(alike), None)
                )
                if key in started:
                    flight, about = started.pop(key)
                    ended.append((flight, about))
                    flying = deque(f for f in flying if f is not flight)
            elif role == "whole":
                about = self._measure(inner)
                ended.append((_Flight([about["seconds"], 0.0]), about | {"asynchronous": False}))
            else:
                work = module.instruction_cycles(name, instruction) / self.links.slice.chip.clock
                for flight in flying:
                    share = min(work, flight.record[0])
                    flight.record[0] -= share
                    flight.record[1] += share
                    work -= share
        ended += started.values()
        for flight, about in ended:
            self.collectives.append(Collective(times=times, hidden=flight.record[1], **about))

    def _role(self, instruction: Instruction) -> tuple[str, Instruction | None]:
        """What an instruction is to a collective: its start, its done, the whole of it, or nothing ("")."""
        if found := _SHARED.match(instruction.opcode):
            role = {"-start": "start", "-done": "done", None: "whole"}[found[2]]
            return role, None if role == "done" else instruction
        if instruction.opcode == "send" and _meeting(instruction):
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
                    return "whole", inner
        return "", None

    def _inside(self, instruction: Instruction) -> Instruction | None:
        todo = deque(callees(instruction))
        while todo:
            for inner in self.module.computations[todo.popleft()]:
                if _SHARED.match(inner.opcode):
                    return inner
                todo.extend(callees(inner))
        return None

    def _starter(self, name: str, done: Instruction, started: dict) -> str | None:
        """The start that a done belongs to, by its operands."""
        names, todo = self.module.by_name[name], deque(done.operands)
        for _ in itertools.takewhile(lambda _: todo, range(50)):
            operand = names.get(todo.popleft())
            if operand is None:
                continue
            if operand.name in started:
                return operand.name
            if operand.opcode == "recv" and _meeting(operand) in started:
                return _meeting(operand)
            todo.extend(operand.operands[:1])
        return None

    def _between_slices(self, send: Instruction) -> dict:
        """A collective between slices: a send and a receive through the hosts, along the axis that crosses slices."""
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
        kind = found[1].lower().replace("_", "-") if found else "all-reduce"
        array, n = send.arrays[0], self.links.slice.slices
        size = array.bytes * (2.0 if kind == "all-reduce" else 1.0) * (n - 1) / n
        seconds = size / (DCN / self.links.slice.chip.devices)
        return dict(
            kind=kind,
            axes=(BETWEEN_SLICES,),
            bytes=size,
            seconds=seconds,
            asynchronous=True,
            array=array,
            path=send.path,
        )

    def _measure(self, inner: Instruction) -> dict:
        if inner.opcode == "send":
            return self._between_slices(inner)
        kind = _SHARED.match(inner.opcode)[1]
        group = groups(inner.attributes, self.links.mesh.devices.size)
        n = len(group)
        arrays = inner.arrays
        if inner.opcode.endswith("-start") and inner.shape.startswith("(") and kind != "all-reduce":
            arrays = arrays[len(inner.operands) : 2 * len(inner.operands)]  # (operands, results, ...)
        whole = sum(a.bytes for a in arrays)
        # A reduce-scatter's result is one part of n.
        moved = {"all-reduce": 2.0 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        size = whole * moved.get(kind, (n - 1) / n)
        return dict(
            kind=kind,
            axes=self.links.axes(group),
            bytes=size,
            seconds=size / self.links.rate(group) if n > 1 else 0.0,
            asynchronous=True,
            array=max(arrays, key=lambda a: a.bytes),
            path=inner.path,
        )


def _meeting(instruction: Instruction) -> str | None:
    """The name by which hosts match what slices send each other; None for other instructions."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return found[1] if found and "_xla_megascale" in instruction.attributes else None


def _channel(instruction: Instruction | None) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes) if instruction is not None else None
    return found[0] if found else None
