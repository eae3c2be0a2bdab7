"""Which mesh, remat and batch per device train a config fastest on a slice, and what memory each takes.

The batch of a step stays the config's: a smaller batch per device means more microbatches. Arithmetic rules out what
cannot fit; the rest is compiled. Memory grows in proportion to the batch per device, so every compilation, one that
does not fit included, says which batch to try next. Remat and batch are searched on one mesh, and the best of them is
then compiled on the others: at minutes a compilation, all combinations would take hours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from llada import accounting
from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.errors import UserError
from llada.planning import programs, report
from llada.planning.fitting import wanted_bytes
from llada.planning.topology import GIB, Slice

REMAT = ("full", "attention", "dots", "none")  # from the least memory to the most
LARGE = 16  # devices of a slice from which on splitting parameters over all of them is not tried first
FULL = 0.92  # of HBM: the rest is for fragmentation and the runtime


class Candidate(NamedTuple):
    """A config that was compiled, `sequences` at once on a device, and the memory it needs; no `figures` if too much.

    `peak` is in bytes per chip.
    """

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
        """The command line that selects it."""
        c = self.config
        mesh = f"--config.mesh.data={c.mesh.data} --config.mesh.fsdp={c.mesh.fsdp} --config.mesh.tensor={c.mesh.tensor}"
        return f"{mesh} --config.model.remat={c.model.remat} --config.train.microbatches={c.train.microbatches}"


class Result(NamedTuple):
    """All candidates in the order of their compilation; the best; those that none beats in both speed and memory."""

    candidates: list[Candidate]
    best: Candidate
    pareto: list[Candidate]

    @property
    def figures(self) -> dict[str, Any]:
        """For JSON."""
        entries = [
            {
                "flags": c.flags,
                "sequences_per_device": c.sequences,
                "fits": c.fits,
                "peak_bytes": c.peak,
                "pareto": c in self.pareto,
                "plan": c.figures,
            }
            for c in self.candidates
        ]
        return {"best": self.best.flags, "method": report.METHOD, "points": entries}


Attempt = Callable[[MeshConfig, str, int], Candidate]  # mesh, remat, sequences at once on a device


def search(config: Config, hardware: Slice, now: Callable[[str], None], done: Callable[[str], None]) -> Result:
    """Compile candidates, about ten. UserError where none fits, in one line.

    `now` is called with what is being compiled, `done` with the header and the row of each candidate.
    """
    candidates: list[Candidate] = []
    best = None

    def attempt(mesh: MeshConfig, remat: str, sequences: int) -> Candidate:
        axes = f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat {remat}"
        now(f"{len(candidates) + 1}: {axes}, {sequences} sequences per device")
        if not candidates:
            done(HEADER)  # not before it is clear that there is something to try: a mistake gets one line
        candidates.append(_compile(config, hardware, mesh, remat, sequences))
        done(row(candidates[-1]))
        return candidates[-1]

    for mesh in candidate_meshes(config, hardware):
        if best is None:
            _on_mesh(config, hardware, mesh, attempt)
            best = _best(candidates, hardware)
        elif _per_device(config, mesh) % best.sequences == 0:
            attempt(mesh, best.config.model.remat, best.sequences)
    best = _best(candidates, hardware)
    if best is None:
        least = min(candidates, key=lambda c: c.peak)
        raise UserError(
            f"does not fit {hardware.chips} chips of {hardware.name} at any remat: the least is {least.peak / GIB:.1f} "
            f"GiB of {hardware.chip.capacity / GIB:.1f} a chip with {least.flags}; use a larger slice, or a smaller "
            "model"
        )
    fitting = [c for c in candidates if c.fits]
    return Result(candidates, best, [c for c in fitting if not any(_beats(other, c) for other in fitting)])


def _best(candidates: list[Candidate], hardware: Slice) -> Candidate | None:
    """The fastest that leaves some memory free, or of those that fit at all; None where none does."""
    fitting = [c for c in candidates if c.fits]
    within = [c for c in fitting if _leaves_room(c, hardware)]
    return max(within or fitting, key=lambda c: c.rate, default=None)


def _leaves_room(candidate: Candidate, hardware: Slice) -> bool:
    return candidate.fits and candidate.peak <= FULL * hardware.chip.capacity


def _on_mesh(config: Config, hardware: Slice, mesh: MeshConfig, attempt: Attempt) -> None:
    """Every remat on a mesh, each with the largest batches that fit."""
    limit = _per_device(config, mesh)
    for remat in REMAT:
        limit = _largest_batch(config, hardware, mesh, remat, limit, attempt)
        if not limit:
            break  # less recomputation needs more memory still


def candidate_meshes(config: Config, hardware: Slice) -> list[MeshConfig]:
    """A few meshes that arithmetic allows, the most promising first.

    FSDP over half a slice comes first: memory, links and bytes are best where parameters are split furthest, but over
    all of a large slice the compiler moves more bytes than it has to. Then the middle, the smallest, and all of it.
    Tensor parallelism is left at the config's: at these sizes it never pays on a torus that FSDP can fill.
    """
    devices, tensor = len(hardware.devices), config.mesh.tensor
    if devices // hardware.slices % tensor:
        raise UserError(
            f"--config.mesh.tensor={tensor} does not divide the {devices // hardware.slices} devices of a slice"
        )
    widest = devices // hardware.slices // tensor
    meshes = []
    for fsdp in (n for n in range(widest, 0, -1) if widest % n == 0):
        mesh = MeshConfig(data=devices // fsdp // tensor, fsdp=fsdp, tensor=tensor)
        divides = config.model.width % fsdp == 0 and config.train.batch_size % (devices // tensor) == 0
        if divides and _floor(config, mesh, 1) * hardware.chip.devices <= hardware.chip.capacity:
            meshes.append(mesh)
    if not meshes:
        _refuse(config, hardware, devices // tensor, tensor)
    narrower = [mesh for mesh in meshes if mesh.fsdp < widest]
    chosen = dict.fromkeys([*narrower[:1], *narrower[len(narrower) // 2 :][:1], *narrower[-1:], *meshes[:1]])
    return list(chosen) if widest >= LARGE else [*meshes[:1], *(mesh for mesh in chosen if mesh != meshes[0])]


def _refuse(config: Config, hardware: Slice, ways: int, tensor: int) -> NoReturn:
    widest = MeshConfig(data=1, fsdp=len(hardware.devices) // hardware.slices // tensor, tensor=tensor)
    needs = _floor(config, widest, 1) * hardware.chip.devices
    if needs > hardware.chip.capacity:
        raise UserError(
            f"does not fit {hardware.chips} chips of {hardware.name} at any remat: parameters, moments and one "
            f"sequence a device are {needs / GIB:.1f} GiB of {hardware.chip.capacity / GIB:.1f} a chip; use a larger "
            "slice"
        )
    raise UserError(
        f"--config.train.batch_size={config.train.batch_size} and --config.model.width={config.model.width} divide "
        f"over no mesh of {len(hardware.devices)} devices; use a multiple of {ways} for the batch, or a smaller slice"
    )


def _floor(config: Config, mesh: MeshConfig, sequences: int) -> float:
    """Bytes a device cannot do without: float32 parameters and moments, and the residual stream of every layer."""
    m = config.model
    state = 12.0 * accounting.parameters(m).total / (mesh.fsdp * mesh.tensor)
    return state + 2.0 * sequences * config.data.sequence_length * m.width * m.layers


def _per_device(config: Config, mesh: MeshConfig) -> int:
    """Sequences of a step per device."""
    return config.train.batch_size // ((mesh.data or 1) * mesh.fsdp)


def _largest_batch(config: Config, hardware: Slice, mesh: MeshConfig, remat: str, limit: int, attempt: Attempt) -> int:
    """The largest batch per device up to `limit` that leaves some memory free, from a good guess; 0 where none does."""
    per_device = _per_device(config, mesh)
    sizes = [n for n in range(1, min(per_device, limit) + 1) if per_device % n == 0]
    while sizes and _floor(config, mesh, sizes[-1]) * hardware.chip.devices > hardware.chip.capacity:
        sizes.pop()
    low, high = 0, len(sizes) - 1  # the indices left to try
    index = high
    while low <= high:
        candidate = attempt(mesh, remat, sizes[index])
        if _leaves_room(candidate, hardware):
            low = index + 1
            index = high
        else:
            high = index - 1
            room = FULL * hardware.chip.capacity / candidate.peak
            index = max([i for i in range(low, high + 1) if sizes[i] <= sizes[index] * room], default=low)
    return sizes[high] if high >= 0 else 0


def _compile(config: Config, hardware: Slice, mesh_config: MeshConfig, remat: str, sequences: int) -> Candidate:
    microbatches = _per_device(config, mesh_config) // sequences
    changed = dataclasses.replace(
        config,
        mesh=mesh_config,
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, microbatches=microbatches),
    )
    mesh = mesh_lib.make(mesh_config, hardware.devices)
    program = programs.make(changed, mesh, "train", programs.Workload())
    compiled = programs.lower_and_compile(program, mesh)
    if compiled.refusal:
        return Candidate(changed, sequences, wanted_bytes(compiled.refusal) * hardware.chip.devices, None)
    figures = report.figures(changed, hardware, mesh, program, compiled)
    peak = figures["hbm_bytes"]["peak"]
    # A program that compiles may still not fit: the compiler may allocate more than the capacity.
    return Candidate(changed, sequences, peak, figures if peak <= hardware.chip.capacity else None)


def _beats(other: Candidate, candidate: Candidate) -> bool:
    no_worse = other.rate >= candidate.rate and other.peak <= candidate.peak
    return no_worse and (other.rate > candidate.rate or other.peak < candidate.peak)


HEADER = (
    f"  {'data x fsdp x tensor':<22}{'remat':<11}{'per device':>10}{'peak GiB':>10}{'executed/useful':>17}"
    f"{'s/step':>9}{'tokens/s/chip':>15}{'useful MFU':>12}"
)


def row(candidate: Candidate, star: bool = False) -> str:
    """One line under HEADER."""
    c = candidate.config
    mesh = f"{c.mesh.data} x {c.mesh.fsdp} x {c.mesh.tensor}"
    memory = f"{candidate.sequences:>10}{candidate.peak / GIB:>10.1f}"
    line = f"{'*' if star else ' '} {mesh:<22}{c.model.remat:<11}{memory}"
    if candidate.figures is None:
        return f"{line}  does not fit"
    p, ratio = candidate.figures["projection"], candidate.figures["matrix_flops"]["executed_over_useful"]
    return f"{line}{ratio:>17.3f}{p['seconds']:>9.3g}{candidate.rate:>15,.0f}{p['useful_mfu']:>12.1%}"


def text(result: Result) -> str:
    """The table, fastest first, and the line to paste."""
    ordered = sorted(result.candidates, key=lambda c: (-c.rate, c.peak))
    return "\n".join(
        [
            "projections, not measurements; * nothing beats it in both speed and memory",
            HEADER,
            *(row(candidate, candidate in result.pareto) for candidate in ordered),
            f"best within {FULL:.0%} of memory: {result.best.flags}",
        ]
    )
