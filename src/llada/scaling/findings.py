"""What a sweep says in single numbers, shared by its pictures and its report, and what to keep in mind about them.

Series are compared by pairs (`series.pairs`), with the one whose likelihood is exact and variants with their family:
compute gaps, best sizes.
Units: FLOPs, parameters without embeddings, tokens, nats per token.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llada.objectives.families import FAMILIES
from llada.scaling.laws import GIDD_ANNEALING_GAIN
from llada.scaling.numbers import count, flops, listed, three
from llada.scaling.results import Result
from llada.scaling.series import REFERENCE, Series, ordered, pairs
from llada.scaling.study import Study

SMALL = 50e6  # parameters without embeddings: near the smallest models that the published laws were fitted to
BUDGETS_FOR_E = 4  # fewer do not determine an irreducible loss: laws.offset_power_law


class Gap(NamedTuple):
    """`series` needs `value` times the FLOPs (`low` to `high`; inf: never) to come down to the reference's `loss`.

    `budget`: the reference's FLOPs at that loss.
    `beyond`: the series' budget there over the largest it has runs at; above 1 it is extrapolated. `law`: of `Laws`.
    """

    series: Series
    reference: Series
    budget: float
    loss: float
    value: float
    low: float
    high: float
    beyond: float
    law: str


class SizeRatio(NamedTuple):
    """N* of `series` over the reference's at the same FLOPs: geometric mean over budgets, and two standard errors."""

    series: Series
    reference: Series
    value: float
    low: float
    high: float
    budgets: int


def headline_gaps(study: Study) -> list[Gap]:
    """One per pair with laws of the loss: by the minima, or where these give no laws, by L(N, D).

    At the reference's largest budget where the gap needs no extrapolation, or else where it needs the least.
    """
    gaps = []
    for series, reference in pairs(study.series):
        for law in ("loss", "parametric_loss"):
            if rows := study.gap(series.key, reference.key, law).get("ratios"):
                gaps.append(_headline(series, reference, rows, law))
                break
    return gaps


def _headline(series: Series, reference: Series, rows: list[dict[str, Any]], law: str) -> Gap:
    rows = [row for row in rows if row["value"] is not None] or rows
    inside = [row for row in rows if row["beyond"] is not None and row["beyond"] <= 1]
    rows = inside or sorted(rows, key=lambda row: row["beyond"] or math.inf)[:1]
    row = max(rows, key=lambda row: row["budget"])
    numbers = {key: math.inf if row[key] is None else row[key] for key in ("value", "low", "high", "beyond")}
    return Gap(series, reference, row["budget"], row["loss"], **numbers, law=law)


def size_ratios(study: Study) -> list[SizeRatio]:
    """One per pair with budgets at which both have a minimum inside the sizes tried."""
    ratios = []
    for series, reference in pairs(study.series):
        of_series, of_reference = (
            {m.budget: m for m in study.of(each.key).minima if m.inside} for each in (series, reference)
        )
        both = [(of_series[budget], of_reference[budget]) for budget in sorted(of_series.keys() & of_reference.keys())]
        if both:
            log_ratio = sum(math.log(x.parameters / y.parameters) for x, y in both) / len(both)
            error = math.hypot(*(m.log_parameters_stderr for pair in both for m in pair)) / len(both)
            value, low, high = (math.exp(log_ratio + z * error) for z in (0, -2, 2))
            ratios.append(SizeRatio(series, reference, value, low, high, len(both)))
    return ratios


# --- caveats: one sentence or two each, and only those that apply


def caveats(results: Sequence[Result], study: Study, annealing_gain: float) -> list[str]:
    """What a reader of a sweep must know before believing it, the weightiest first."""
    measured = [r for r in results if r.measured]
    if not measured:
        return ["No reading has a figure, so nothing here is a result."]
    fits = [] if measured[0].ranked else _of_fits(measured, study, annealing_gain)
    return [*_of_comparison(measured), *fits, *_of_runs(measured)]


def _of_comparison(measured: Sequence[Result]) -> Iterator[str]:
    """What the figures are, and what budgets are matched in."""
    repeated, ranked = measured[0].data_limited, measured[0].ranked
    present = [family for family in FAMILIES.values() if any(r.family is family for r in measured)]
    of_bound = "{}'s figure is an upper bound on its negative log-likelihood"
    if bounds := ", ".join(of_bound.format(family.title) for family in present if not family.exact):
        gap, crossover = "compute gap is at most the one computed", "crossover is no later than the one read off"
        exact = f", the {REFERENCE.title}'s is exact"
        exact += "" if ranked else f": the true {crossover if repeated else gap}"
        yield f"{bounds}{exact if REFERENCE.family in present else ''}."
    counts: dict[Series, list[float]] = {series: [] for series in ordered(r.series.key for r in measured)}
    for r in measured:
        counts[r.series].append(r.flops_exact / r.flops_6nd)
    ratios = [f"{sum(of) / len(of):.2f} for {series.title}" for series, of in counts.items() if of]
    matched = measured[0].matched
    figure = "shares" if ranked else "gap"
    opening, end = f"Budgets are matched in {matched}.", f"; matched by the other count, the {figure} would be another"
    if repeated:
        opening, end = f"Readings are compared after equally many tokens; their budgets are in {matched}.", ""
    yield (
        f"{opening} There are two counts: 6ND takes 6 FLOPs per parameter without embeddings and token, the exact one "
        "all matrix products, attention and vocabulary head included. The mean ratio of exact to 6ND is "
        f"{listed(ratios)}{end}."
    )


