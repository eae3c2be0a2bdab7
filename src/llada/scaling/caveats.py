"""What a reader of a sweep must know before believing it: one sentence each, and only those that apply.

Units: FLOPs, parameters without embeddings, tokens, nats per token.
"""

from collections.abc import Sequence

from llada.scaling.findings import NAMES, count, flops, three
from llada.scaling.published import GIDD_ANNEALING_GAIN
from llada.scaling.results import FAILED, FINISHED, Result
from llada.scaling.study import Study

SMALL = 50e6  # parameters without embeddings: near the smallest models that the published laws were fitted to
BUDGETS_FOR_E = 4  # fewer cannot tell an irreducible loss: laws.offset_power_law


def caveats(results: Sequence[Result], study: Study, matching: str, annealing_gain: float, repeated: bool) -> list[str]:
    """Sentences, the weightiest first; `repeated`: of the data-limited mode, which has no laws."""
    measured = [r for r in results if r.measured]
    if not measured:
        return ["No reading has a figure, so nothing here is a result."]
    return [
        text
        for text in (
            _bound(measured, repeated),
            _accounting(measured, matching, repeated),
            _annealing(measured, 0.0 if repeated else annealing_gain),
            "" if repeated else _epochs(measured),
            "" if repeated else _few_budgets(study),
            _small(measured),
            "Learning rates, batch sizes and shapes follow a rule and were not tuned for each run; a family that the "
            "rule suits less looks worse than it is.",
            _retried(measured),
            _seeds(measured),
            _errors(measured),
        )
        if text
    ]


def lost_runs(results: Sequence[Result]) -> dict[str, str]:
    """Why runs have no figure: failed, diverged, running or waiting; by name, once a run."""
    found = {}
    for r in results:
        if r.measured:
            continue
        if r.nats_per_token is not None:
            why = f"diverged: its loss is {r.nats_per_token}"
        elif r.status == FAILED:
            why = "failed"
        else:
            why = (
                "not read at this step: it was finished before the grid asked for it"
                if r.status == FINISHED
                else r.status
            )
        found.setdefault(r.run, why + (f" ({r.reason})" if r.reason else ""))
    return found


def _bound(measured: Sequence[Result], repeated: bool) -> str:
    families = {r.objective for r in measured}
    if "diffusion" not in families:
        return ""
    text = "LLaDA's figure is an upper bound on its negative log-likelihood"
    if "autoregressive" not in families:
        return text + "."
    if repeated:
        return text + ", the ARM's is exact: the true crossover is no later than the one read off."
    return text + ", the ARM's is exact: the true compute gap is at most the one computed."


def _accounting(measured: Sequence[Result], matching: str, repeated: bool) -> str:
    ratios = []
    for family, name in NAMES.items():
        own = [r.flops_exact / r.flops_6nd for r in measured if r.objective == family]
        if own:
            ratios.append(f"{sum(own) / len(own):.2f} for {name}")
    matched = {"6nd": "6ND", "exact": "exact FLOPs"}.get(matching, matching)
    opening, end = f"Budgets are matched in {matched}.", "; matched by the other count, the gap would be another"
    if repeated:
        opening, end = f"Readings are compared after equally many tokens; their budgets are in {matched}.", ""
    return (
        f"{opening} There are two counts: 6ND takes 6 FLOPs per parameter without embeddings "
        "and token, the exact one all matrix products, attention and vocabulary head included. The mean ratio of exact "
        f"to 6ND is {' and '.join(ratios)}{end}."
    )


def _annealing(measured: Sequence[Result], annealing_gain: float) -> str:
    early = sum(not r.annealed for r in measured)
    if not early:
        return ""
    text = f"{early} of {len(measured)} readings were taken before the learning rate had come down"
    if annealing_gain:
        return (
            f"{text}; {annealing_gain:.2%} of their loss was taken off for it before the fits (GIDD measured about "
            f"{GIDD_ANNEALING_GAIN:.2%}), while the table of readings shows them as they are."
        )
    return f"{text}; nothing was taken off for it, while GIDD measured a gain of about {GIDD_ANNEALING_GAIN:.2%}."


def _epochs(measured: Sequence[Result]) -> str:
    over = [r.epochs for r in measured if r.epochs is not None and r.epochs > 1]
    if not over:
        return ""
    return (
        f"{len(over)} of {len(measured)} readings are of more than one epoch, up to {three(max(over))}: the laws count "
        "repeated tokens as new ones, from which a model learns more."
    )


def _few_budgets(study: Study) -> str:
    few = []
    for family, name in NAMES.items():
        inside = sum(m.inside for m in study.minima.get(family, []))
        if family in study.budgets and inside < BUDGETS_FOR_E:
            few.append(f"{name} {inside}")
    if not few:
        return ""
    return (
        f"Fewer than {BUDGETS_FOR_E} budgets with a minimum inside the sizes tried ({', '.join(few)}) cannot tell an "
        "irreducible loss: laws by the minima are plain power laws there, and too low far beyond the budgets."
    )


def _small(measured: Sequence[Result]) -> str:
    largest = max(measured, key=lambda r: r.non_embedding_parameters)
    if largest.non_embedding_parameters >= SMALL:
        return ""
    shares = [1 - r.non_embedding_parameters / r.parameters for r in measured]
    return (
        f"The models are small, at most {count(largest.non_embedding_parameters)} parameters without embeddings "
        f"(embeddings are {min(shares):.0%} to {max(shares):.0%} of all), and so are usually their vocabulary and "
        "sequence length: what holds here need not hold at the size of the published laws, "
        f"which begin near {count(SMALL)} parameters and {flops(3e18)} FLOPs."
    )


def _retried(measured: Sequence[Result]) -> str:
    runs = {r.run for r in measured if r.retried}
    return f"{len(runs)} runs had failed and were trained at a lower rate than the rule's: see below." if runs else ""


def _seeds(measured: Sequence[Result]) -> str:
    if len({r.seed for r in measured}) > 1:
        return ""
    return "All runs have the same seed: the scatter between seeds is only seen as scatter about the fits."


def _errors(measured: Sequence[Result]) -> str:
    draws = [r.monte_carlo_stderr for r in measured if r.objective == "diffusion" and r.monte_carlo_stderr is not None]
    rows = [r.stderr for r in measured if r.stderr is not None]
    parts = []
    counts = sorted({r.draws for r in measured if r.objective == "diffusion" and r.draws is not None})
    if len(counts) > 1:
        parts.append(f"LLaDA's figures are means of {counts[0]} to {counts[-1]} draws of masks a row.")
    if draws:
        parts.append(
            f"The Monte Carlo error of LLaDA's figures, from the masks drawn, is at most {max(draws):.4f} nats per "
            "token; fits weigh by it."
        )
    if rows:
        parts.append(
            f"The error over held-out rows is at most {max(rows):.4f}; it is common to all runs, which are read on the "
            "same rows, so it moves all losses together and is not in the intervals."
        )
    return " ".join(parts)
