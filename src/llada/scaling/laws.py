"""Laws of one variable, y = E + k x^e, and their fits: N*(C), D*(C) and L*(C) of a scaling study.

Units: FLOPs (a budget C), parameters without embeddings (N), tokens (D), nats per token (L); natural logarithms.
Shapes: P points (runs), B budgets, S bootstrap draws, G grid points. A law whose fields are (S,) is one law per draw.
Sources: N*(C) and D*(C) as power laws are Chinchilla's (arXiv 2203.15556, section 3.2); L*(C) as a plain power law is
SMDM's (arXiv 2410.18514, section 4).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llada.errors import UserError


class Point(NamedTuple):
    """One run. `budget` is the same number for all runs of an isoFLOP profile; `stderr` is that of `loss`, above 0.

    Several seeds of one size and budget are several points.
    """

    budget: float
    parameters: float
    tokens: float
    loss: float
    stderr: float


def columns(points: Sequence[Point]) -> np.ndarray:
    """(5, P), the fields of Point. UserError where one is not above 0 and finite."""
    for p in points:
        if bad := [name for name, value in p._asdict().items() if not 0 < value < math.inf]:
            raise UserError(f"{p}: {', '.join(bad)} must be above 0 and finite; leave out runs that diverged")
    return np.array(points, float).reshape(-1, 5).T


class PowerLaw(NamedTuple):
    """y = offset + coefficient x^exponent. Fields: floats, or (S,) arrays."""

    coefficient: Any
    exponent: Any
    offset: Any = 0.0

    def __call__(self, x):
        """y at x, broadcast against the fields."""
        return self.offset + self.coefficient * np.asarray(x, float) ** self.exponent

    def inverse(self, y):
        """The x at which a falling law comes down to y; inf where it never does (y at or below its offset)."""
        with np.errstate(divide="ignore", over="ignore"):
            ratio = (y - self.offset) / np.asarray(self.coefficient, float)
            return np.where(ratio <= 0, np.inf, np.abs(ratio) ** (1 / np.asarray(self.exponent, float)))


def power_law(x, y, sigma_log_y=None) -> PowerLaw:
    """y = k x^e by weighted least squares of log y on log x. x (B,), y (B,) or (S, B), errors of log y (B,).

    nan in y (a draw without a minimum) makes that draw's law nan. UserError: fewer than two different x, or values not
    above 0 and finite.
    """
    u_B, v_SB, w_B = _logs_and_weights(x, y, sigma_log_y)
    mean = w_B @ u_B
    exponent = v_SB @ (w_B * (u_B - mean)) / (w_B @ (u_B - mean) ** 2)
    return PowerLaw(np.exp(v_SB @ w_B - exponent * mean), exponent)


def offset_power_law(x, y, sigma_y=None) -> PowerLaw:
    """y = E + k x^-e with E >= 0 by weighted least squares, for L*(C). x (B,), y (B,) or (S, B), errors of y (B,).

    Three or fewer different x cannot tell E: the plain `power_law` is returned then, with offset 0.0.
    Given e, the best E and k are a linear regression. So only e is searched for, from 0.005 to 2, on grids that narrow.
    """
    u_B, v_SB, w_B = _logs_and_weights(x, y, sigma_y)
    if len(np.unique(u_B)) <= 3:
        mean_y = np.exp(np.nanmean(np.atleast_2d(v_SB), axis=0))
        return power_law(x, y, None if sigma_y is None else sigma_y / mean_y)
    y_S1B, centre = np.exp(np.atleast_2d(v_SB))[:, None, :], u_B.mean()
    log_e_S, reach = np.full(len(y_S1B), math.log(0.1)), math.log(20)
    for _ in range(7):
        e_SG = np.exp(log_e_S[:, None] + np.linspace(-reach, reach, 41))
        z_SGB = np.exp(-e_SG[..., None] * (u_B - centre))
        mean_y, mean_z = y_S1B @ w_B, z_SGB @ w_B
        dz_SGB = z_SGB - mean_z[..., None]
        k = (dz_SGB * y_S1B) @ w_B / (dz_SGB**2 @ w_B)
        k = np.where(mean_y < k * mean_z, (z_SGB * y_S1B) @ w_B / (z_SGB**2 @ w_B), k)  # where E < 0: E = 0
        E = np.maximum(mean_y - k * mean_z, 0.0)
        best_S1 = np.argmin((y_S1B - E[..., None] - k[..., None] * z_SGB) ** 2 @ w_B, axis=1)[:, None]
        e, k, E = (np.take_along_axis(a, best_S1, axis=1)[:, 0] for a in (e_SG, k, E))
        log_e_S, reach = np.log(e), reach / 10
    law = PowerLaw(k * np.exp(e * centre), -e, E)
    return law if v_SB.ndim == 2 else PowerLaw(*(a[0] for a in law))


def _logs_and_weights(x, y, sigma) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log x, log y, and weights that sum to 1."""
    x, y, sigma = (np.asarray(a, float) for a in (x, y, np.ones(len(x)) if sigma is None else sigma))
    if len(np.unique(x)) < 2:
        raise UserError(f"a power law goes through 2 different x or more, there is {len(np.unique(x))}; add budgets")
    if any(np.any((a <= 0) | (a == np.inf)) for a in (x, y, sigma)):
        raise UserError(f"a power law needs numbers above 0 and finite, unlike these: {x}, {y}, errors {sigma}")
    return np.log(x), np.log(y), sigma**-2.0 / np.sum(sigma**-2.0)