def _of_fits(measured: Sequence[Result], study: Study, annealing_gain: float) -> Iterator[str]:
    """What the fits take for granted; data-limited readings have no fits."""
    repeated, number = measured[0].data_limited, len(measured)
    if early := sum(not r.annealed for r in measured):
        text = f"{early} of {number} readings were taken before the learning rate had come down"
        if annealing_gain and not repeated:
            yield (
                f"{text}; {annealing_gain:.2%} of their loss was taken off for it before the fits (GIDD measured about "
                f"{GIDD_ANNEALING_GAIN:.2%}), while the table of readings shows them as they are."
            )
        else:
            measured_by_gidd = f"GIDD measured a gain of about {GIDD_ANNEALING_GAIN:.2%}"
            yield f"{text}; nothing was taken off for it, while {measured_by_gidd}."
    over = [r.epochs for r in measured if r.epochs is not None and r.epochs > 1]
    if over and not repeated:
        yield (
            f"{len(over)} of {number} readings are of more than one epoch, up to {three(max(over))}: the laws count "
            "repeated tokens as new ones, from which a model learns more."
        )
    inside = {series: sum(m.inside for m in study.of(series.key).minima) for series in ordered(study.series)}
    few = [
        f"{series.title} {number}"
        for series, number in inside.items()
        if series.key in study.series and number < BUDGETS_FOR_E
    ]
    if few and not repeated:
        yield (
            f"Fewer than {BUDGETS_FOR_E} budgets with a minimum inside the sizes tried ({', '.join(few)}) cannot tell "
            "an irreducible loss: laws by the minima are plain power laws there, and too low far beyond the budgets."
        )


def _of_runs(measured: Sequence[Result]) -> Iterator[str]:
    """Sizes, rules and errors of the runs."""
    largest = max(r.non_embedding_parameters for r in measured)
    if largest < SMALL:
        shares = [1 - r.non_embedding_parameters / r.parameters for r in measured]
        yield (
            f"The models are small, at most {count(largest)} parameters without embeddings (embeddings are "
            f"{min(shares):.0%} to {max(shares):.0%} of all), and so are usually their vocabulary and sequence length: "
            "what holds here need not hold at the size of the published laws, which begin near "
            f"{count(SMALL)} parameters and {flops(3e18)} FLOPs."
        )
    yield (
        "Learning rates, batch sizes and shapes follow a rule and were not tuned for each run; what the rule suits "
        "less looks worse than it is."
    )
    if retried := {r.run for r in measured if r.retried}:
        yield f"{len(retried)} runs had failed and were trained at a lower rate than the rule's: see below."
    if len({r.seed for r in measured}) == 1 and not measured[0].ranked:  # the ranking says it itself
        yield "All runs have the same seed: the scatter between seeds is only seen as scatter about the fits."
    if errors := " ".join(_errors(measured)):
        yield errors


def _errors(measured: Sequence[Result]) -> Iterator[str]:
    drawn = [r for r in measured if not r.family.exact]
    titles = " and ".join(family.title for family in FAMILIES.values() if any(r.family is family for r in drawn))
    errors = [r.monte_carlo_stderr for r in drawn if r.monte_carlo_stderr is not None]
    rows = [r.stderr for r in measured if r.stderr is not None]
    counts = sorted({r.draws for r in drawn if r.draws is not None})
    if len(counts) > 1:
        yield f"{titles}'s figures are means of {counts[0]} to {counts[-1]} draws of masks a row."
    if errors:
        weigh = "" if measured[0].data_limited else "; fits weigh by it"
        weigh = "; all runs meet the same masks" if measured[0].ranked else weigh
        yield (
            f"The Monte Carlo error of {titles}'s figures, from the masks drawn, is at most {max(errors):.4f} nats per "
            f"token{weigh}."
        )
    if rows:
        yield (
            f"The error over held-out rows is at most {max(rows):.4f}; it is common to all runs, which are read on the "
            "same rows, so it moves all losses together and is not in the intervals."
        )
