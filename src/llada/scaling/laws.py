"""Power laws of one variable, y = E + k x^e: their fits, the minima they are fitted through, and published ones.

N*(C), D*(C) and L*(C) of a scaling study are such laws. Approach 2 of Chinchilla (arXiv 2203.15556, section 3.2; SMDM,
arXiv 2410.18514, section 4, finds its optima so too) fits a parabola of loss in log N to the runs of each budget and a
law through the parabolas' minima; SMDM's L*(C) is a plain power law.

A parabola is a narrow-range approximation: under L = E + A/N^a + B/D^b a profile is steeper on the side of the larger
exponent, which biases N* and L* where sizes reach far from the optimum. For Chinchilla's and Quokka's laws the bias is
up to 1.3% of N* and 0.001 nats within a factor of 3 of the optimum, 4% and 0.01 nats within 10. It is the same at all
budgets, and the exponents are free of it, as long as the sizes lie alike about each budget's optimum.

Units: FLOPs (a budget C), parameters without embeddings (N), tokens (D), nats per token (L); natural logarithms.
Shapes: P points (runs), B budgets, K = 3 coefficients, S bootstrap draws, G grid points. A law whose fields are (S,) is
one law per draw.
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
        """The y at x, broadcast against the fields."""
        return self.offset + self.coefficient * np.asarray(x, float) ** self.exponent

    def inverse(self, y):
        """The x at which a falling law comes down to y; inf where it never does (y at or below its offset)."""
        with np.errstate(divide="ignore", over="ignore"):
            ratio = (y - self.offset) / np.asarray(self.coefficient, float)
            return np.where(ratio <= 0, np.inf, np.abs(ratio) ** (1 / np.asarray(self.exponent, float)))


def power_law(x, y, sigma_log_y=None) -> PowerLaw:
    """Fit y = k x^e by weighted least squares of log y on log x. x (B,), y (B,) or (S, B), errors of log y (B,).

    nan in y (a draw without a minimum) makes that draw's law nan. UserError: fewer than two different x, or values not
    above 0 and finite.
    """
    u_B, v_SB, w_B = _logs_and_weights(x, y, sigma_log_y)
    mean = w_B @ u_B
    exponent = v_SB @ (w_B * (u_B - mean)) / (w_B @ (u_B - mean) ** 2)
    return PowerLaw(np.exp(v_SB @ w_B - exponent * mean), exponent)


def offset_power_law(x, y, sigma_y=None) -> PowerLaw:
    """Fit y = E + k x^-e, E >= 0, by weighted least squares, for L*(C). x (B,), y (B,) or (S, B), errors of y (B,).

    Three or fewer different x do not determine E: the plain `power_law` is returned then, with offset 0.0.
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
    """Logarithms of x and y, and weights that sum to 1."""
    x, y, sigma = (np.asarray(a, float) for a in (x, y, np.ones(len(x)) if sigma is None else sigma))
    if len(np.unique(x)) < 2:
        raise UserError(f"a power law goes through 2 different x or more, there is {len(np.unique(x))}; add budgets")
    if any(np.any((a <= 0) | (a == np.inf)) for a in (x, y, sigma)):
        raise UserError(f"a power law needs numbers above 0 and finite, unlike these: {x}, {y}, errors {sigma}")
    return np.log(x), np.log(y), sigma**-2.0 / np.sum(sigma**-2.0)


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
        runs = ", ".join(f"N {p.parameters:.3g} loss {p.loss:.4f}" for p in points)
        self.budget, self.seen = points[0].budget, f"budget {points[0].budget:.3g}: {runs}"
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

    def __call__(self, parameters) -> np.ndarray:
        """The loss at N `parameters`, any shape."""
        return np.polynomial.polynomial.polyval(np.log(parameters) - self.centre, self.loss_P @ self.solve_PK)

    def vertex(self, loss_SP: np.ndarray) -> np.ndarray:
        """(S, 3): log N*, log D*, L*; nan where the parabola opens downwards or its vertex is beyond reason.

        log D* is read off the straight line of log D on log N over the runs: its slope is -1 where the budget is 6ND,
        and steeper or flatter where runs are matched by exact FLOPs.
        """
        level, slope, curve = np.moveaxis(loss_SP @ self.solve_PK, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, loss = -slope / (2 * curve), level - slope**2 / (4 * curve)
        exists = (curve > 0) & (np.abs(x) < 30) & (loss > 0)
        vertex = np.stack([self.centre + x, self.log_d + self.log_d_slope * x, loss], axis=-1)
        return np.where(exists[..., None], vertex, np.nan)

    def minimum(self) -> Minimum:
        """UserError where the losses show none: opening downwards, or a curvature within two standard errors of 0."""
        curve, stderr = (self.loss_P @ self.solve_PK)[2], math.sqrt(self.covariance_KK[2, 2])
        log_n, log_d, loss = self.vertex(self.loss_P)
        if curve <= 2 * stderr or math.isnan(log_n):
            shape = "opens downwards" if curve < -2 * stderr else "is flat within its error"
            raise UserError(
                f"the parabola {shape}, curvature {curve:.2g} ± {stderr:.2g}; widen the range of sizes at {self.seen}"
            )
        x = log_n - self.centre
        # Delta method. At the vertex the parabola does not depend on x, so L* moves as it does at a fixed x.
        slopes = np.array([0, -1, -2 * x]) / (2 * curve), np.array([1, x, x**2])
        x_stderr, loss_stderr = (math.sqrt(slope @ self.covariance_KK @ slope) for slope in slopes)
        return Minimum(
            budget=self.budget,
            parameters=math.exp(log_n),
            tokens=math.exp(log_d),
            loss=float(loss),
            log_parameters_stderr=x_stderr,
            loss_stderr=loss_stderr,
            inside=bool(self.x_P.min() <= x <= self.x_P.max()),
        )


def parabolas(profiles: Sequence[Sequence[Point]]) -> list[Parabola]:
    """One per budget, with one scatter for all: a single budget has too few residuals to estimate its own well."""
    fitted = [Parabola(points) for points in profiles]
    target = np.array([sum(len(points) - 3 for points in profiles)])
    tau, last = 0.0, -1.0
    for _ in range(20):  # the weights depend on the scatter and the residuals on the weights
        if target[0] <= 0 or abs(tau - last) <= 1e-3 * tau:
            break
        residual_P = np.concatenate([p.loss_P - p.fitted_P for p in fitted])
        stderr_P = np.concatenate([p.stderr_P for p in fitted])
        last, tau = tau, float(scatter(residual_P, stderr_P, target)[0])
        fitted = [Parabola(points, tau) for points in profiles]
    return fitted


def scatter(residual_P: np.ndarray, stderr_P: np.ndarray, target_S: np.ndarray) -> np.ndarray:
    """The tau (S,) with sum of residual^2 / (stderr^2 + tau^2) = target; 0 where the stated errors suffice.

    The degrees of freedom as target give the estimate (Paule and Mandel 1982). Draws of chi^2 as target give draws from
    tau's confidence distribution (the Q-profile of Viechtbauer 2007).
    """
    low, high = np.zeros(len(target_S)), np.sqrt(np.sum(residual_P**2) / target_S)
    for _ in range(50):
        middle = (low + high) / 2
        above = np.sum(residual_P**2 / (stderr_P**2 + middle[:, None] ** 2), axis=1) > target_S
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low


# --- laws that other papers printed: what a sweep's own are shown beside


class Published(NamedTuple):
    """The laws of one paper for one family; a line is missing where its figures are not at hand.

    A line holds where it was fitted, from the first to the last of `budgets`. Losses of other papers (other corpora and
    tokenizers) do not compare with a sweep's, so only their exponents are here. C = 6 N D, so D* = C / (6 N*). SMDM
    counts N without embeddings; Chinchilla counts all parameters, which matters for small models.
    """

    name: str
    arxiv: str
    causal: bool
    exponents: dict[str, float]  # as printed, by the names of study.Laws
    parameters: PowerLaw | None = None  # N*(C)
    tokens: PowerLaw | None = None  # D*(C)
    budgets: tuple[float, ...] = ()  # FLOPs


# SMDM's section 4, digitised from the figures: N* within about 2%.
SMDM_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20)
SMDM_ARM_PARAMETERS = (0.15e9, 0.23e9, 0.45e9, 0.63e9, 1.01e9)
SMDM_MDM_PARAMETERS = (0.084e9, 0.11e9, 0.23e9, 0.36e9, 0.48e9)
# SMDM's own reading of its two loss lines: how many times the FLOPs an MDM needs at an ARM's loss.
SMDM_GAP = 16.0

