"""TPU slices by name: those that exist, JAX devices to compile for, and what their chips can do.

Nothing here needs a TPU: libtpu describes the devices of any slice and compiles for them.
"""

import contextlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from llada import accounting
from llada.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One generation. Rates are per chip and second; peak FLOP/s are in `accounting.PEAK_FLOPS`.

    capacity    bytes of HBM per chip that a program may use, as the compiler's errors report
    hbm         bytes/s
    ici         bytes/s into a chip along one closed axis of the torus (both neighbours at once); half where it is open
    clock       Hz of the matrix units: peak FLOP/s over their FLOPs per cycle
    axes        2 or 3 axes of the torus
    largest     chips of the largest slice
    devices     JAX devices per chip
    """

    kind: str
    capacity: float
    hbm: float
    ici: float
    clock: float
    axes: int
    largest: int
    devices: int

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s of a chip."""
        return accounting.PEAK_FLOPS[self.kind] * self.devices

    @property
    def flops_per_cycle(self) -> float:
        """Of a device at its peak."""
        return self.peak_flops / self.devices / self.clock


# HBM and ICI rates: Google's public data sheets, and the lower figure where sources differ.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1.2e12, 90e9, 1.05e9, 3, 4096, 1),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 0.819e12, 90e9, 1.5e9, 2, 256, 1),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2.765e12, 180e9, 1.75e9, 3, 8960, 1),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1.638e12, 180e9, 1.75e9, 2, 256, 1),
    "tpu7x": Chip("TPU7x", 2 * 94.75 * GIB, 7.38e12, 200e9, 2.2e9, 3, 9216, 2),
}
DCN = 6.25e9  # bytes/s into a chip from other slices: 200 Gbit/s a host of four chips. An assumption.

MOST_SLICES, MOST_CHIPS = 256, 2**16

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


class Slice(NamedTuple):
    """`slices` equal slices, called `name`, of `shape` chips each; `devices` of all of them, slice by slice."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: list

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    def closed(self, axis: int) -> bool:
        """Whether the torus closes along an axis: from 16 chips on two axes, in whole cubes of 4x4x4 on three."""
        if self.chip.axes == 2:
            return self.shape[axis] == 16
        return all(size % 4 == 0 for size in self.shape)


def parse(name: str) -> tuple[str, Chip, tuple[int, ...]]:
    """`("v5p", chip, (4, 4, 8))` from "v5p:4x4x8". UserError, listing the valid names, for any other."""
    generation, _, text = name.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"--topology={name}: {generation!r} is no TPU generation; choose from {', '.join(CHIPS)}: v5p:4x4x8"
        )
    chip = CHIPS[generation]
    shape = tuple(int(size) for size in text.split("x")) if re.fullmatch(r"[0-9]{1,5}(x[0-9]{1,5})*", text) else ()
    if chip.axes == 2:
        if text not in _FLAT:
            raise UserError(f"--topology={name}: {generation} slices are {', '.join(_FLAT)}")
    else:
        cubes = len(shape) == 3 and list(shape) == sorted(shape) and all(size and size % 4 == 0 for size in shape)
        if text not in _SMALL and not (cubes and math.prod(shape) <= chip.largest):
            raise UserError(
                f"--topology={name}: {generation} slices are {', '.join(_SMALL)}, or AxBxC with A <= B <= C, all "
                f"multiples of 4, at most {chip.largest} chips, such as 4x4x8"
            )
    return generation, chip, shape


def describe(name: str, slices: int = 1) -> Slice:
    """Slices called `name` with JAX devices to compile for. UserError for a bad name, or without libtpu."""
    _, chip, shape = parse(name)
    if not 1 <= slices <= MOST_SLICES:
        raise UserError(f"--slices={slices} must be from 1 to {MOST_SLICES}")
    if (chips := math.prod(shape) * slices) > MOST_CHIPS:
        raise UserError(f"--slices={slices} of {name} are {chips:,} chips; a plan is for {MOST_CHIPS:,} at most")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu, on any machine: pip install 'llada-jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks a cloud's metadata server, for minutes
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may be compiling, or training
    from jax.experimental import topologies

    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.kind == "TPU v4":
        options["chip_config_name"] = "megacore"  # a device is a chip, as on real v4 slices
    with quiet():
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    return Slice(name, chip, shape, slices, list(devices))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what libtpu writes to standard error, beneath Python: harmless lines about missing hosts."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
