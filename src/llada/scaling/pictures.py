"""Pictures of a sweep under budgets: loss against size, compute-optimal frontiers, allocation; as PNG files.

Titles state what the numbers say. Points carry two Monte Carlo standard errors, minima two standard errors, bands are
the study's intervals. Needs matplotlib (extra `plots`). What does not exist is not drawn, and the picture says so.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llada.scaling import figure, findings
from llada.scaling.laws import PUBLISHED, Minimum, Point
from llada.scaling.numbers import flops, interval, listed, short, times
from llada.scaling.results import FAILED, Result, points
from llada.scaling.series import Series, ordered
from llada.scaling.study import Fitted, SeriesFit, Study

FARTHEST = 1e4  # times the largest budget: what laws say beyond is not drawn


# --- loss against size


def isoflop(results: Sequence[Result], study: Study, *, annealing_gain: float = 0.0) -> bytes:
    """Loss against N, a panel a series, with a parabola and its minimum per budget; minima outside the sizes hollow."""
    styles = _styles(results, study)
    series = [each for each in styles if any(r.series == each for r in results)] or list(styles)
    caption = "Dashed: through the minima. Hollow: minimum outside the sizes tried."
    if len(series) > 1:
        caption = f"Loss axes differ. {caption} {figure.MEASURES}."
    fig, axes = figure.panels(len(series), _isoflop_title(study), caption, sharex=True)
    by_series = points(results, annealing_gain)
    for each, ax in zip(series, axes, strict=True):
        ax.set(xscale="log", xlabel="parameters without embeddings N", title=each.title)
        ax.set_ylabel(f"held-out nats per token{_bound(each)}")
        of_series = [r for r in results if r.series == each]
        _profiles(ax, styles[each], of_series, by_series.get(each.key, []), study.of(each.key))
    figure.log_ticks(axes[0].xaxis, short)
    return figure.png(fig)


def _styles(results: Sequence[Result], study: Study) -> dict[Series, figure.Style]:
    return figure.styles([*(r.series.key for r in results), *study.series])


def _bound(series: Series) -> str:
    return "" if series.exact else " (bound)"


def _isoflop_title(study: Study) -> str:
    for ratio in findings.size_ratios(study)[:1]:
        budgets = f"{ratio.budgets} budget" + "s" * (ratio.budgets != 1)
        return (
            f"Best sizes at equal compute: {ratio.series.title}'s is {times(ratio.value)} the "
            f"{ratio.reference.title}'s ({times(ratio.low)} to {times(ratio.high)}, {budgets})"
        )
    for series in ordered(study.series):
        if inside := [m for m in study.of(series.key).minima if m.inside]:
            first, last = inside[0], inside[-1]
            title = f"Best size of {series.title}: {short(first.parameters)} at {flops(first.budget)} FLOPs"
            return title + (f", {short(last.parameters)} at {flops(last.budget)}" if len(inside) > 1 else "")
    return "No budget shows a best size yet"


def _profiles(ax, drawn: figure.Style, results: list[Result], runs: list[Point], fitted: SeriesFit) -> None:
    """The panel of one series."""
    budgets = sorted({r.budget for r in results})
    shades = dict(zip(budgets, figure.shades(drawn.colour, len(budgets)), strict=True))
    profiles = {budget: [p for p in runs if p.budget == budget] for budget in budgets}
    minima = {m.budget: m for m in fitted.minima if profiles.get(m.budget)}
    style = dict(linestyle="", marker=drawn.marker, markersize=4, capsize=2, elinewidth=1, zorder=3)
    for budget, profile in profiles.items():
        losses, errors = [p.loss for p in profile], [2 * p.stderr for p in profile]
        sizes = [p.parameters for p in profile]
        ax.errorbar(sizes, losses, errors, color=shades[budget], label=flops(budget), **style)
    for parabola in fitted.parabolas:
        if (minimum := minima.get(parabola.budget)) is not None:
            sizes = [p.parameters for p in profiles[parabola.budget]] + [minimum.parameters] * minimum.inside
            grid = np.geomspace(min(sizes), max(sizes), 100)
            ax.plot(grid, parabola(grid), color=shades[parabola.budget], linewidth=1.2, zorder=2)
    _minima(ax, list(minima.values()), shades, [p.parameters for p in runs])
    _failed(ax, results, shades)
    if not runs:
        figure.note(ax, "no finished run")
    else:
        ax.legend(title="FLOPs", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8)


def _minima(ax, minima: list[Minimum], shades: dict[float, np.ndarray], sizes: list[float]) -> None:
    inside = [m for m in minima if m.inside]
    ax.plot([m.parameters for m in inside], [m.loss for m in inside], "--", color="0.4", linewidth=1, zorder=1)
    for m in minima:
        style = dict(marker="D", markersize=7, markeredgewidth=1.0, color=shades[m.budget], zorder=4, clip_on=False)
        if m.inside:
            factor = math.exp(min(2 * m.log_parameters_stderr, 3.0))
            xerr = [[m.parameters - m.parameters / factor], [m.parameters * factor - m.parameters]]
            style |= dict(markeredgecolor="black", ecolor="black", capsize=2, elinewidth=1)
            ax.errorbar(m.parameters, m.loss, xerr=xerr, yerr=2 * m.loss_stderr, **style)
        else:  # one far outside stands at three times the largest size, or a third of the smallest
            x = figure.clamp(m.parameters, (min(sizes) / 3, max(sizes) * 3))
            ax.errorbar(x, m.loss, markerfacecolor="white", markeredgecolor=shades[m.budget], **style)


def _failed(ax, results: Sequence[Result], shades: dict[float, np.ndarray]) -> None:
    """A cross at the bottom edge for every run without a figure that will not get one."""
    lost = [r for r in results if not r.measured and (r.status == FAILED or r.nats_per_token is not None)]
    style = dict(markersize=8, markeredgewidth=2, clip_on=False, zorder=5)
    for r in lost:
        at = r.non_embedding_parameters, 0.02
        ax.plot(*at, "x", transform=ax.get_xaxis_transform(), color=shades[r.budget], **style)
    if lost:
        runs = "run" if len(lost) == 1 else "runs"
        # An errorbar, as the profiles are: the legend lists lines before them.
        ax.errorbar([], [], fmt="x", color="0.3", markeredgewidth=2, label=f"{len(lost)} {runs}\nfailed")


# --- compute-optimal frontiers


def frontier(
    results: Sequence[Result], study: Study, predict: float | None = None, *, annealing_gain: float = 0.0
) -> bytes:
    """L*(C) of all series with bands, and the compute gap; thin lines for runs read before annealing."""
    gap = next(iter(findings.headline_gaps(study)), None)
    fig, (ax,) = figure.panels(1, _frontier_title(gap, study), _frontier_caption(gap, results, study, annealing_gain))
    ax.set(xscale="log", xlabel=_flops_label(results), ylabel="held-out nats per token")
    largest = study.largest_budget or 0.0
    gap_end = gap.value * gap.budget if gap and gap.value * gap.budget <= FARTHEST * largest else 0.0
    reach = max(largest, gap_end, predict or 0.0)  # where the laws' lines end
    labels: list[tuple[float, float, str, str]] = []
    shown = [r.loss for r in results if r.measured and not r.annealed]
    for series, style in _styles(results, study).items():
        colour, fitted = style.colour, study.of(series.key)
        measured = [r for r in results if r.series == series and r.measured]
        _checkpoints(ax, measured, colour, annealing_gain)
        for m in fitted.minima:
            ax.errorbar(m.budget, m.loss, 2 * m.loss_stderr, linestyle="", **_mark(m, style))
            shown += [m.loss - 2 * m.loss_stderr, m.loss + 2 * m.loss_stderr]
        law = (gap and getattr(fitted.laws, gap.law)) or fitted.laws.best("loss")
        if law is not None:
            _law(ax, study, law, (min(fitted.budgets), max(fitted.budgets)), reach, colour)
            if predict:
                _prediction(ax, study, law, predict, f"{series.title} predicted", colour)
            labels.append((reach, float(law.best(reach)), f"{series.title}{_bound(series)}", colour))
            shown += [float(law.best(budget)) for budget in (min(fitted.budgets), reach)]
        elif fitted.minima or measured:
            ax.plot([], [], " ", color=colour, label=f"{series.title}, no law")
    if predict and labels:
        label = f"{flops(predict)} FLOPs, {times(predict / largest)} the largest budget"
        ax.axvline(predict, color="0.6", linewidth=1, linestyle=":", zorder=1)
        ax.plot([], [], ":", color="0.6", label=label)
    if not ax.has_data():
        figure.note(ax, "no minimum and no law to show")
    if handles := ax.get_legend_handles_labels()[0]:
        size = 10 if len(handles) < 4 else 8
        ax.legend(frameon=False, loc="lower left", labelcolor="linecolor", fontsize=size)
    if shown:
        across = figure.limits([r.budget for r in results] + [reach] * bool(labels), 0.05, log=True)
        ax.set(xlim=across, ylim=figure.limits(shown, 0.08))
        figure.log_ticks(ax.xaxis, flops)
    if gap and gap_end:
        _gap_arrow(ax, gap)
    figure.labels_right(ax, [(x, figure.clamp(y, ax.get_ylim()), text, colour) for x, y, text, colour in labels])
    return figure.png(fig)


def _mark(m: Minimum, style: figure.Style) -> dict[str, Any]:
    """How a minimum is drawn against FLOPs: hollow outside the sizes tried."""
    colour, marker = style
    return dict(color=colour, marker=marker, capsize=3, markerfacecolor=colour if m.inside else "white", zorder=4)


def _frontier_title(gap: findings.Gap | None, study: Study) -> str:
    if gap is None:
        missing = [s.title for s in ordered(study.series) if study.of(s.key).laws.best("loss") is None]
        title = "Loss at the best size against FLOPs"
        return f"{title}; no law of {listed(missing)} yet" if missing else title
    series, reference = gap.series.title, gap.reference.title
    if not math.isfinite(gap.value):
        return f"Compute-optimal: {series}'s law does not come down to the {reference}'s loss at any budget"
    extrapolated = "" if gap.beyond <= 1 else ", extrapolated"
    return (
        f"Compute-optimal: {series} needs {times(gap.value)} the FLOPs of the {reference} at the same loss "
        f"({times(gap.low)} to {times(gap.high)}{extrapolated})"
    )


def _frontier_caption(gap: findings.Gap | None, results: Sequence[Result], study: Study, annealing_gain: float) -> str:
    texts = [f"{figure.MEASURES}.", "The true gap is at most the one shown." if gap else ""]
    texts.append(f"Bands: {study.level:.0%} intervals.")
    if any(fitted.laws.parametric_loss and not fitted.laws.loss for fitted in study.series.values()):
        texts.append("Laws by L(N, D), as the minima give none.")
    if any(r.measured and not r.annealed for r in results):
        corrected = f", {annealing_gain:.2%} taken off" if annealing_gain else ""
        texts.append(f"Thin lines: one run each, before annealing{corrected}.")
    return " ".join(filter(None, texts))


def _checkpoints(ax, results: Sequence[Result], colour: str, annealing_gain: float) -> None:
    """Loss against FLOPs of each run that was read before annealing."""
    runs: dict[str, list[Result]] = {}
    for r in results:
        if not r.annealed:
            runs.setdefault(r.run, []).append(r)
    for readings in runs.values():
        readings = sorted(readings, key=lambda r: r.budget)
        loss = [r.loss * (1 - annealing_gain) for r in readings]
        marker = "." if len(readings) == 1 else ""
        ax.plot([r.budget for r in readings], loss, color=colour, alpha=0.3, linewidth=0.9, marker=marker)


def _law(ax, study: Study, law: Fitted, budgets: tuple[float, float], reach: float, colour: str) -> None:
    """A law from the least to the largest of `budgets`, dashed beyond them up to `reach`, with its band."""
    low, high = budgets
    inside, beyond = np.geomspace(low, high, 80), np.geomspace(high, max(reach, high), 40)
    ax.plot(inside, law.best(inside), color=colour, linewidth=2, zorder=3)
    if reach > high:
        ax.plot(beyond, law.best(beyond), color=colour, linewidth=1.5, linestyle=(0, (4, 2)), zorder=3)
    grid = np.geomspace(low, max(reach, high), 60)
    bands = [study.estimate(0.0, law.draws(budget)) for budget in grid]
    ends = np.array([[band["low"], band["high"]] for band in bands], float)  # None, no end to it, as nan
    ax.fill_between(grid, *ends.T, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _prediction(ax, study: Study, law: Fitted, budget: float, name: str, colour: str) -> None:
    """A series' loss at a budget that the user named, with its interval, in the picture and in the legend."""
    estimate = study.estimate(float(law.best(budget)), law.draws(budget))
    y = estimate["value"]
    ends = [[y - (estimate["low"] or y)], [(estimate["high"] or y) - y]]
    style = dict(color=colour, marker="D", markerfacecolor="white", capsize=4, zorder=5, linestyle="")
    label = f"{name}: {interval(estimate, '{:.2f}'.format)}"
    ax.errorbar(budget, y, np.maximum(ends, 0), label=label, **style)


