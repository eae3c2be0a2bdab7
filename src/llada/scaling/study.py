"""Scaling laws of an isoFLOP study: runs of several sizes per budget -> N*(C), D*(C), L*(C) and compute gaps.

`fit` takes two approaches, both Chinchilla's (arXiv 2203.15556, section 3), with intervals by bootstrap. Approach 2
(`laws`): a parabola of loss in log N per budget, and laws through the minima; SMDM (arXiv 2410.18514) compares families
so. Approach 3 (`parametric`): L(N, D) through all the runs at once.

Units as in `laws`: FLOPs, parameters without embeddings, tokens, nats per token; natural logarithms.
Shapes: P points (runs), B budgets, S bootstrap draws.
A diffusion loss is a bound, an autoregressive one exact: the compute gap between them is at most the one computed.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llada.errors import UserError
from llada.scaling.laws import (
    Minimum,
    Parabola,
    Point,
    PowerLaw,
    columns,
    offset_power_law,
    parabolas,
    power_law,
    scatter,
)
from llada.scaling.parametric import HuberObjective, Parametric, fit_parametric

REACH = 1e6  # a gap is searched for its end up to this many times the largest budget
# Where runs determine a law poorly, some draws of it overflow: their inf and nan are counted, in `Study.estimate`.
_absurd_draws = np.errstate(over="ignore", divide="ignore", invalid="ignore")


def bootstrap(
    points: Sequence[Point], fitted_P: np.ndarray, constants: int, refit: Callable, draws: int, rng: np.random.Generator
) -> Any:
    """`refit(losses (S, P))` of S = `draws` simulated studies: the same runs, with new noise about the fitted losses.

    Noise: Gaussian with each run's own stderr and a scatter common to all runs (seeds, lack of fit), estimated from the
    residuals of the fit, P less its `constants`. As these are few, each study has its own scatter, drawn from the
    confidence distribution; so intervals come out as wide as Student's t would make them. The stated stderr is a floor.
    Runs are not resampled: of 5 sizes a resample has fewer than 3 different ones in 10% of cases (so that in 40% some
    budget of 5 has no parabola) and lacks an end of the grid, hence most of the curvature, in 58%.
    """
    loss_P, stderr_P = columns(points)[3:]
    dof = len(points) - constants
    scatter_S = scatter(loss_P - fitted_P, stderr_P, rng.chisquare(dof, draws)) if dof > 0 else np.zeros(draws)
    noise_SP = rng.normal(size=(draws, len(points))) * np.hypot(stderr_P, scatter_S[:, None])
    # A study whose noise exceeds the loss itself has no logarithm; such runs only come of stated errors beyond use.
    return refit(np.maximum(fitted_P + noise_SP, 1e-3 * fitted_P))


def interval(values: np.ndarray, level: float = 0.9) -> tuple[float, float]:
    """Central interval of bootstrap draws by percentiles. nan, a draw without the quantity, is left out; inf is not.

    The ends are the r-th draws from either side, r the whole number nearest to (1 - level) / 2 of one more than the
    draws; nothing is interpolated, as inf less inf is nan.
    """
    values = np.ravel(values)
    ordered = np.sort(values[~np.isnan(values)])
    if not len(ordered):
        return math.nan, math.nan
    rank = max(round((1 - level) / 2 * (len(ordered) + 1)), 1)
    return float(ordered[rank - 1]), float(ordered[-rank])


def compute_gap(law_a: PowerLaw, law_b: PowerLaw, loss):
    """C_a / C_b at the same loss: how many times more FLOPs family a needs; inf where it never gets there.

    For the gap at C_b, `loss` is law_b(C_b): SMDM's (section 4) figure. Laws of draws give draws of the gap.
    """
    return law_a.inverse(loss) / law_b.inverse(loss)


def crossing(law_a: PowerLaw, law_b: PowerLaw, low: float, high: float) -> np.ndarray:
    """(S,) The first budget from `low` to `high` at which a's loss is down to b's: where the gap closes, within 0.5%.

    `low` where a is not above b to begin with; inf where they do not meet; nan where a law is nan.
    """
    a, b = (PowerLaw(*(np.reshape(field, (-1, 1)) for field in law)) for law in (law_a, law_b))
    budget = np.geomspace(low, high, 2 + int(200 * math.log(high / low)))
    excess = a(budget) - b(budget)
    met = np.where((excess <= 0).any(axis=1), budget[np.argmax(excess <= 0, axis=1)], np.inf)
    return np.where(np.isnan(excess[:, 0]), np.nan, met)


class Fitted(NamedTuple):
    """A law as fitted, and its (S,) bootstrap draws: one law of the same kind whose fields are arrays."""

    best: Any
    draws: Any


@dataclass(frozen=True)
class Laws:
    """The laws of one series; None where the runs do not show it."""

    # By approach 2, through the minima.
    parameters: Fitted | None = None  # N*(C)
    tokens: Fitted | None = None  # D*(C)
    loss: Fitted | None = None  # L*(C) = E + k C^-e
    loss_power: Fitted | None = None  # SMDM's L*(C), without E
    # By approach 3: L(N, D), and what follows from it in closed form.
    parametric: Fitted | None = None
    parametric_parameters: Fitted | None = None
    parametric_tokens: Fitted | None = None
    parametric_loss: Fitted | None = None

    def known(self) -> dict[str, Fitted]:
        """Those there are, by name."""
        return {name: law for name, law in vars(self).items() if law is not None}

    def best(self, quantity: str) -> Fitted | None:
        """The law of parameters, tokens or loss: by the minima, else by L(N, D)."""
        return getattr(self, quantity) or getattr(self, f"parametric_{quantity}")


class SeriesFit(NamedTuple):
    """What the runs of one series show. `reasons`: what is left out or missing, and why."""

    budgets: list[float]
    parabolas: list[Parabola]
    minima: list[Minimum]
    laws: Laws
    reasons: dict[str, str]


NOTHING = SeriesFit([], [], [], Laws(), {})


class Study(NamedTuple):
    """What `fit` found, by the key of a series (`scaling/series.py`); `level` is that of every interval."""

    series: dict[str, SeriesFit]
    level: float

    def of(self, key: str) -> SeriesFit:
        """The fit of a series; an empty one where it has no runs."""
        return self.series.get(key, NOTHING)

    @property
    def largest_budget(self) -> float | None:
        """FLOPs, over all series; None without runs."""
        return max((budget for fitted in self.series.values() for budget in fitted.budgets), default=None)

    def estimate(self, value, draws_S) -> dict[str, Any]:
        """A number as value, low and high, None where not finite; reason: how many draws are not."""
        low, high = interval(draws_S, self.level)
        numbers = {"value": value, "low": low, "high": high}
        lacking = np.mean(~np.isfinite(draws_S))
        reason = f"there is none in {lacking:.1%} of the draws" if lacking else None
        return {name: float(v) if math.isfinite(v) else None for name, v in numbers.items()} | {"reason": reason}

    def constants(self, law: Fitted) -> dict[str, dict[str, Any]]:
        """The constants of a law, such as exponent, as estimates."""
        return {name: self.estimate(*pair) for name, *pair in zip(law.best._fields, *law, strict=True)}

    @_absurd_draws
    def gap(self, a: str, b: str, law: str = "loss") -> dict[str, Any]:
        """`compute_gap` of series a over b at each of b's budgets, and the budget where it closes, as estimates.

        `law` names one of `Laws`. `beyond`: the budget over the largest that a has runs at (for `closes`, that either
        has); above 1, it is extrapolated. Where a is not above b at the smallest budget of both, `closes` is that
        budget.
        """
        laws = [self.of(key).laws.known().get(law) for key in (a, b)]
        law_a, law_b = laws
        if law_a is None or law_b is None:
            missing = [key for key, known in zip((a, b), laws, strict=True) if known is None]
            return {"reason": f"there is no law {law} of {' and '.join(missing)}"}
        budgets_a, budgets_b = self.series[a].budgets, self.series[b].budgets
        rows = []
        for budget in budgets_b:
            ratios = (compute_gap(of_a, of_b, of_b(budget)) for of_a, of_b in zip(law_a, law_b, strict=True))
            row = {"budget": budget, "loss": float(law_b.best(budget)), **self.estimate(*ratios)}
            rows.append(row | {"beyond": row["value"] and row["value"] * budget / max(budgets_a)})
        low, high = min(budgets_a + budgets_b), max(budgets_a + budgets_b)
        (best,) = crossing(law_a.best, law_b.best, low, high * REACH)
        closes = self.estimate(best, crossing(law_a.draws, law_b.draws, low, high * REACH))
        return {"ratios": rows, "closes": closes | {"beyond": closes["value"] and closes["value"] / high}}

    def to_json(self, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """All but the draws, as plain dicts, lists, strings, floats, booleans and None; gaps of the pairs it has."""
        series = {
            key: {
                "minima": [minimum._asdict() for minimum in fitted.minima],
                "laws": {name: self.constants(law) for name, law in fitted.laws.known().items()},
                "reasons": fitted.reasons,
            }
            for key, fitted in self.series.items()
        }
        gaps = [
            {"a": a, "b": b, "law": law, **self.gap(a, b, law)}
            for a, b in pairs
            if {a, b} <= series.keys()
            for law in ("loss", "loss_power", "parametric_loss")
        ]
        # The name in files: series are families, as they are or in a variant.
        return {"level": self.level, "families": series, "gaps": gaps}


@_absurd_draws
def fit(points_by_series: Mapping[str, Sequence[Point]], draws: int = 500, level: float = 0.95, seed: int = 0) -> Study:
    """Both approaches on the runs of each series, with `draws` bootstrap draws.

    What the runs do not show is left out, with the reason. UserError only for figures that no run has, or settings
    that cannot be.
    """
    if draws < 1 or not 0 < level < 1:
        raise UserError(f"draws={draws} must be 1 or more and level={level} between 0 and 1, such as 0.95")
    rng = np.random.default_rng(seed)
    series = {}
    for key, points in points_by_series.items():
        reasons: dict[str, str] = {}
        budgets = sorted(set(columns(points)[0].tolist()))
        profiles = [[p for p in points if p.budget == budget] for budget in budgets]
        profiles = [p for p in profiles if _attempt(reasons, f"budget {p[0].budget:.6g}", Parabola, p)]
        fitted = parabolas(profiles)
        minima = [_attempt(reasons, f"budget {p.budget:.6g}", p.minimum) for p in fitted]
        simulate = functools.partial(bootstrap, draws=draws, rng=rng)
        laws = _approach_2(profiles, fitted, minima, simulate, reasons)
        laws |= _approach_3(points, simulate, reasons)
        series[key] = SeriesFit(budgets, fitted, [m for m in minima if m], Laws(**laws), reasons)
    return Study(series, level)


def _attempt(reasons: dict[str, str], what: str, call: Callable, *arguments) -> Any:
    """The call's answer; or None, and its UserError among the reasons."""
    try:
        return call(*arguments)
    except UserError as error:
        reasons[what] = str(error)
        return None


