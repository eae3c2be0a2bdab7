"""Readings of sweeps made up from known laws: L(N, D) = E + A/N^a + B/D^b of each family."""

import dataclasses
import itertools
import math

import numpy as np

from llada.scaling.parametric import Parametric
from llada.scaling.results import FINISHED, Result
from llada.scaling.study import Study

LAWS = {
    "diffusion": Parametric(1.5, 400.0, 0.32, 2000.0, 0.32),
    "autoregressive": Parametric(1.5, 300.0, 0.32, 900.0, 0.32),
}
BUDGETS = (1e18, 1e19, 1e20, 1e21)
EXACT = {"diffusion": 1.3, "autoregressive": 1.2}  # exact FLOPs over 6ND


def change(fitted: Study, **of_series) -> Study:
    """The study with fields of its series replaced: `minima=lambda key, fit: ...`."""
    series = {
        family: fit._replace(**{field: new(family, fit) for field, new in of_series.items()})
        for family, fit in fitted.series.items()
    }
    return fitted._replace(series=series)


def reading(objective: str, budget: float, parameters: float, loss: float, **changes) -> Result:
    """A finished run of 6ND = `budget`."""
    tokens = int(budget / 6 / parameters)
    fields = dict(
        run=f"{objective}_N{parameters:.3g}_C{budget:.3g}",
        objective=objective,
        size=f"N{parameters:.3g}",
        seed=0,
        mode="isoflop",
        matching="6nd",
        budget=budget,
        layers=2,
        width=64,
        parameters=int(1.25 * parameters),
        non_embedding_parameters=int(parameters),
        tokens=tokens,
        unique_tokens=10**13,
        epochs=tokens / 1e13,
        flops_6nd=budget,
        flops_exact=EXACT[objective] * budget,
        step=10,
        steps=10,
        batch_size=8,
        peak_learning_rate=1e-3,
        status=FINISHED,
        nats_per_token=loss,
        stderr=0.0123,
        monte_carlo_stderr=0.0031 if objective == "diffusion" else 0.0,
        bits_per_byte=0.4 * loss,
        tokens_per_second=1e5,
        seconds=60.0,
    )
    return Result(**(fields | changes))


def isoflop_readings(budgets=BUDGETS, families=tuple(LAWS), sizes=5, reach=3.0, noise=0.003, shift=1.0) -> list[Result]:
    """`sizes` from 1/reach to reach times shift x the best size of each budget."""
    rng = np.random.default_rng(0)
    found = []
    for family in families:
        for budget in budgets:
            best = shift * float(LAWS[family].optimal(budget)[0])
            for n in best * np.geomspace(1 / reach, reach, sizes):
                loss = float(LAWS[family].loss(n, budget / 6 / n)) + noise * rng.normal()
                found.append(reading(family, budget, n, loss))
    return found


def variant(result: Result, name: str, gain: float, keys: str = "weight=flat", unbiased: bool = False) -> Result:
    """The reading of a variant whose loss is lower by `gain`."""
    own = dict(variant=name, variant_keys=keys, bound_trained=unbiased, run=f"{name}_{result.run}")
    return dataclasses.replace(result, nats_per_token=result.loss - gain, **own)


def ranked_readings(shares: dict[str, float], seeds=3, noise=0.004, slope=0.2, sizes=(1e5, 4e5)) -> list[Result]:
    """Of mode variants: plain LLaDA, and variants that need `shares` of its FLOPs; the line of each size is straight.

    Noise is common to the runs of a seed, and half as much again each run's own.
    """
    rng, found = np.random.default_rng(1), []
    for n, budget, seed in itertools.product(sizes, (2e11, 4e11), range(seeds)):
        common = noise * rng.normal()
        for name, share in {None: 1.0, **shares}.items():
            loss = 5 - 0.1 * math.log(n / sizes[0]) - slope * math.log(budget / share / 4e11)
            r = reading("diffusion", budget, n, loss + common + noise / 2 * rng.normal())
            r = dataclasses.replace(r, mode="variants", seed=seed, run=f"{r.run}_s{seed}", bound_trained=True)
            found.append(variant(r, name, 0.0, unbiased=name != "flat") if name else r)
    return found


def repeated_readings(losses: dict[str, list[float]], unique_tokens=10**6, parameters=1e6, epochs=None) -> list[Result]:
    """A run a family, read after 1, 2, 4, ... epochs (or `epochs`)."""
    found = []
    for family, values in losses.items():
        for e, loss in zip(epochs or [2**i for i in range(len(values))], values, strict=True):
            r = reading(family, 6 * parameters * unique_tokens * e, parameters, loss)
            run = f"{family}_{parameters:g}_U{unique_tokens}"
            found.append(
                dataclasses.replace(r, run=run, size="s", epochs=e, unique_tokens=unique_tokens, mode="repeat")
            )
    return found


def lost(result: Result, status: str, reason: str | None = None, loss: float | None = None) -> Result:
    """The reading without a figure; `loss`: nan of a run that diverged."""
    assert loss is None or not math.isfinite(loss), "a lost reading has no figure"
    return dataclasses.replace(result, status=status, reason=reason, nats_per_token=loss, bits_per_byte=None)


def only(fitted: Study, family: str) -> Study:
    """The study as if the other families had no runs."""
    return fitted._replace(series={family: fitted.series[family]})
