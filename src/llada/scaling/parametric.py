"""L(N, D) = E + A/N^a + B/D^b through all the runs at once (Chinchilla approach 3), and its frontier in closed form.

Chinchilla is arXiv 2203.15556, section 3.3; Besiroglu et al. (arXiv 2404.10102) refitted its runs and found that its
optimiser had stopped early. Units as in `laws`.
Shapes: P runs, T = 3 terms, K = 5 constants, S draws or starts.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from llada.errors import UserError
from llada.scaling.laws import Point, PowerLaw, columns

HUBER_DELTA = 1e-3  # on log L: Chinchilla, section 3.3
STARTS = 6  # L-BFGS runs; on synthetic studies the best 12 starts all end in one minimum, to 1e-9 of its value
SIX_ND = PowerLaw(6.0, 1.0)  # training FLOPs per token from N: forward and backward through every parameter


class Parametric(NamedTuple):
    """L(N, D) = E + A/N^a + B/D^b (Chinchilla eq. 2). Fields: floats, or (S,) arrays."""

    E: Any
    A: Any
    a: Any
    B: Any
    b: Any

    def loss(self, parameters, tokens):
        """L(N, D) in nats per token, broadcast against the fields."""
        return self.E + PowerLaw(self.A, -self.a)(parameters) + PowerLaw(self.B, -self.b)(tokens)

    def frontier(self, flops_per_token: PowerLaw = SIX_ND) -> tuple[PowerLaw, PowerLaw, PowerLaw]:
        """N*(C), D*(C), L*(C) in closed form where C = c N^p D, `flops_per_token` being c N^p (Chinchilla eq. 4: 6 N).

        At a given N^p D = M the loss is stationary where a A/N^a = p b B/D^b. That is N* = G M^(b/(a+pb)) with
        G = (aA/pbB)^(1/(a+pb)).
        """
        a, b, (c, p, _) = self.a, self.b, flops_per_token
        total = a + p * b
        G = (a * self.A / (p * b * self.B)) ** (1 / total)
        of_n, of_d, of_l = b / total, a / total, a * b / total
        k = self.A / G**a + self.B * G ** (p * b)
        return PowerLaw(G / c**of_n, of_n), PowerLaw(1 / (G**p * c**of_d), of_d), PowerLaw(k * c**of_l, -of_l, self.E)

    def optimal(self, budget, flops_per_token: PowerLaw = SIX_ND) -> tuple[Any, Any, Any]:
        """(N*, D*, L*) at `budget` FLOPs."""
        return tuple(law(budget) for law in self.frontier(flops_per_token))


class HuberObjective:
    """What approach 3 minimises (Chinchilla eq. 3): Huber's loss of log L at P runs, for S laws at once.

    theta (S, 5): log E, log of A's term at the mean log N, a, log of B's term at the mean log D, b. Taking the terms at
    the means unties A from a and B from b. A residual counts in units of delta = 1e-3, or of the run's own error where
    that is larger. Up to one unit it is squared, beyond it counts linearly. The objective is the sum over the runs: a
    mean is so flat that L-BFGS stops early, as Chinchilla's own fit did (Besiroglu et al.).
    """

    def __init__(self, points: Sequence[Point]):
        _, n_P, d_P, loss_P, stderr_P = columns(points)
        self.mean_n, self.mean_d = np.log(n_P).mean(), np.log(d_P).mean()
        one_P, log_n_P, log_d_P = np.ones_like(n_P), np.log(n_P) - self.mean_n, np.log(d_P) - self.mean_d
        # What each constant is multiplied by in the logarithm of its term: E, A/N^a, B/D^b.
        self.factor_KP = np.stack([one_P, one_P, -log_n_P, one_P, -log_d_P])
        self.log_loss_P = np.log(loss_P)
        self.unit_P = np.maximum(stderr_P / loss_P, HUBER_DELTA)

    def __call__(self, theta_SK: np.ndarray, log_loss_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value (S,), gradient (S, 5), and the Hessian (S, 5, 5) of reweighted least squares (Gauss-Newton)."""
        terms_STP = np.add.reduceat(theta_SK[..., None] * self.factor_KP, (0, 1, 3), axis=1)
        top_S1P = terms_STP.max(axis=1, keepdims=True)
        share_STP = np.exp(terms_STP - top_S1P)
        total_S1P = share_STP.sum(axis=1, keepdims=True)
        log_loss_S1P = top_S1P + np.log(total_S1P)  # log L = log-sum-exp of the three terms' logarithms
        slope_SKP = (share_STP / total_S1P)[:, (0, 1, 1, 2, 2)] * (self.factor_KP / self.unit_P)
        r_SP = (log_loss_S1P[:, 0] - log_loss_SP) / self.unit_P
        size_SP = np.abs(r_SP)
        value = np.where(size_SP <= 1, r_SP**2 / 2, size_SP - 0.5).sum(axis=-1)
        weighted_SKP = slope_SKP / np.maximum(size_SP, 1)[:, None]
        return value, (weighted_SKP @ r_SP[..., None])[..., 0], weighted_SKP @ slope_SKP.mT

    def descend(self, start_K: np.ndarray) -> np.ndarray:
        """(1, 5): where L-BFGS ends for the runs' own losses, in units in which the Hessian at the start is near 1."""
        hessian = self(start_K[None], self.log_loss_P)[2][0]
        ridge = 1e-6 * np.trace(hessian) * np.eye(5)  # from a start far off, some term may not be felt at all
        unit_KK = np.linalg.inv(np.linalg.cholesky(hessian + ridge))

        def objective(z):
            value_S, gradient_SK, _ = self(start_K + z[None] @ unit_KK, self.log_loss_P)
            return value_S[0], unit_KK @ gradient_SK[0]

        options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-14, "gtol": 1e-9}
        end = optimize.minimize(objective, np.zeros(5), jac=True, method="L-BFGS-B", options=options)
        return start_K + end.x[None] @ unit_KK

    def follow(self, start_K: np.ndarray, log_loss_SP: np.ndarray) -> np.ndarray:
        """(S, 5): the minimum near `start_K` for each row of losses, by damped Gauss-Newton steps of all rows at once.

        A bootstrap needs hundreds of fits that end close to one another: together they take a tenth of a second.
        """
        theta_SK, damping_S = np.tile(start_K, (len(log_loss_SP), 1)), np.full(len(log_loss_SP), 1e-3)
        value_S, gradient_SK, hessian_SKK = self(theta_SK, log_loss_SP)
        for _ in range(50):
            ridge = 1e-12 * hessian_SKK.max() * np.eye(5)
            damped_SKK = hessian_SKK * (1 + damping_S[:, None, None] * np.eye(5)) + ridge
            step_SK = np.linalg.solve(damped_SKK, gradient_SK[..., None])[..., 0]
            # What the step would gain to first order: where it is nothing for all draws, they have arrived.
            if np.all((step_SK * gradient_SK).sum(axis=-1) <= 1e-10 * (1 + value_S)):
                break
            value, gradient, hessian = self(theta_SK - step_SK, log_loss_SP)
            better_S = value < value_S
            theta_SK = np.where(better_S[:, None], theta_SK - step_SK, theta_SK)
            value_S = np.where(better_S, value, value_S)
            gradient_SK = np.where(better_S[:, None], gradient, gradient_SK)
            hessian_SKK = np.where(better_S[:, None, None], hessian, hessian_SKK)
            damping_S = np.where(better_S, damping_S / 5, damping_S * 5)
        return theta_SK

    def starts(self) -> np.ndarray:
        """(576, 5): each term a share of the lowest loss, and exponents."""
        terms, exponents = self.log_loss_P.min() + np.log([0.1, 0.3, 0.6, 0.9]), (0.1, 0.25, 0.4, 0.7)
        return np.array(list(itertools.product(terms, terms[:3], exponents, terms[:3], exponents)))

    def theta(self, law: Parametric) -> np.ndarray:
        """(5,), of one law."""
        log_A, log_B = np.log(law.A) - law.a * self.mean_n, np.log(law.B) - law.b * self.mean_d
        return np.array([np.log(law.E), log_A, law.a, log_B, law.b])

    def law(self, theta_SK: np.ndarray) -> Parametric:
        """S laws; nan where an exponent is not above 0."""
        log_E, log_A, a, log_B, b = np.where(theta_SK[:, [2, 4]].min(axis=1, keepdims=True) > 0, theta_SK, np.nan).T
        with np.errstate(over="ignore"):
            return Parametric(np.exp(log_E), np.exp(log_A + a * self.mean_n), a, np.exp(log_B + b * self.mean_d), b)


