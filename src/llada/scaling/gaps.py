"""The gap between a diffusion model and its ARM twin by each measure that `llada evaluate` has taken of both.

A line holds one figure of the diffusion model, what it is, and the ARM's exact NLL of the same rows. A bound and an
exact figure never stand in a line that does not say so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from llada.errors import UserError
from llada.objectives.families import Family
from llada.scaling.held_out import Figures
from llada.scaling.numbers import or_dash

# By `kind` of the diffusion model's figure: what it is, and how the gap to the ARM's exact NLL reads then.
READINGS = {
    "bound": ("a bound on its NLL from above", "the true gap is at most this"),
    "exact in its order": ("exact, of this order", "exact on both sides"),
    "exact under its sampler": ("exact, of this sampler", "exact on both sides"),
    "bound from below": ("a bound on its NLL from below, any order", "the true gap is at least this"),
}
EXPLAINED = (
    "Nats per token of the same held-out rows; errors are standard errors over rows. The bounds are on the mean over "
    "all orders of unmasking; the exact figures are each of another distribution, and may lie on either side of them. "
    "The ARM's figure is its exact NLL in every line."
)


class Run(Protocol):
    """What is asked of `comparison.RunRecord`."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def workdir(self) -> Any: ...
    @property
    def figures(self) -> Figures: ...
    @property
    def measures(self) -> Sequence[Figures]: ...


class Line(NamedTuple):
    """A figure of a diffusion model and the ARM's on the same rows; None where it was not read on them."""

    run: Run
    figures: Figures
    exact: Figures | None


def lines(runs: Sequence[Run], estimators: Sequence[str] = ()) -> list[Line]:
    """Every measure of the diffusion models with the ARM's beside it; with `estimators` of these only.

    UserError where one of them was not measured, or not on rows that the ARM was read on.
    """
    arm = next(run for run in runs if run.family.exact)
    exact = {of.rows_digest: of for of in (*reversed(arm.measures), arm.figures) if of.rows_digest is not None}
    found: list[Line] = []
    for run in runs:
        if run.family.exact:
            continue
        seen = []
        for of in (run.figures, *run.measures):
            key = (of.estimator, of.sampler, of.rows_digest, of.draws, of.dtype)
            if of.kind in READINGS and key not in seen and (not estimators or of.estimator in estimators):
                seen.append(key)
                found.append(Line(run, of, exact.get(of.rows_digest)))
        for name in estimators:
            own = [line for line in found if line.run is run and line.figures.estimator == name]
            if not own:
                raise UserError(
                    f"--estimator={name}: {run.workdir} has no such evaluation of its last step; run llada evaluate "
                    f"--workdir={run.workdir} --estimator={name} (--rows=N for some rows), and of the ARM on these rows"
                )
            if all(line.exact is None for line in own):
                raise UserError(
                    f"--estimator={name}: {arm.workdir} has no evaluation of the rows that {run.workdir} was read on; "
                    f"run llada evaluate --workdir={arm.workdir} --rows={own[0].figures.rows}"
                )
    return found


def table(found: Sequence[Line]) -> list[list[str]]:
    """Header and rows of strings; nothing where there is no measure but training's own bound."""
    if all(line.figures.source == "training" for line in found):
        return []
    cells = [["", "measure", "nats/token", "it is", "ARM, exact NLL", "gap", "so", "rows"]]
    for run, of, exact in found:
        kind, reading = READINGS[str(of.kind)]
        gap = None if exact is None or None in (of.nats_per_token, exact.nats_per_token) else _difference(of, exact)
        cells.append(
            [
                run.name,
                _measure(of),
                value(of),
                kind,
                "not read on these rows" if exact is None else value(exact),
                or_dash(gap, "+.4f"),
                "-" if gap is None else reading,
                or_dash(of.rows, ","),
            ]
        )
    return cells


def _difference(of: Figures, exact: Figures) -> float:
    assert of.nats_per_token is not None and exact.nats_per_token is not None
    return of.nats_per_token - exact.nats_per_token


def _measure(of: Figures) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in sorted((of.sampler or {}).items()))
    draws = f"{of.draws} draws" if of.draws else ""
    more = "; ".join(filter(None, (settings, draws)))
    return f"{of.estimator} ({more})" if more else str(of.estimator)


def value(of: Figures) -> str:
    """A figure with its error."""
    return or_dash(of.nats_per_token, ".4f") + ("" if of.stderr is None else f" ± {of.stderr:.4f}")
