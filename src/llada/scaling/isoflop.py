"""The compute-optimal model of one budget: a parabola of loss in log N and its minimum (Chinchilla approach 2).

Chinchilla is arXiv 2203.15556, section 3.2; SMDM (arXiv 2410.18514, section 4) finds its optima so too. A parabola is
a narrow-range approximation: under L = E + A/N^a + B/D^b a profile is steeper on the side of the larger exponent, which
biases N* and L* where sizes reach far from the optimum. For Chinchilla's and Quokka's laws the bias is up to 1.3% of N*
and 0.001 nats within a factor of 3 of the optimum, 4% and 0.01 nats within 10. It is the same at all budgets, and the
exponents are free of it, as long as the sizes lie alike about each budget's optimum.
Units as in `laws`. Shapes: P runs of one budget, K = 3 coefficients, S draws.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llada.errors import UserError
from llada.scaling.laws import Point, columns


class Minimum(NamedTuple):
    """The compute-optimal model of one budget, with standard errors; `inside`: N* lies within the sizes tried."""

    budget: float
    parameters: float
    tokens: float
    loss: float
    log_parameters_stderr: float
    loss_stderr: float
    inside: bool


class Parabola:
    """L = c0 + c1 x + c2 x^2 through one budget's runs, x = log N less its mean, by weighted least squares.

    The weights are 1 / (stderr^2 + scatter^2). They do not depend on the losses, so that the coefficients are linear in
    the losses and a new set of losses costs one product. UserError: fewer than three different sizes.
    """

    def __init__(self, points: Sequence[Point], scatter: float = 0.0):
        _, n_P, d_P, self.loss_P, self.stderr_P = columns(points)
        seen = ", ".join(f"N {p.parameters:.3g} loss {p.loss:.4f}" for p in points)
        self.budget, self.seen = points[0].budget, f"budget {points[0].budget:.3g}: {seen}"
        if (sizes := len(set(n_P))) < 3:
            raise UserError(f"a parabola needs 3 sizes or more, there are {sizes}; train more at {self.seen}")
        self.centre, self.log_d = np.log(n_P).mean(), np.log(d_P).mean()
        self.x_P = np.log(n_P) - self.centre
        self.log_d_slope = self.x_P @ np.log(d_P) / (self.x_P @ self.x_P)
        design_PK = np.vander(self.x_P, 3, increasing=True)
        weighted_PK = design_PK / (self.stderr_P**2 + scatter**2)[:, None]
        self.covariance_KK = np.linalg.inv(design_PK.T @ weighted_PK)
        self.solve_PK = weighted_PK @ self.covariance_KK
        self.fitted_P = design_PK @ (self.loss_P @ self.solve_PK)

    def vertex(self, loss_SP: np.ndarray) -> np.ndarray:
        """(S, 3): log N*, log D*, L*; nan where the parabola opens downwards or its vertex is beyond reason.

        log D* is read off the straight line of log D on log N over the runs: its slope is -1 where the budget is 6ND,
        and steeper or flatter where runs are matched by exact FLOPs.
        """
        level, slope, curve = np.moveaxis(loss_SP @ self.solve_PK, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, loss = -slope / (2 * curve), level - slope**2 / (4 * curve)
        there = (curve > 0) & (np.abs(x) < 30) & (loss > 0)
        found = np.stack([self.centre + x, self.log_d + self.log_d_slope * x, loss], axis=-1)
        return np.where(there[..., None], found, np.nan)

    def minimum(self) -> Minimum:
        """UserError where the losses show none: opening downwards, or a curvature within two standard errors of 0."""
        curve, stderr = (self.loss_P @ self.solve_PK)[2], math.sqrt(self.covariance_KK[2, 2])
        log_n, log_d, loss = self.vertex(self.loss_P)
        if curve <= 2 * stderr or math.isnan(log_n):
            shape = "opens downwards" if curve < -2 * stderr else "is flat within its error"
            told = f"the parabola {shape}, curvature {curve:.2g} ± {stderr:.2g}"
            raise UserError(f"{told}; widen the range of sizes at {self.seen}")
        x = log_n - self.centre
        # Delta method. At the vertex the parabola does not depend on x, so L* moves as it does at a fixed x.
        by_coefficients = np.array([0, -1, -2 * x]) / (2 * curve), np.array([1, x, x**2])
        errors = [math.sqrt(g @ self.covariance_KK @ g) for g in by_coefficients]
        inside = bool(self.x_P.min() <= x <= self.x_P.max())
        return Minimum(self.budget, math.exp(log_n), math.exp(log_d), float(loss), *errors, inside)


def parabolas(profiles: Sequence[Sequence[Point]]) -> list[Parabola]:
    """One per budget, with one scatter for all: a single budget has too few residuals to tell its own well."""
    found = [Parabola(points) for points in profiles]
    target = np.array([sum(len(points) - 3 for points in profiles)])
    tau, last = 0.0, -1.0
    for _ in range(20):  # the weights depend on the scatter and the residuals on the weights
        if target[0] <= 0 or abs(tau - last) <= 1e-3 * tau:
            break
        residual_P = np.concatenate([p.loss_P - p.fitted_P for p in found])
        stderr_P = np.concatenate([p.stderr_P for p in found])
        last, tau = tau, float(scatter(residual_P, stderr_P, target)[0])
        found = [Parabola(points, tau) for points in profiles]
    return found


def minimum_of(points: Sequence[Point]) -> Minimum:
    """The minimum over the sizes of one budget (Chinchilla approach 2).

    Runs weigh by their stderr and, from four runs on, by a common scatter that their residuals tell; with three runs
    the stated errors are all there is. UserError: fewer than three sizes, no minimum to be seen, more than one budget,
    or figures that no run has.
    """
    if (count := len({p.budget for p in points})) != 1:
        raise UserError(f"a parabola goes through the runs of one budget, these have {count}; use fit")
    return parabolas([points])[0].minimum()


def scatter(residual_P: np.ndarray, stderr_P: np.ndarray, target_S: np.ndarray) -> np.ndarray:
    """tau (S,) with sum of residual^2 / (stderr^2 + tau^2) = target; 0 where the stated errors suffice.

    The degrees of freedom as target give the estimate (Paule and Mandel 1982). Draws of chi^2 as target give draws from
    tau's confidence distribution (the Q-profile of Viechtbauer 2007).
    """
    low, high = np.zeros(len(target_S)), np.sqrt(np.sum(residual_P**2) / target_S)
    for _ in range(50):
        middle = (low + high) / 2
        above = np.sum(residual_P**2 / (stderr_P**2 + middle[:, None] ** 2), axis=1) > target_S
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low