# Chinchilla's Table 3 (approach 1): FLOPs, parameters, tokens. What lies above some 3e21 is its own extrapolation.
CHINCHILLA_TABLE_3 = (
    (1.92e19, 400e6, 8.0e9),
    (1.21e20, 1e9, 20.2e9),
    (1.23e22, 10e9, 205.1e9),
    (5.76e23, 67e9, 1.5e12),
)
# The share of its loss that a checkpoint before annealing would still lose by it (GIDD, arXiv 2512.10858).
GIDD_ANNEALING_GAIN = 0.0245


def _line(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    coefficient, exponent, _ = power_law(x, y)
    return PowerLaw(float(coefficient), float(exponent))


def _smdm(name: str, causal: bool, optima: Sequence[float], exponent: float, of_loss: float) -> Published:
    """The line is the one through the five optima."""
    n = _line(SMDM_BUDGETS, optima)
    d = PowerLaw(1 / (6 * n.coefficient), 1 - n.exponent)
    exponents = {"parameters": exponent, "tokens": 1 - exponent, "loss_power": of_loss}
    return Published(name, "2410.18514", causal, exponents, n, d, SMDM_BUDGETS)


def _chinchilla() -> Published:
    """The line is the one through the points of Table 3."""
    budgets, parameters, tokens = zip(*CHINCHILLA_TABLE_3, strict=True)
    n, d = _line(budgets, parameters), _line(budgets, tokens)
    exponents = {"parameters": n.exponent, "tokens": d.exponent}
    return Published("Chinchilla", "2203.15556", True, exponents, n, d, budgets)


# For what Quokka (section on compute-optimal laws) and GIDD count as N see the papers.
_QUOKKA = {"parameters": 0.514, "tokens": 0.486}
_GIDD = {"parameters": 0.566, "tokens": 0.434, "loss_power": -0.0496}
PUBLISHED = (
    _smdm("SMDM MDM", False, SMDM_MDM_PARAMETERS, 0.63, -0.063),
    Published("Quokka", "2510.03280", False, _QUOKKA, PowerLaw(0.0216, 0.514), PowerLaw(7.7, 0.486), (3e18, 1e21)),
    Published("GIDD masked", "2512.10858", False, _GIDD),
    _smdm("SMDM ARM", True, SMDM_ARM_PARAMETERS, 0.64, -0.064),
    _chinchilla(),
)