def _approach_2(
    profiles: list[list[Point]], fitted: list[Parabola], minima: list[Minimum | None], simulate: Callable, reasons: dict
) -> dict[str, Fitted]:
    """Laws through those minima that lie inside the sizes tried."""
    for m in minima:
        if m and not m.inside:
            reasons[f"budget {m.budget:.6g}"] = f"its minimum, N = {m.parameters:.3g}, is outside the sizes; add some"
    used = [(parabola, m, i) for i, (parabola, m) in enumerate(zip(fitted, minima, strict=True)) if m and m.inside]
    number = f"budgets with a minimum inside the sizes: {len(used)}"
    if len(used) < 2:
        reasons["loss"] = f"{number}; laws of the budget need 2"
        return {}
    if len(used) < 4:
        reasons["offset"] = f"{number}; to tell E needs 4, so loss is the same as loss_power"
    budget_B, loss_B, sigma_loss_B, sigma_n_B = np.array(
        [(m.budget, m.loss, m.loss_stderr, m.log_parameters_stderr) for _, m, _ in used]
    ).T
    ends = np.cumsum([len(p.loss_P) for p in fitted])[:-1]

    def laws_of(loss_SP: np.ndarray) -> dict[str, PowerLaw]:
        loss_of_budget = np.split(loss_SP, ends, axis=-1)
        vertices = np.stack([parabola.vertex(loss_of_budget[i]) for parabola, _, i in used], axis=-2)
        log_n, log_d, loss = np.moveaxis(vertices, -1, 0)
        return {
            "parameters": power_law(budget_B, np.exp(log_n), sigma_n_B),
            # The errors of log D* are those of log N* times a slope that all budgets share: the same weights.
            "tokens": power_law(budget_B, np.exp(log_d), sigma_n_B),
            "loss": offset_power_law(budget_B, loss, sigma_loss_B),
            "loss_power": power_law(budget_B, loss, sigma_loss_B / loss_B),
        }

    best = laws_of(np.concatenate([p.loss_P for p in fitted]))
    runs = [p for profile in profiles for p in profile]
    fitted_P = np.concatenate([p.fitted_P for p in fitted])
    drawn = simulate(runs, fitted_P, 3 * len(fitted), laws_of)
    for law in ("loss", "loss_power"):
        if best[law].coefficient * best[law].exponent >= 0:
            reasons[law] = "the lowest loss of a budget does not fall as budgets grow; no gap can be read off it"
            del best[law]
    return {law: Fitted(best[law], drawn[law]) for law in best}


def _approach_3(points: Sequence[Point], simulate: Callable, reasons: dict[str, str]) -> dict[str, Fitted]:
    """The parametric law and its three closed forms."""
    best = _attempt(reasons, "parametric", fit_parametric, points)
    if best is None:
        return {}
    huber, (budget_P, n_P, d_P, _, _) = HuberObjective(points), columns(points)
    # 6 N where budgets are 6ND; where they are exact FLOPs, what they say a token costs over the sizes tried.
    flops_per_token = power_law(n_P, budget_P / d_P)

    def refit(loss_SP: np.ndarray) -> Parametric:
        return huber.law(huber.follow(huber.theta(best), np.log(loss_SP)))

    drawn = simulate(points, best.loss(n_P, d_P), 5, refit)
    names = ("parametric", "parametric_parameters", "parametric_tokens", "parametric_loss")
    laws = zip((best, *best.frontier(flops_per_token)), (drawn, *drawn.frontier(flops_per_token)), strict=True)
    return {name: Fitted(*pair) for name, pair in zip(names, laws, strict=True)}