def fit_parametric(points: Sequence[Point]) -> Parametric:
    """Chinchilla approach 3: the lowest end of L-BFGS from the STARTS best of a grid of 576 starts.

    UserError: runs too few or too alike to determine five constants, or losses that do not fall with both N and D.
    """
    _, n_P, d_P, _, _ = columns(points)
    counts = {"(N, D)": len({*zip(n_P, d_P, strict=True)}), "N": len({*n_P}), "D": len({*d_P})}
    budgets = len({p.budget for p in points})
    # At two sizes only, A/N^a is two numbers, which E takes up; the same for D. At one budget, D is a function of N.
    if counts["(N, D)"] < 6 or min(counts.values()) < 3 or budgets < 2:
        seen = ", ".join(f"{count} different {name}" for name, count in counts.items())
        raise UserError(
            f"{seen}, {budgets} budgets: the five constants of L(N, D) need 6 different (N, D), 3 N and 3 D, 2 budgets"
        )
    huber = HuberObjective(points)
    log_loss_1P, starts = huber.log_loss_P[None], huber.starts()
    starts = starts[np.argsort(huber(starts, log_loss_1P)[0])[:STARTS]]
    ends = np.concatenate([huber.descend(start) for start in starts])
    law = Parametric(*(float(field[0]) for field in huber.law(ends[[np.argmin(huber(ends, log_loss_1P)[0])]])))
    if not all(0 < field < np.inf for field in law):
        raise UserError("the losses do not fall with both N and D; L = E + A/N^a + B/D^b does not describe them")
    return law
