"""What a study says in single numbers, shared by the pictures and the report of a sweep, and how numbers are written.

Units as in `laws`: FLOPs, parameters without embeddings, tokens, nats per token.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from llada.scaling.study import Study

NAMES = {"diffusion": "LLaDA", "autoregressive": "ARM"}
APPROACHES = {"": "minima", "parametric_": "L(N, D)"}  # prefix of a law's name in `Study.laws`: what it comes from


class Gap(NamedTuple):
    """LLaDA needs `value` times the FLOPs (`low` to `high`; inf: never) to reach `loss`, an ARM's at `budget` FLOPs.

    `beyond`: LLaDA's budget there over the largest it has runs at; above 1 it is extrapolated. `law`: as in Study.gap.
    """

    budget: float
    loss: float
    value: float
    low: float
    high: float
    beyond: float
    law: str


class SizeRatio(NamedTuple):
    """N* of LLaDA over an ARM's at the same FLOPs: geometric mean over `budgets` budgets, and two standard errors."""

    value: float
    low: float
    high: float
    budgets: int


def headline_gap(study: Study) -> Gap | None:
    """The gap at the largest ARM budget where it needs no extrapolation, or else the least of it; None without laws.

    By the minima, or where these give no laws, by L(N, D).
    """
    if not set(NAMES) <= study.laws.keys():
        return None
    for law in ("loss", "parametric_loss"):
        found = study.gap(*NAMES, law)
        if rows := found.get("ratios"):
            known = [row for row in rows if row["value"] is not None] or rows
            inside = [row for row in known if row["beyond"] is not None and row["beyond"] <= 1]
            row = (
                max(inside, key=lambda r: r["budget"]) if inside else min(known, key=lambda r: r["beyond"] or math.inf)
            )
            numbers = [math.inf if row[k] is None else row[k] for k in ("value", "low", "high", "beyond")]
            return Gap(row["budget"], row["loss"], *numbers, law)
    return None


def size_ratio(study: Study) -> SizeRatio | None:
    """From minima inside the sizes tried, at budgets that both families have; None where there is no such budget."""
    a, b = ({m.budget: m for m in study.minima.get(family, []) if m.inside} for family in NAMES)
    pairs = [(a[budget], b[budget]) for budget in sorted(a.keys() & b.keys())]
    if not pairs:
        return None
    log_ratio = sum(math.log(x.parameters / y.parameters) for x, y in pairs) / len(pairs)
    error = math.hypot(*(m.log_parameters_stderr for pair in pairs for m in pair)) / len(pairs)
    return SizeRatio(*(math.exp(log_ratio + z * error) for z in (0, -2, 2)), len(pairs))


def law_of(study: Study, family: str, quantity: str) -> str | None:
    """The name of the law of parameters, tokens or loss: by the minima, else by L(N, D), else None."""
    names = (prefix + quantity for prefix in APPROACHES)
    return next((law for law in names if law in study.laws.get(family, {})), None)


def predictions(study: Study, family: str, budget: float) -> dict[str, dict[str, dict[str, Any]]]:
    """N*, D* and L* at `budget` FLOPs as Study estimates: {approach: {parameters | tokens | loss: estimate}}."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for prefix, approach in APPROACHES.items():
        for quantity in ("parameters", "tokens", "loss"):
            if pair := study.laws.get(family, {}).get(prefix + quantity):
                best, draws = pair
                found.setdefault(approach, {})[quantity] = study.estimate(float(best(budget)), draws(budget))
    return found


def largest_budget(study: Study) -> float | None:
    """FLOPs, over all families."""
    return max((budget for budgets in study.budgets.values() for budget in budgets), default=None)


def interval(estimate: dict[str, Any], show: Callable[[float], str] = "{:.3f}".format) -> str:
    """An estimate of `Study` as '0.512 (0.480 to 0.544)'; what is not finite is 'unbounded'."""
    value, low, high = ("unbounded" if estimate[k] is None else show(estimate[k]) for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def flops(value: float) -> str:
    """3e+18 as 3e18."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(value: float) -> str:
    """1234567 as 1.23 M; three digits."""
    if not math.isfinite(value):
        return "none"
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:
            return three(value / unit) + name
    return three(value)


def short(value: float) -> str:
    """1500000 as 1.5 M: three digits at most, for pictures."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def three(value: float) -> str:
    """Three significant digits without an exponent where it is short: 16.4, 0.00123, 12300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return flops(value)
    digits = max(2 - math.floor(math.log10(abs(float(f"{value:.3g}")))), 0)
    return f"{float(f'{value:.3g}'):.{digits}f}"


def times(value: float) -> str:
    """A ratio as 16x, 9.4x or 0.45x; no end to it as 'unbounded'."""
    if not math.isfinite(value):
        return "unbounded"
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x" if value < 10 else f"{value:,.0f}x"