def _gap_arrow(ax, gap: findings.Gap) -> None:
    end = gap.value * gap.budget
    head = "->" if end != gap.budget else "-"
    arrow = {"arrowstyle": head, "color": "black", "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (end, gap.loss), (gap.budget, gap.loss), zorder=6, arrowprops=arrow)
    text = (
        f"at {gap.loss:.2f} nats per token:\n"
        f"{gap.series.title} {flops(end)}, {gap.reference.title} {flops(gap.budget)} FLOPs\n"
        f"= {times(gap.value)} ({times(gap.low)} to {times(gap.high)})"
    )
    # Losses fall with FLOPs: the top of the panel, right of the middle, is empty whatever the laws.
    middle = math.sqrt(end * gap.budget)
    across = (ax.transData + ax.transAxes.inverted()).transform((middle, gap.loss))[0]
    style = dict(ha="center", va="top", fontsize=10, zorder=6, bbox={"facecolor": "white", "edgecolor": "none"})
    leader = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.8, "shrinkB": 2}
    at = figure.clamp(across, (0.5, 0.66)), 0.97
    ax.annotate(text, (middle, gap.loss), xytext=at, textcoords="axes fraction", arrowprops=leader, **style)


# --- allocation


def allocation(results: Sequence[Result], study: Study) -> bytes:
    """N*(C) and D*(C) of all series with bands, and the published lines, dotted outside their own budgets."""
    title, exponents = _allocation_texts(study)
    caption = "Grey: published laws, dotted outside the budgets they were fitted at. "
    fig, axes = figure.panels(2, title, f"{caption}Bands: {study.level:.0%} intervals. {exponents}")
    budgets = {r.budget for r in results} | {b for fitted in study.series.values() for b in fitted.budgets}
    quantities = {
        "parameters": ("parameters without embeddings N*", [float(r.non_embedding_parameters) for r in results]),
        "tokens": ("tokens D*", [float(r.tokens) for r in results]),
    }
    for ax, (quantity, (label, values)) in zip(axes, quantities.items(), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=_flops_label(results), ylabel=label)
        if budgets:
            across = min(budgets) / 2, max(budgets) * 2
            _allocated(ax, study, _styles(results, study), quantity, values, across)
        else:
            figure.note(ax, "no runs")
    return figure.png(fig)


