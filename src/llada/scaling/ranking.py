"""Variants of an objective ranked: paired differences of loss, and the share of the FLOPs that a loss takes.

A cell is one size at one budget. In a cell, runs of a variant and of its plain family with the same seed have the same
initial weights and rows (and all runs the same held-out masks), so the two losses of a seed are a pair. Pairs of all
cells are taken to have one covariance (2 x 2), estimated within cells: over n seeds and c cells with c (n - 1) degrees
of freedom. A handful of seeds tells little by itself; all cells together tell enough for Student's t.

The share: a line of the mean loss in log C through a size's budgets, for the variant and for the plain family; the
budget at which the variant's line is down to where the plain line ends, over that end, the largest budget. Below 1 the
variant saves FLOPs.

Units: FLOPs, nats per token; natural logarithms. Shapes: S bootstrap draws, B budgets of a size; the last axis of two
is (plain, variant).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada.scaling.study import interval

DRAWS = 20_000
LEVEL = 0.95


class Cell(NamedTuple):
    """One size at one budget: losses of equal seeds, in the same order."""

    size: str
    budget: float
    plain: tuple[float, ...]
    variant: tuple[float, ...]

    @property
    def differences(self) -> np.ndarray:
        """Of the variant over the plain family, by seed."""
        return np.subtract(self.variant, self.plain)


class Estimate(NamedTuple):
    """A value and the ends of its interval: None without one, where no cell has two seeds; inf where there is no end.

    `sure`: whether the interval of the level that allows for all comparisons is on one side of no difference.
    """

    value: float
    low: float | None
    high: float | None
    sure: bool = False

    def to_json(self) -> dict[str, Any]:
        """With None for what is not finite."""
        finite = {
            k: v if v is not None and math.isfinite(v) else None for k, v in self._asdict().items() if k != "sure"
        }
        return finite | {"sure": self.sure}


class OfSize(NamedTuple):
    """The share at one size: of `largest`, the FLOPs at whose end the plain line has the loss `target`.

    `extrapolated`: "below" the smallest budget, "above" the largest one, or None.
    """

    size: str
    target: float
    largest: float
    share: Estimate
    extrapolated: str | None


class Ranked(NamedTuple):
    """One variant against its plain family.

    differences   of every cell, in the order of `cells`
    difference    mean over cells
    by_size       shares, of sizes with two budgets or more
    share         geometric mean over these sizes; None where there is none
    dof           degrees of freedom of all intervals; 0: there are none
    """

    cells: tuple[Cell, ...]
    differences: tuple[Estimate, ...]
    difference: Estimate
    by_size: tuple[OfSize, ...]
    share: Estimate | None
    dof: int


def rank(
    cells: Mapping[str, Sequence[Cell]], draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> dict[str, Ranked]:
    """Every variant that has a cell, the best first: by its share, else by its mean difference.

    Intervals are for one variant each. What is `sure` is so at 1 - (1 - level) / k of k variants (Bonferroni).
    """
    ranked = {name: _rank(of, draws, level, 1 - (1 - level) / len(cells), seed) for name, of in cells.items() if of}

    def place(name: str) -> tuple[bool, float]:
        share, difference = ranked[name].share, ranked[name].difference
        return share is None, difference.value if share is None else share.value

    return {name: ranked[name] for name in sorted(ranked, key=place)}


def _rank(cells: Sequence[Cell], draws: int, level: float, sure_level: float, seed: int) -> Ranked:
    sizes = list(dict.fromkeys(cell.size for cell in cells))  # in the order they come in
    cells = sorted(cells, key=lambda cell: (sizes.index(cell.size), cell.budget))
    rng = np.random.default_rng(seed)  # of every variant alone, so that no other changes its figures
    means_C2 = np.array([(np.mean(cell.plain), np.mean(cell.variant)) for cell in cells])
    noise_SC2, dof = _noise(cells, draws, rng)

    def estimate(value: float, draws_S: np.ndarray, even: float) -> Estimate:
        """`even`: the value of no difference."""
        if not dof:
            return Estimate(value, None, None)
        low, high = interval(draws_S, sure_level)
        return Estimate(value, *interval(draws_S, level), sure=not low <= even <= high)

    d_C, d_SC = np.diff(means_C2)[..., 0], np.diff(means_C2 + noise_SC2)[..., 0]
    differences = tuple(estimate(float(d), d_S, 0.0) for d, d_S in zip(d_C, d_SC.T, strict=True))
    by_size, logs, logs_S = [], [], []
    for size, group in itertools.groupby(range(len(cells)), key=lambda i: cells[i].size):
        at = list(group)
        log_budget_B = np.log([cells[i].budget for i in at])
        if len(at) < 2:
            continue
        value, target = log_share(log_budget_B, means_C2[at])
        draws_S, _ = log_share(log_budget_B, (means_C2 + noise_SC2)[:, at])
        share = estimate(*_exp(value, draws_S), 1.0)
        place = "above" if value > 0 else "below" if value < log_budget_B[0] - log_budget_B[-1] else None
        by_size.append(OfSize(size, float(target), cells[at[-1]].budget, share, place))
        logs.append(value)
        logs_S.append(draws_S)
    pooled = None
    if logs:
        with np.errstate(invalid="ignore"):  # inf less inf: nan, a draw without a share
            pooled = estimate(*_exp(np.mean(logs), np.mean(logs_S, axis=0)), 1.0)
    difference = estimate(float(d_C.mean()), d_SC.mean(axis=1), 0.0)
    return Ranked(tuple(cells), differences, difference, tuple(by_size), pooled, dof)


def _exp(value: Any, draws_S: np.ndarray) -> tuple[float, np.ndarray]:
    with np.errstate(over="ignore"):
        return float(np.exp(value)), np.exp(draws_S)


def _noise(cells: Sequence[Cell], draws: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(S, C, 2) errors of the cells' means, and the degrees of freedom of their covariance.

    Bivariate Student's t: normal draws of the pooled covariance, each over the root of a chi-square that all cells of
    the draw share, as they share the estimate. Any linear function of the means then has exactly its t interval.
    """
    pairs = [np.stack([cell.plain, cell.variant], axis=-1) for cell in cells]
    residuals_R2 = np.concatenate([pair - pair.mean(axis=0) for pair in pairs])
    dof = sum(len(pair) - 1 for pair in pairs)
    if not dof:
        return np.zeros((draws, len(cells), 2)), 0
    # Rows of a triangle T with T'T = the residuals' products, where the covariance may be singular.
    triangle = np.linalg.qr(np.pad(residuals_R2, ((0, 2), (0, 0))), mode="r")
    scale_S = 1 / np.sqrt(rng.chisquare(dof, draws))
    normal_SC2 = rng.normal(size=(draws, len(cells), 2)) @ triangle
    count_C = np.array([len(pair) for pair in pairs])
    return normal_SC2 * scale_S[:, None, None] / np.sqrt(count_C)[:, None], dof


def log_share(log_budget_B: np.ndarray, means_B2: np.ndarray) -> tuple[Any, Any]:
    """(share's logarithm, target) of one size, for (..., B, 2) means.

    inf where the variant's line does not fall and its end is above the target: it never gets there; -inf where it does
    not fall and is below, so that the smallest budget would do.
    """
    centred_B = log_budget_B - log_budget_B.mean()
    slope = centred_B @ means_B2 / (centred_B @ centred_B)  # (..., 2)
    end = means_B2.mean(axis=-2) + slope * centred_B[-1]
    target, excess = end[..., 0], end[..., 1] - end[..., 0]
    falling = slope[..., 1] < 0
    never = np.where(excess == 0, 0.0, np.copysign(np.inf, excess))
    return np.where(falling, excess / np.where(falling, -slope[..., 1], 1.0), never), target
