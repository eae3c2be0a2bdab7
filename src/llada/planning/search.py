"""Which mesh, remat and batch per device train a config fastest on a slice, and what memory each takes.

The batch of a step stays the config's: a smaller batch per device means more microbatches. Arithmetic rules out what
cannot fit; the rest is compiled. Memory grows in proportion to the batch per device, so every compilation, one that
does not fit included, says which batch to try next.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llada import accounting
from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.errors import UserError
from llada.planning import programs, report
from llada.planning.topology import GIB, Slice

REMAT = ("full", "dots", "none")  # from the least memory to the most
MESHES = 3
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


def search(config: Config, place: Slice, say: Callable[[str], None], most: int = 24) -> Found:
    """Compile at most `most` candidates. UserError where none fits, in one line."""
    meshes = candidate_meshes(config, place)
    points: list[Point] = []
    for mesh in meshes:
        limit = _per_device(config, mesh)
        for remat in REMAT:
            for point in _largest_batches(config, place, mesh, remat, limit, say, len(points)):
                points.append(point)
                if len(points) >= most:
                    break
            fitting = [p for p in points if p.config.mesh == mesh and p.config.model.remat == remat and p.fits]
            if not fitting or len(points) >= most:
                break  # less recomputation needs more memory still
            limit = max(p.sequences for p in fitting)
    fitting = [p for p in points if p.fits]
    if not fitting:
        least = min(points, key=lambda p: p.peak)
        raise UserError(
            f"does not fit {place.chips} chips of {place.name} at any remat: the least is {least.peak / GIB:.1f} GiB "
            f"of {place.chip.capacity / GIB:.1f} a chip with {least.flags}; use a larger slice, or a smaller model"
        )
    within = [p for p in fitting if p.peak <= FULL * place.chip.capacity] or fitting
    pareto = [p for p in fitting if not any(_beats(other, p) for other in fitting)]
    return Found(points, max(within, key=lambda p: p.rate), pareto)


def candidate_meshes(config: Config, place: Slice) -> list[MeshConfig]:
    """A few meshes from all parameters split as far as a slice goes to hardly at all; those that arithmetic allows.

    Tensor parallelism is left at the config's: at these sizes it never pays on a torus that FSDP can fill.
    """
    devices, tensor = len(place.devices), config.mesh.tensor
    if devices // place.slices % tensor:
        raise UserError(
            f"--config.mesh.tensor={tensor} does not divide the {devices // place.slices} devices of a slice"
        )
    sizes = [n for n in range(1, devices // place.slices // tensor + 1) if devices // place.slices // tensor % n == 0]
    found = []
    for fsdp in reversed(sizes):
        mesh = MeshConfig(data=devices // fsdp // tensor, fsdp=fsdp, tensor=tensor)
        divides = config.model.width % fsdp == 0 and config.train.batch_size % (mesh.data * fsdp) == 0
        if divides and _floor(config, mesh, 1) * place.chip.devices <= place.chip.capacity:
            found.append(mesh)
    if not found:
        _refuse(config, place, devices // tensor, tensor)
    # Both ends and the middle.
    chosen = {0, len(found) // 2, len(found) - 1} if len(found) > MESHES else range(len(found))
    return [found[i] for i in sorted(chosen)]


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


def _largest_batches(config, place, mesh, remat, limit, say, done) -> Iterator[Point]:
    """Compile towards the largest batch per device that fits, from a good guess."""
    whole = _per_device(config, mesh)
    sizes = [n for n in range(1, min(whole, limit) + 1) if whole % n == 0]
    while sizes and _floor(config, mesh, sizes[-1]) * place.chip.devices > place.chip.capacity:
        sizes.pop()
    low, high = 0, len(sizes) - 1  # what is left to try
    at = high
    while low <= high:
        sequences = sizes[at]
        say(
            f"{done + 1}: data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat {remat}, "
            f"{sequences} sequences per device"
        )
        point = _compile(config, place, mesh, remat, sequences)
        done += 1
        yield point
        if point.fits:
            low = at + 1
            at = high
        else:
            high = at - 1
            room = FULL * place.chip.capacity / point.peak
            at = max([i for i in range(low, high + 1) if sizes[i] <= sequences * room], default=low)


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


def wanted_bytes(refusal: str) -> float:
    """Bytes a device would need, from the compiler's refusal; infinite where it does not say."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", refusal)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else float("inf")


def _beats(other: Point, point: Point) -> bool:
    better = other.rate >= point.rate and other.peak <= point.peak
    return better and (other.rate > point.rate or other.peak < point.peak)


def text(found: Found) -> str:
    """The table, fastest first, and the line to paste."""
    lines = [
        "projections, not measurements; * nothing beats it in both speed and memory",
        f"  {'data x fsdp x tensor':<22}{'remat':<7}{'per device':>10}{'peak GiB':>10}{'executed/useful':>17}"
        f"{'s/step':>9}{'tokens/s/chip':>15}{'useful MFU':>12}",
    ]
    for p in sorted(found.points, key=lambda p: (-p.rate, p.peak)):
        c, mesh = p.config, f"{p.config.mesh.data} x {p.config.mesh.fsdp} x {p.config.mesh.tensor}"
        line = f"{'*' if p in found.pareto else ' '} {mesh:<22}{c.model.remat:<7}{p.sequences:>10}{p.peak / GIB:>10.1f}"
        if p.figures is None:
            lines.append(line + "  does not fit")
            continue
        q = p.figures["projection"]
        ratio = p.figures["matrix_flops"]["executed_over_useful"]
        lines.append(f"{line}{ratio:>17.3f}{q['seconds']:>9.3g}{p.rate:>15,.0f}{q['useful_mfu']:>12.1%}")
    return "\n".join([*lines, f"best within {FULL:.0%} of memory: {found.best.flags}"])
