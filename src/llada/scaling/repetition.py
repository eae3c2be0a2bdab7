"""Data-limited runs: losses against epochs over the same unique tokens, and where diffusion overtakes the ARM.

The claim under test is that of "Diffusion language models are super data learners" (arXiv 2511.03276): with few unique
tokens and enough epochs, a diffusion model ends below an autoregressive one of its size. Its figure here is a bound,
so a crossover in the figures is one of the models too; none seen does not mean that there is none.
Units: epochs, tokens, nats per token.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llada.scaling.results import Result


class Curve(NamedTuple):
    """Held-out loss against epochs of one family, size and corpus; means over seeds, epochs rising."""

    objective: str
    size: str
    parameters: int  # without embeddings
    unique_tokens: int
    epochs: tuple[float, ...]
    loss: tuple[float, ...]
    stderr: tuple[float, ...]  # of the Monte Carlo estimate; 0 for an ARM

    @property
    def best(self) -> tuple[float, float]:
        """(epochs, loss) of the lowest reading."""
        i = min(range(len(self.loss)), key=self.loss.__getitem__)
        return self.epochs[i], self.loss[i]

    def at(self, epochs: float) -> float:
        """The loss there, between readings by interpolation in log epochs."""
        return float(np.interp(math.log(epochs), np.log(self.epochs), self.loss))

    @property
    def still_falling(self) -> bool:
        """Whether the lowest reading is the last: more epochs may lower it."""
        return self.best[0] == self.epochs[-1]


class Crossover(NamedTuple):
    """Where diffusion overtakes the ARM of its size on the same unique tokens, as epochs of the first such reading.

    `same_epochs`: its bound is below the ARM's loss after equally many epochs. `below_best`: it is below the lowest
    loss that the ARM reaches at all. None: not up to `until` epochs, where the shorter of the two
    curves ends (`below_best` looks at all of LLaDA's readings).
    """

    size: str
    parameters: int
    unique_tokens: int
    same_epochs: float | None
    below_best: float | None
    until: float
    diffusion_best: tuple[float, float]  # epochs, loss
    autoregressive_best: tuple[float, float]
    diffusion_still_falling: bool


def is_data_limited(results: Iterable[Result]) -> bool:
    """Whether the readings are those of the data-limited mode."""
    return any(r.mode == "repeat" for r in results)


def curves(results: Iterable[Result]) -> list[Curve]:
    """One per family, size and number of unique tokens, by unique tokens, then size, then family."""
    groups: dict[tuple, dict[float, list[Result]]] = {}
    for r in results:
        if r.measured and r.epochs is not None and r.unique_tokens is not None:
            key = (r.unique_tokens, r.non_embedding_parameters, r.objective, r.size)
            groups.setdefault(key, {}).setdefault(float(f"{r.epochs:.4g}"), []).append(r)
    found = []
    for (unique_tokens, parameters, objective, size), readings in sorted(groups.items()):
        epochs = tuple(sorted(readings))
        seeds = [readings[e] for e in epochs]
        loss = tuple(sum(r.nats_per_token for r in rs) / len(rs) for rs in seeds)
        stderr = tuple(math.hypot(*(r.monte_carlo_stderr or 0.0 for r in rs)) / len(rs) for rs in seeds)
        found.append(Curve(objective, size, parameters, unique_tokens, epochs, loss, stderr))
    return found


def _pairs(results: Iterable[Result]) -> list[dict[str, Curve]]:
    by_key: dict[tuple, dict[str, Curve]] = {}
    for curve in curves(results):
        by_key.setdefault((curve.unique_tokens, curve.size), {})[curve.objective] = curve
    return list(by_key.values())


def unpaired(results: Iterable[Result]) -> list[str]:
    """A sentence for every size and number of unique tokens that one family alone was read at."""
    alone = [curve for pair in _pairs(results) if len(pair) == 1 for curve in pair.values()]
    return [f"Size {c.size} at {c.unique_tokens:,} unique tokens was read for {c.objective} alone." for c in alone]


def crossovers(results: Iterable[Result]) -> list[Crossover]:
    """One per size and number of unique tokens that both families were read at, in the order of `curves`."""
    found = []
    for pair in _pairs(results):
        if {"diffusion", "autoregressive"} <= pair.keys():
            diffusion, arm = pair["diffusion"], pair["autoregressive"]
            until = min(diffusion.epochs[-1], arm.epochs[-1])
            readings = list(zip(diffusion.epochs, diffusion.loss, strict=True))
            both = [(e, loss) for e, loss in readings if arm.epochs[0] <= e <= until]
            found.append(
                Crossover(
                    size=diffusion.size,
                    parameters=diffusion.parameters,
                    unique_tokens=diffusion.unique_tokens,
                    same_epochs=next((e for e, loss in both if loss < arm.at(e)), None),
                    below_best=next((e for e, loss in readings if loss < arm.best[1]), None),
                    until=until,
                    diffusion_best=diffusion.best,
                    autoregressive_best=arm.best,
                    diffusion_still_falling=diffusion.still_falling,
                )
            )
    return found