def _allocated(
    ax,
    study: Study,
    styles: dict[Series, figure.Style],
    quantity: str,
    values: list[float],
    across: tuple[float, float],
) -> None:
    """One panel; `values` are those of the runs, `across` the ends of the axis of FLOPs."""
    labels = _published(ax, quantity, *across)
    ends = figure.limits([*values, *(y for _, y, *_ in labels)], 0.1, log=True)
    for series, style in styles.items():
        colour, fitted = style.colour, study.of(series.key)
        for m in fitted.minima:
            y, factor = figure.clamp(getattr(m, quantity), ends), math.exp(min(2 * m.log_parameters_stderr, 3.0))
            ax.errorbar(m.budget, y, [[y - y / factor], [y * factor - y]], **_mark(m, style))
        if law := fitted.laws.best(quantity):
            _law(ax, study, law, across, across[1], colour)
            y = figure.clamp(float(law.best(across[1])), ends)
            labels.append((across[1], y, f"{series.title} $C^{{{law.best.exponent:.2f}}}$", colour))
        elif fitted.minima:
            ax.plot([], [], " ", color=colour, label=f"{series.title}, no law")
    ax.set(xlim=across, ylim=ends)
    figure.log_ticks(ax.xaxis, flops)
    figure.log_ticks(ax.yaxis, short)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, loc="lower right", labelcolor="linecolor")
    figure.labels_right(ax, labels)


