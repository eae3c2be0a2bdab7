"""How long runs will take: from runs that are finished, from a product timed here, or from an accelerator's data sheet.

All of these are estimates, and each says what it rests on.
"""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada import accounting
from llada.errors import UserError
from llada.scaling.grid import PlannedRun
from llada.scaling.results import Result

# Share of its matrix peak that training reaches. On TPUs, published runs of dense models reach 0.4 to 0.7; small widths
# reach less everywhere. Only for planning: a finished run takes its place.
UTILISATION = 0.4
OVERHEAD_SECONDS = 10.0  # to compile, read the held-out rows and save; nothing beside a long run


class Rate(NamedTuple):
    """FLOPs (all matrix products) a second, by size name where known; `basis` says where they come from."""

    typical: float
    by_size: dict[str, float]
    basis: str
    overhead: float = OVERHEAD_SECONDS  # of every run

    def seconds(self, run: PlannedRun) -> float:
        """Of a whole run."""
        return self.overhead + run.flops / self.by_size.get(run.size, self.typical)


def on_device(machine: str, chips: int) -> Rate:
    """A named accelerator, such as v5p, at a stated share of its bfloat16 peak. UserError listing the known names."""
    wanted = machine.lower().replace("tpu", "").strip()
    for name, peak in accounting.PEAK_FLOPS.items():
        if wanted in (name.lower(), name.lower().replace("tpu", "").strip()):
            basis = f"{chips} x {name} at {UTILISATION:.0%} of {peak:.3g} FLOP/s (assumed)"
            return Rate(UTILISATION * peak * chips, {}, basis)
    raise UserError(f"--machine={machine} is not one of {', '.join(accounting.PEAK_FLOPS)}")


def measured(results: Sequence[Result]) -> Rate | None:
    """What finished runs reached, and what they took beside training; None where there are none.

    A run's seconds are those of its wall clock, its tokens per second those of its steps alone, where it had enough of
    them to tell; the difference is starting, compiling, reading the held-out rows and saving.
    """
    rates: dict[str, list[float]] = {}
    overheads = []
    for r in results:
        if not r.seconds:
            continue
        rate = r.tokens_per_second * r.flops_exact / r.tokens if r.tokens_per_second else r.flops_exact / r.seconds
        rates.setdefault(r.size, []).append(rate)
        overheads.append(max(r.seconds - r.flops_exact / rate, 0.0))
    if not rates:
        return None
    by_size = {size: statistics.median(values) for size, values in rates.items()}
    basis = f"as in {len(overheads)} finished runs"
    return Rate(statistics.median(by_size.values()), by_size, basis, statistics.median(overheads))


def here(dtype: str, size: int = 1024) -> Rate:
    """This machine: the best of a few square products, times the share that training reaches."""
    peaks = accounting.PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peaks:
        return on_device(jax.devices()[0].device_kind, jax.device_count())
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - start)
    peak = 2 * size**3 / min(seconds)
    basis = f"{UTILISATION:.0%} of the {peak:.2g} FLOP/s of a {dtype} product timed here"
    return Rate(UTILISATION * peak, {}, basis)
