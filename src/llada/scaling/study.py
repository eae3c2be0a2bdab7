"""Scaling laws of an isoFLOP study: runs of several sizes per budget -> N*(C), D*(C), L*(C) and compute gaps.

Two roads lead from runs to laws, both Chinchilla's (arXiv 2203.15556, section 3), and `fit` takes both, with intervals:
approach 2 (`isoflop`), a parabola of loss in log N per budget, and laws through the minima, as SMDM (arXiv 2410.18514)
compares families; approach 3 (`parametric`), L(N, D) through all the runs at once.

Units as in `laws`: FLOPs, parameters without embeddings, tokens, nats per token; natural logarithms.
Shapes: P points (runs), B budgets, S bootstrap draws.
A diffusion loss is a bound, an autoregressive one exact: the compute gap between them is at most the one computed.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada.errors import UserError
from llada.scaling.isoflop import Minimum, Parabola, parabolas, scatter
from llada.scaling.laws import Point, PowerLaw, columns, offset_power_law, power_law
from llada.scaling.parametric import HuberObjective, fit_parametric

REACH = 1e6  # a gap is searched for its end up to this many times the largest budget
# A draw of a study that tells little may have an absurd law: its inf and nan are counted, in `Study.estimate`.
_absurd_draws = np.errstate(over="ignore", divide="ignore", invalid="ignore")


def bootstrap(
    points: Sequence[Point], fitted_P: np.ndarray, constants: int, refit: Callable, draws: int, rng: np.random.Generator
) -> Any:
    """`refit(losses (S, P))` of S = `draws` simulated studies: the same runs, with new noise about the fitted losses.

    Noise: Gaussian with each run's own stderr and a scatter common to all runs (seeds, lack of fit). The residuals of
    the fit, P less its `constants`, tell the scatter. As these are few, each study has its own scatter, drawn from the
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
    there = np.sort(np.ravel(values)[~np.isnan(np.ravel(values))])
    if not len(there):
        return math.nan, math.nan
    rank = max(round((1 - level) / 2 * (len(there) + 1)), 1)
    return float(there[rank - 1]), float(there[-rank])


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


class Study(NamedTuple):
    """What `fit` found, by family; `level` is that of every interval.

    `laws`: by approach 2, parameters N*(C), tokens D*(C), loss L*(C) = E + k C^-e, and loss_power, SMDM's L*(C) without
    E; by approach 3, parametric L(N, D) and from it parametric_parameters, parametric_tokens, parametric_loss. Each law
    is a pair: as fitted, and its (S,) draws. `reasons`: what is left out or missing, and why.
    """

    budgets: dict[str, list[float]]
    minima: dict[str, list[Minimum]]
    laws: dict[str, dict[str, tuple[Any, Any]]]
    reasons: dict[str, dict[str, str]]
    level: float

    def estimate(self, value, draws_S) -> dict[str, Any]:
        """A number as value, low and high, None where not finite; reason: how many draws are not."""
        numbers = dict(zip(("value", "low", "high"), (value, *interval(draws_S, self.level)), strict=True))
        lacking = np.mean(~np.isfinite(draws_S))
        reason = f"there is none in {lacking:.1%} of the draws" if lacking else None
        return {name: float(v) if math.isfinite(v) else None for name, v in numbers.items()} | {"reason": reason}

    def constants(self, family: str, law: str) -> dict[str, dict[str, Any]]:
        """The constants of a law, such as exponent, as estimates."""
        best, draws = self.laws[family][law]
        return {name: self.estimate(*pair) for name, *pair in zip(best._fields, best, draws, strict=True)}

    @_absurd_draws
    def gap(self, a: str, b: str, law: str = "loss") -> dict[str, Any]:
        """`compute_gap` of family a over b at each of b's budgets, and the budget where it closes, as estimates.

        `beyond`: the budget over the largest that a has runs at (for `closes`, that either has); above 1, it is told by
        extrapolation. Where a is not above b at the smallest budget of both, `closes` is that budget.
        """
        if missing := [family for family in (a, b) if law not in self.laws[family]]:
            return {"reason": f"there is no law {law} of {' and '.join(missing)}"}
        pairs = list(zip(self.laws[a][law], self.laws[b][law], strict=True))  # as fitted, and draws
        rows = []
        for budget in self.budgets[b]:
            best, draws = (compute_gap(law_a, law_b, law_b(budget)) for law_a, law_b in pairs)
            row = {"budget": budget, "loss": float(pairs[0][1](budget)), **self.estimate(best, draws)}
            rows.append(row | {"beyond": row["value"] and row["value"] * budget / max(self.budgets[a])})
        low, high = (end(self.budgets[a] + self.budgets[b]) for end in (min, max))
        (best,), draws = (crossing(*laws, low, high * REACH) for laws in pairs)
        closes = self.estimate(best, draws)
        return {"ratios": rows, "closes": closes | {"beyond": closes["value"] and closes["value"] / high}}

    def to_json(self) -> dict[str, Any]:
        """All but the draws, as plain dicts, lists, strings, floats, booleans and None."""
        families = {
            family: {
                "minima": [minimum._asdict() for minimum in self.minima[family]],
                "laws": {law: self.constants(family, law) for law in laws},
                "reasons": self.reasons[family],
            }
            for family, laws in self.laws.items()
        }
        gaps = [
            {"a": a, "b": b, "law": law, **self.gap(a, b, law)}
            for a, b in itertools.combinations(families, 2)
            for law in ("loss", "loss_power", "parametric_loss")
        ]
        return {"level": self.level, "families": families, "gaps": gaps}