def _published(ax, quantity: str, low: float, high: float) -> list[tuple[float, float, str, str]]:
    """Published lines from `low` to `high` FLOPs; returns their labels."""
    labels = []
    for paper in PUBLISHED:
        law = getattr(paper, quantity)
        if law is None:
            continue
        grey = "0.6" if paper.causal else "0.45"
        ax.plot([low, high], law([low, high]), ":", color=grey, linewidth=1, zorder=1)
        fitted = max(low, paper.budgets[0]), min(high, paper.budgets[-1])
        if fitted[0] < fitted[1]:
            ax.plot(fitted, law(fitted), color=grey, linewidth=1.3, zorder=1)
        labels.append((high, float(law(high)), paper.name, grey))
    return labels


def _allocation_texts(study: Study) -> tuple[str, str]:
    """Title, and the exponents of N* with intervals."""
    exponents = {}
    for series in ordered(study.series):
        if law := study.of(series.key).laws.best("parameters"):
            exponents[series.title] = study.constants(law)["exponent"]
    if not exponents:
        return "No law of the best size yet", ""
    title = listed([f"$C^{{{e['value']:.2f}}}$ ({name})" for name, e in exponents.items()])
    intervals = ", ".join(f"{name} {interval(e, '{:.2f}'.format)}" for name, e in exponents.items())
    return f"Compute-optimal: the best size grows as {title}", f"Exponents of N*: {intervals}."


def _flops_label(results: Sequence[Result]) -> str:
    counts = {"6nd": "6ND", "exact": "all matrix products"}
    matched = {counts[r.matching] for r in results}
    return "training FLOPs C" + (f" ({matched.pop()})" if len(matched) == 1 else "")
