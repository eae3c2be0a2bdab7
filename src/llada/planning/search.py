"""Which mesh, remat and batch per device train a config fastest on a slice, and what memory each takes.

The batch of a step stays the config's: a smaller batch per device means more microbatches. Arithmetic rules out what
cannot fit; the rest is compiled. Memory grows in proportion to the batch per device, so every compilation, one that
does not fit included, says which batch to try next. Remat and batch are searched on one mesh, and the best of them is
then compiled on the others: at minutes a compilation, all combinations would take hours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from llada import accounting
from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.errors import UserError
from llada.planning import programs, report
from llada.planning.fitting import wanted_bytes
from llada.planning.topology import GIB, Slice

REMAT = ("full", "attention", "dots", "none")  # from the least memory to the most
LARGE = 16  # devices of a slice from which on splitting parameters over all of them is not tried first
FULL = 0.92  # of HBM: what is left is for fragmentation and for what the program does not know of


class Point(NamedTuple):
    """One candidate: `sequences` at once on a device. Without `figures` it does not fit; `peak` is what it wants."""

    config: Config
    sequences: int
    peak: float
    figures: dict[str, Any] | None

    @property
    def fits(self) -> bool:
        """Within HBM."""
        return self.figures is not None

    @property
    def rate(self) -> float:
        """Projected tokens per second and chip."""
        return self.figures["projection"]["tokens_per_second_per_chip"] if self.figures else 0.0

    @property
    def flags(self) -> str:
        """The command line that makes it."""
        c = self.config
        mesh = f"--config.mesh.data={c.mesh.data} --config.mesh.fsdp={c.mesh.fsdp} --config.mesh.tensor={c.mesh.tensor}"
        return f"{mesh} --config.model.remat={c.model.remat} --config.train.microbatches={c.train.microbatches}"


class Found(NamedTuple):
    """All points that were compiled, in order; the fastest; those that nothing beats in both speed and memory."""

    points: list[Point]
    best: Point
    pareto: list[Point]

    @property
    def figures(self) -> dict[str, Any]:
        """For JSON."""
        entries = [
            {
                "flags": p.flags,
                "sequences_per_device": p.sequences,
                "fits": p.fits,
                "peak_bytes": p.peak,
                "pareto": p in self.pareto,
                "plan": p.figures,
            }
            for p in self.points
        ]
        return {"best": self.best.flags, "method": report.METHOD, "points": entries}


Attempt = Callable[[MeshConfig, str, int], Point]  # mesh, remat, sequences at once on a device


def search(config: Config, place: Slice, now: Callable[[str], None], done: Callable[[str], None]) -> Found:
    """Compile candidates, about ten. UserError where none fits, in one line.

    `now` is told what is being compiled, `done` the header and the row of each when it is.
    """
    points: list[Point] = []
    best = None

    def attempt(mesh: MeshConfig, remat: str, sequences: int) -> Point:
        named = f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat {remat}"
        now(f"{len(points) + 1}: {named}, {sequences} sequences per device")
        if not points:
            done(HEADER)  # not before it is clear that there is something to try: a mistake gets one line
        points.append(_compile(config, place, mesh, remat, sequences))
        done(row(points[-1]))
        return points[-1]

    for mesh in candidate_meshes(config, place):
        if best is None:
            _on_mesh(config, place, mesh, attempt)
            best = _best(points, place)
        elif _per_device(config, mesh) % best.sequences == 0:
            attempt(mesh, best.config.model.remat, best.sequences)
    best = _best(points, place)
    if best is None:
        least = min(points, key=lambda p: p.peak)
        raise UserError(
            f"does not fit {place.chips} chips of {place.name} at any remat: the least is {least.peak / GIB:.1f} GiB "
            f"of {place.chip.capacity / GIB:.1f} a chip with {least.flags}; use a larger slice, or a smaller model"
        )
    fitting = [p for p in points if p.fits]
    return Found(points, best, [p for p in fitting if not any(_beats(other, p) for other in fitting)])


def _best(points: list[Point], place: Slice) -> Point | None:
    """The fastest that leaves some memory free, or of those that fit at all; None where none does."""
    fitting = [p for p in points if p.fits]
    within = [p for p in fitting if _leaves_room(p, place)]
    return max(within or fitting, key=lambda p: p.rate, default=None)


def _leaves_room(point: Point, place: Slice) -> bool:
    return point.fits and point.peak <= FULL * place.chip.capacity


def _on_mesh(config: Config, place: Slice, mesh: MeshConfig, attempt: Attempt) -> None:
    """Every remat on a mesh, each with the largest batches that fit."""
    limit = _per_device(config, mesh)
    for remat in REMAT:
        limit = _largest_batch(config, place, mesh, remat, limit, attempt)
        if not limit:
            break  # less recomputation needs more memory still


def candidate_meshes(config: Config, place: Slice) -> list[MeshConfig]:
    """A few meshes that arithmetic allows, the most promising first.

    Half a slice leads: memory, links and bytes are best where parameters are split furthest, but over the whole of a
    large slice the compiler moves more bytes than it has to. Then the middle, the smallest, and the whole. Tensor
    parallelism is left at the config's: at these sizes it never pays on a torus that FSDP can fill.
    """
    devices, tensor = len(place.devices), config.mesh.tensor
    if devices // place.slices % tensor:
        raise UserError(
            f"--config.mesh.tensor={tensor} does not divide the {devices // place.slices} devices of a slice"
        )
    whole = devices // place.slices // tensor
    found = []
    for fsdp in (n for n in range(whole, 0, -1) if whole % n == 0):
        mesh = MeshConfig(data=devices // fsdp // tensor, fsdp=fsdp, tensor=tensor)
        divides = config.model.width % fsdp == 0 and config.train.batch_size % (mesh.data * fsdp) == 0
        if divides and _floor(config, mesh, 1) * place.chip.devices <= place.chip.capacity:
            found.append(mesh)
    if not found:
        _refuse(config, place, devices // tensor, tensor)
    parts = [mesh for mesh in found if mesh.fsdp < whole]
    chosen = dict.fromkeys([*parts[:1], *parts[len(parts) // 2 :][:1], *parts[-1:], *found[:1]])
    return list(chosen) if whole >= LARGE else [*found[:1], *(mesh for mesh in chosen if mesh != found[0])]


def _refuse(config: Config, place: Slice, ways: int, tensor: int) -> None:
    widest = MeshConfig(data=1, fsdp=len(place.devices) // place.slices // tensor, tensor=tensor)
    needs = _floor(config, widest, 1) * place.chip.devices
    if needs > place.chip.capacity:
        raise UserError(
            f"does not fit {place.chips} chips of {place.name} at any remat: parameters, moments and one sequence a "
            f"device are {needs / GIB:.1f} GiB of {place.chip.capacity / GIB:.1f} a chip; use a larger slice"
        )
    raise UserError(
        f"--config.train.batch_size={config.train.batch_size} and --config.model.width={config.model.width} divide "
        f"over no mesh of {len(place.devices)} devices; use a multiple of {ways} for the batch, or a smaller slice"
    )


def _floor(config: Config, mesh: MeshConfig, sequences: int) -> float:
    """Bytes a device cannot do without: float32 parameters and moments, and the residual stream of every layer."""
    m = config.model
    state = 12.0 * accounting.parameters(m).total / (mesh.fsdp * mesh.tensor)
    return state + 2.0 * sequences * config.data.sequence_length * m.width * m.layers


def _per_device(config: Config, mesh: MeshConfig) -> int:
    """Sequences of a step per device."""
    return config.train.batch_size // (mesh.data * mesh.fsdp)


def _largest_batch(config: Config, place: Slice, mesh: MeshConfig, remat: str, limit: int, attempt: Attempt) -> int:
    """The largest batch per device up to `limit` that leaves some memory free, from a good guess; 0 where none does."""
    whole = _per_device(config, mesh)
    sizes = [n for n in range(1, min(whole, limit) + 1) if whole % n == 0]
    while sizes and _floor(config, mesh, sizes[-1]) * place.chip.devices > place.chip.capacity:
        sizes.pop()
    low, high = 0, len(sizes) - 1  # what is left to try
    at = high
    while low <= high:
        point = attempt(mesh, remat, sizes[at])
        if _leaves_room(point, place):
            low = at + 1
            at = high
        else:
            high = at - 1
            room = FULL * place.chip.capacity / point.peak
            at = max([i for i in range(low, high + 1) if sizes[i] <= sizes[at] * room], default=low)
    return sizes[high] if high >= 0 else 0


def _compile(config: Config, place: Slice, mesh_config: MeshConfig, remat: str, sequences: int) -> Point:
    microbatches = _per_device(config, mesh_config) // sequences
    changed = dataclasses.replace(
        config,
        mesh=mesh_config,
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, microbatches=microbatches),
    )
    mesh = mesh_lib.make(mesh_config, place.devices)
    program = programs.make(changed, mesh, "train", programs.Request())
    compiled = programs.lower_and_compile(program, mesh)
    if compiled.refusal:
        return Point(changed, sequences, wanted_bytes(compiled.refusal) * place.chip.devices, None)
    figures = report.figures(changed, place, mesh, program, compiled)
    peak = figures["hbm_bytes"]["peak"]
    # Compiled is not yet within HBM: the compiler may allot more than there is.
    return Point(changed, sequences, peak, figures if peak <= place.chip.capacity else None)


def _beats(other: Point, point: Point) -> bool:
    better = other.rate >= point.rate and other.peak <= point.peak
    return better and (other.rate > point.rate or other.peak < point.peak)


HEADER = (
    f"  {'data x fsdp x tensor':<22}{'remat':<11}{'per device':>10}{'peak GiB':>10}{'executed/useful':>17}"
    f"{'s/step':>9}{'tokens/s/chip':>15}{'useful MFU':>12}"
)


def row(p: Point, star: bool = False) -> str:
    """One line under HEADER."""
    c, mesh = p.config, f"{p.config.mesh.data} x {p.config.mesh.fsdp} x {p.config.mesh.tensor}"
    line = f"{'*' if star else ' '} {mesh:<22}{c.model.remat:<11}{p.sequences:>10}{p.peak / GIB:>10.1f}"
    if p.figures is None:
        return line + "  does not fit"
    q = p.figures["projection"]
    ratio = p.figures["matrix_flops"]["executed_over_useful"]
    return f"{line}{ratio:>17.3f}{q['seconds']:>9.3g}{p.rate:>15,.0f}{q['useful_mfu']:>12.1%}"


def text(found: Found) -> str:
    """The table, fastest first, and the line to paste."""
    return "\n".join(
        [
            "projections, not measurements; * nothing beats it in both speed and memory",
            HEADER,
            *(row(p, p in found.pareto) for p in sorted(found.points, key=lambda p: (-p.rate, p.peak))),
            f"best within {FULL:.0%} of memory: {found.best.flags}",
        ]
    )