@_absurd_draws
def fit(points_by_family: dict[str, Sequence[Point]], draws: int = 500, level: float = 0.95, seed: int = 0) -> Study:
    """Both approaches on the runs of each family, with `draws` bootstrap draws; gaps are of a family over later ones.

    What the runs do not show is left out, with the reason. UserError only for figures that no run has, or settings
    that are none.
    """
    if draws < 1 or not 0 < level < 1:
        raise UserError(f"draws={draws} must be 1 or more and level={level} between 0 and 1, such as 0.95")
    study, rng = Study({}, {}, {}, {}, level), np.random.default_rng(seed)
    for family, points in points_by_family.items():
        study.budgets[family] = sorted(set(columns(points)[0].tolist()))
        study.reasons[family] = reasons = {}
        study.minima[family], laws = _approach_2(points, draws, rng, reasons)
        study.laws[family] = laws | _approach_3(points, draws, rng, reasons)
    return study


def _attempt(reasons: dict[str, str], what: str, call: Callable, *arguments) -> Any:
    """The call's answer; or None, and its UserError among the reasons."""
    try:
        return call(*arguments)
    except UserError as error:
        reasons[what] = str(error)
        return None


def _approach_2(points, draws, rng, reasons) -> tuple[list[Minimum], dict[str, tuple[Any, Any]]]:
    """All minima; laws through those inside the sizes tried, each with its draws."""
    profiles = [[p for p in points if p.budget == budget] for budget in sorted({p.budget for p in points})]
    profiles = [p for p in profiles if _attempt(reasons, f"budget {p[0].budget:.6g}", Parabola, p)]
    fitted = parabolas(profiles)
    minima = [_attempt(reasons, f"budget {p.budget:.6g}", p.minimum) for p in fitted]
    for m in minima:
        if m and not m.inside:
            reasons[f"budget {m.budget:.6g}"] = f"its minimum, N = {m.parameters:.3g}, is outside the sizes; add some"
    used = [i for i, m in enumerate(minima) if m and m.inside]
    seen = f"budgets with a minimum inside the sizes: {len(used)}"
    if len(used) < 2:
        reasons["loss"] = f"{seen}; laws of the budget need 2"
        return [m for m in minima if m], {}
    if len(used) < 4:
        reasons["offset"] = f"{seen}; to tell E needs 4, so loss is the same as loss_power"
    budget_B = np.array([minima[i].budget for i in used])
    loss_B, sigma_loss_B = np.array([(minima[i].loss, minima[i].loss_stderr) for i in used]).T
    sigma_n_B = np.array([minima[i].log_parameters_stderr for i in used])
    ends = np.cumsum([len(p.loss_P) for p in fitted])[:-1]

    def laws_of(loss_SP):
        parts = np.split(loss_SP, ends, axis=-1)
        log_n, log_d, loss = np.moveaxis(np.stack([fitted[i].vertex(parts[i]) for i in used], axis=-2), -1, 0)
        return {
            "parameters": power_law(budget_B, np.exp(log_n), sigma_n_B),
            # The errors of log D* are those of log N* times a slope that all budgets share: the same weights.
            "tokens": power_law(budget_B, np.exp(log_d), sigma_n_B),
            "loss": offset_power_law(budget_B, loss, sigma_loss_B),
            "loss_power": power_law(budget_B, loss, sigma_loss_B / loss_B),
        }

    best = laws_of(np.concatenate([p.loss_P for p in fitted]))
    fitted_P, ordered = np.concatenate([p.fitted_P for p in fitted]), [p for profile in profiles for p in profile]
    drawn = bootstrap(ordered, fitted_P, 3 * len(fitted), laws_of, draws, rng)
    for law in ("loss", "loss_power"):
        if best[law].coefficient * best[law].exponent >= 0:
            reasons[law] = "the lowest loss of a budget does not fall as budgets grow; no gap can be read off it"
            del best[law]
    return [m for m in minima if m], {law: (best[law], drawn[law]) for law in best}


def _approach_3(points, draws, rng, reasons) -> dict[str, tuple[Any, Any]]:
    """The parametric law and its three closed forms, each with its draws."""
    best = _attempt(reasons, "parametric", fit_parametric, points)
    if best is None:
        return {}
    huber, (budget_P, n_P, d_P, _, _) = HuberObjective(points), columns(points)
    # 6 N where budgets are 6ND; where they are exact FLOPs, what they say a token costs over the sizes tried.
    flops_per_token = power_law(n_P, budget_P / d_P)

    def refit(loss_SP):
        return huber.law(huber.follow(huber.theta(best), np.log(loss_SP)))

    drawn = bootstrap(points, best.loss(n_P, d_P), 5, refit, draws, rng)
    names = ("parametric", "parametric_parameters", "parametric_tokens", "parametric_loss")
    pairs = zip((best, *best.frontier(flops_per_token)), (drawn, *drawn.frontier(flops_per_token)), strict=True)
    return dict(zip(names, pairs, strict=True))
