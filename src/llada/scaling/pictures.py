"""Pictures of a sweep: loss against size per budget, compute-optimal frontiers, allocation, repeated data.

Titles state what the numbers say. Points carry two Monte Carlo standard errors, minima two standard errors, bands are
the study's intervals. Needs matplotlib (extra `plots`). What is not there is not drawn, and the picture says so.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llada.scaling import figure, findings
from llada.scaling.findings import NAMES, flops, short, times
from llada.scaling.isoflop import Minimum, parabolas
from llada.scaling.laws import Point, PowerLaw
from llada.scaling.published import PUBLISHED
from llada.scaling.repetition import Crossover, Curve, crossovers, curves
from llada.scaling.results import FAILED, Result, points
from llada.scaling.study import Study

COLOURS = {"diffusion": "#c8553d", "autoregressive": "#2a6f97"}
FARTHEST = 1e4  # times the largest budget: what laws say beyond is not drawn
BOUND = "LLaDA: upper bound on its NLL; ARM: exact NLL."


def isoflop(results: Sequence[Result], study: Study, path: Path, *, annealing_gain: float = 0.0) -> None:
    """Loss against N, a panel a family, with a parabola and its minimum per budget; minima outside the sizes hollow."""
    families = [f for f in NAMES if any(r.objective == f for r in results)] or list(NAMES)
    subtitle = "Dashed: through the minima. Hollow: minimum outside the sizes tried."
    if len(families) > 1:
        subtitle = f"Loss axes differ. {subtitle} {BOUND}"
    fig, axes = figure.panels(len(families), _isoflop_title(study), subtitle, sharex=True)
    by_family = points(results, annealing_gain)
    for family, ax in zip(families, axes, strict=True):
        ax.set(xscale="log", xlabel="parameters without embeddings N", title=NAMES[family])
        ax.set_ylabel("held-out nats per token" + (" (bound)" if family == "diffusion" else ""))
        budgets = sorted({r.budget for r in results if r.objective == family})
        shades = dict(zip(budgets, figure.shades(COLOURS[family], len(budgets)), strict=True))
        profiles = [[p for p in by_family.get(family, []) if p.budget == b] for b in budgets]
        for budget, profile in zip(budgets, profiles, strict=True):
            _profile(ax, profile, shades[budget], flops(budget))
        minima = [m for m in study.minima.get(family, []) if m.budget in shades]
        fitted = [p for p in profiles if p and p[0].budget in {m.budget for m in minima}]
        for profile, curve in zip(fitted, parabolas(fitted), strict=True):
            own = next((m.parameters for m in minima if m.budget == curve.budget and m.inside), profile[0].parameters)
            ends = [*(p.parameters for p in profile), own]
            grid = np.geomspace(min(ends), max(ends), 100)
            # A parabola is given by what it says at the runs, whatever way its coefficients are kept.
            through = np.polynomial.Polynomial.fit(np.log([p.parameters for p in profile]), curve.fitted_P, 2)
            ax.plot(grid, through(np.log(grid)), color=shades[curve.budget], linewidth=1.2, zorder=2)
        sizes = [p.parameters for profile in profiles for p in profile] or [1.0]
        _minima_of_panel(ax, minima, shades, (min(sizes), max(sizes)))
        _failed(ax, [r for r in results if r.objective == family], shades)
        if not any(profiles):
            figure.say(ax, "no finished run")
        elif budgets:
            ax.legend(title="FLOPs", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8)
    figure.log_ticks(axes[0].xaxis, short)
    figure.save(fig, path)


def _isoflop_title(study: Study) -> str:
    ratio = findings.size_ratio(study)
    if ratio:
        return (
            f"Best sizes at equal compute: LLaDA's is {times(ratio.value)} an ARM's "
            f"({times(ratio.low)} to {times(ratio.high)}, {_budgets(ratio.budgets)})"
        )
    for family in NAMES:
        if inside := [m for m in study.minima.get(family, []) if m.inside]:
            first, last = inside[0], inside[-1]
            title = f"Best size of {NAMES[family]}: {short(first.parameters)} at {flops(first.budget)} FLOPs"
            return title + (f", {short(last.parameters)} at {flops(last.budget)}" if len(inside) > 1 else "")
    return "No budget shows a best size yet"


def _budgets(number: int) -> str:
    return f"{number} budget" + "s" * (number != 1)


def _profile(ax, profile: list[Point], shade, label: str) -> None:
    ax.errorbar(
        [p.parameters for p in profile], [p.loss for p in profile], yerr=[2 * p.stderr for p in profile],
        color=shade, linestyle="", marker="o", markersize=4, capsize=2, elinewidth=1, label=label, zorder=3,
    )  # fmt: skip


def _minima_of_panel(ax, minima: list[Minimum], shades, sizes: tuple[float, float]) -> None:
    inside = [m for m in minima if m.inside]
    ax.plot([m.parameters for m in inside], [m.loss for m in inside], "--", color="0.4", linewidth=1, zorder=1)
    low, high = (end * 3**sign for end, sign in zip(sizes, (-1, 1), strict=True))
    for m in minima:
        factor = math.exp(min(2 * m.log_parameters_stderr, 3.0))
        x = m.parameters if m.inside else min(max(m.parameters, low), high)  # one far outside stands three times off
        xerr = [[x - x / factor], [x * factor - x]] if m.inside else None
        edge = "black" if m.inside else shades[m.budget]
        ax.errorbar(
            x, m.loss, xerr=xerr, yerr=2 * m.loss_stderr if m.inside else None, color=shades[m.budget], marker="D",
            markersize=7, markerfacecolor=shades[m.budget] if m.inside else "white", markeredgecolor=edge,
            markeredgewidth=1.0, ecolor="black", capsize=2, elinewidth=1, zorder=4, clip_on=False,
        )  # fmt: skip


def _failed(ax, results: Sequence[Result], shades) -> None:
    """A cross at the bottom edge for every run without a figure that will not get one."""
    lost = [r for r in results if not r.measured and (r.status == FAILED or r.nats_per_token is not None)]
    for r in lost:
        ax.plot(
            r.non_embedding_parameters, 0.02, "x", transform=ax.get_xaxis_transform(), color=shades[r.budget],
            markersize=8, markeredgewidth=2, clip_on=False, zorder=5,
        )  # fmt: skip
    if lost:
        runs = "run" if len(lost) == 1 else "runs"
        # An errorbar, as the profiles are: the legend lists lines before them.
        ax.errorbar([], [], fmt="x", color="0.3", markeredgewidth=2, label=f"{len(lost)} {runs}\nfailed")


def frontier(
    results: Sequence[Result], study: Study, path: Path, predict: float | None = None, *, annealing_gain: float = 0.0
) -> None:
    """L*(C) of both families with bands, and the compute gap; thin lines for runs read before annealing."""
    gap = findings.headline_gap(study)
    subtitle = f"{BOUND}{' The true gap is at most the one shown.' if gap else ''} Bands: {study.level:.0%} intervals."
    if any(findings.law_of(study, family, "loss") == "parametric_loss" for family in NAMES):
        subtitle += " Laws by L(N, D), as the minima give none."
    if any(r.measured and not r.annealed for r in results):
        told = f", {annealing_gain:.2%} taken off" if annealing_gain else ""
        subtitle += f" Thin lines: one run each, before annealing{told}."
    fig, (ax,) = figure.panels(1, _frontier_title(gap, study), subtitle)
    ax.set(xscale="log", xlabel=_flops_label(results), ylabel="held-out nats per token")
    largest = findings.largest_budget(study) or 0.0
    end = gap.value * gap.budget if gap and gap.value * gap.budget <= FARTHEST * largest else 0.0
    at = max(largest, end, predict or 0.0)  # where the laws' lines end
    entries, seen = [], [r.nats_per_token for r in results if r.measured and not r.annealed]
    for family, colour in COLOURS.items():
        budgets = study.budgets.get(family, [])
        _checkpoints(ax, results, family, annealing_gain)
        minima = study.minima.get(family, [])
        for m in minima:
            ax.errorbar(m.budget, m.loss, 2 * m.loss_stderr, color=colour, marker="o", capsize=3, linestyle="",
                        markerfacecolor=colour if m.inside else "white", zorder=4)  # fmt: skip
            seen += [m.loss, m.loss - 2 * m.loss_stderr, m.loss + 2 * m.loss_stderr]
        if law := gap.law if gap else findings.law_of(study, family, "loss"):
            _law(ax, study, family, law, min(budgets), max(budgets), at, colour)
            if predict:
                _prediction(ax, study, family, law, predict, colour)
            text = f"{NAMES[family]}" + (" (bound)" if family == "diffusion" else "")
            entries.append((at, float(study.laws[family][law][0](at)), text, colour))
            seen += [float(study.laws[family][law][0](budget)) for budget in (min(budgets), at)]
        elif minima or any(r.measured and r.objective == family for r in results):
            ax.plot([], [], " ", color=colour, label=NAMES[family] + ", no law")
    if predict and entries:
        ax.axvline(predict, color="0.6", linewidth=1, linestyle=":", zorder=1)
        beyond = predict / findings.largest_budget(study)
        ax.plot([], [], ":", color="0.6", label=f"{flops(predict)} FLOPs, {times(beyond)} the largest budget")
    if not ax.has_data():
        figure.say(ax, "no minimum and no law to show")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, loc="lower left", labelcolor="linecolor")
    if (across := figure.around([r.budget for r in results] + [at] * bool(entries), 0.05, log=True)) and seen:
        ax.set(xlim=across, ylim=figure.around(seen, 0.08))
        figure.log_ticks(ax.xaxis, flops)
    if end:
        _gap_arrow(ax, gap)
    figure.labels_right(ax, [(x, figure.within(y, ax.get_ylim()), *rest) for x, y, *rest in entries])
    figure.save(fig, path)


def _frontier_title(gap: findings.Gap | None, study: Study) -> str:
    if gap is None:
        there = [NAMES[f] for f in NAMES if findings.law_of(study, f, "loss")]
        missing = " and ".join(NAMES[f] for f in NAMES if NAMES[f] not in there)
        return f"Loss at the best size against FLOPs; no law of {missing} yet" if missing else "Loss against FLOPs"
    if not math.isfinite(gap.value):
        return "Compute-optimal: LLaDA's law does not come down to the ARM's loss at any budget"
    told = "" if gap.beyond <= 1 else ", extrapolated"
    return (
        f"Compute-optimal: LLaDA needs {times(gap.value)} the FLOPs of an ARM at the same loss "
        f"({times(gap.low)} to {times(gap.high)}{told})"
    )


def _checkpoints(ax, results: Sequence[Result], family: str, annealing_gain: float) -> None:
    """Loss against FLOPs of each run of the family that was read before annealing."""
    runs: dict[str, list[Result]] = {}
    for r in results:
        if r.objective == family and r.measured and not r.annealed:
            runs.setdefault(r.run, []).append(r)
    for readings in runs.values():
        readings = sorted(readings, key=lambda r: r.budget)
        loss = [r.nats_per_token * (1 - annealing_gain) for r in readings]
        marker = "." if len(readings) == 1 else ""
        ax.plot([r.budget for r in readings], loss, color=COLOURS[family], alpha=0.3, linewidth=0.9, marker=marker)


def _law(ax, study: Study, family: str, law: str, low: float, high: float, reach: float, colour: str) -> None:
    """A law over the budgets that have runs, dashed beyond them up to `reach`, with its band."""
    best, draws = study.laws[family][law]
    inside, beyond = np.geomspace(low, high, 80), np.geomspace(high, max(reach, high), 40)
    ax.plot(inside, best(inside), color=colour, linewidth=2, zorder=3)
    if reach > high:
        ax.plot(beyond, best(beyond), color=colour, linewidth=1.5, linestyle=(0, (4, 2)), zorder=3)
    grid = np.geomspace(low, max(reach, high), 60)
    bands = np.array([_ends(study, draws, c) for c in grid])
    ax.fill_between(grid, *bands.T, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _ends(study: Study, draws: PowerLaw, budget: float) -> tuple[float, float]:
    """The study's interval of a law at one budget; nan where it has no end."""
    found = study.estimate(0.0, draws(budget))
    return tuple(math.nan if found[end] is None else found[end] for end in ("low", "high"))


def _prediction(ax, study: Study, family: str, law: str, budget: float, colour: str) -> None:
    """A family's loss at a budget that the user named, with its interval, in the picture and in the legend."""
    best, draws = study.laws[family][law]
    value = study.estimate(float(best(budget)), draws(budget))
    y = value["value"]
    ends = [[y - (value["low"] or y)], [(value["high"] or y) - y]]
    told = findings.interval(value, "{:.2f}".format)
    ax.errorbar(budget, y, np.maximum(ends, 0), color=colour, marker="D", markerfacecolor="white", capsize=4, zorder=5,
                linestyle="", label=f"{NAMES[family]} predicted: {told}")  # fmt: skip


def _gap_arrow(ax, gap: findings.Gap) -> None:
    end = gap.value * gap.budget
    ax.annotate("", (end, gap.loss), (gap.budget, gap.loss), zorder=6,
                arrowprops={"arrowstyle": "->" if end != gap.budget else "-", "color": "black", "linewidth": 1.4,
                            "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    text = f"at {gap.loss:.2f} nats per token:\nLLaDA {flops(end)}, ARM {flops(gap.budget)} FLOPs\n"
    text += f"= {times(gap.value)} ({times(gap.low)} to {times(gap.high)})"
    # Losses fall: at the top, right of the middle, there is nothing whatever the laws.
    middle = math.sqrt(end * gap.budget)
    across = (ax.transData + ax.transAxes.inverted()).transform((middle, gap.loss))[0]
    ax.annotate(text, (middle, gap.loss), xytext=(min(max(across, 0.5), 0.66), 0.97), textcoords="axes fraction",
                ha="center", va="top", fontsize=10, zorder=6, bbox={"facecolor": "white", "edgecolor": "none"},
                arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.8, "shrinkB": 2})  # fmt: skip


def allocation(results: Sequence[Result], study: Study, path: Path) -> None:
    """N*(C) and D*(C) of both families with bands, and the published lines, dotted outside their own budgets."""
    quantities = ("parameters", "tokens")
    title, exponents = _allocation_texts(study)
    subtitle = "Grey: published laws, dotted outside the budgets they were fitted at. "
    fig, axes = figure.panels(2, title, subtitle + f"Bands: {study.level:.0%} intervals. {exponents}")
    budgets = sorted({r.budget for r in results} | {b for bs in study.budgets.values() for b in bs})
    for ax, quantity in zip(axes, quantities, strict=True):
        symbol = {"parameters": "parameters without embeddings N*", "tokens": "tokens D*"}[quantity]
        ax.set(xscale="log", yscale="log", xlabel=_flops_label(results), ylabel=symbol)
        if not budgets:
            figure.say(ax, "no runs")
            continue
        low, high = budgets[0] / 2, budgets[-1] * 2
        entries = _published(ax, quantity, low, high)
        key = {"parameters": "non_embedding_parameters", "tokens": "tokens"}[quantity]
        own = [float(getattr(r, key)) for r in results]
        ends = figure.around([*own, *(y for _, y, *_ in entries)], 0.1, log=True)
        for family, colour in COLOURS.items():
            minima = study.minima.get(family, [])
            for m in minima:
                y, factor = figure.within(getattr(m, quantity), ends), math.exp(min(2 * m.log_parameters_stderr, 3.0))
                ax.errorbar(m.budget, y, [[y - y / factor], [y * factor - y]], color=colour, marker="o", capsize=3,
                            markerfacecolor=colour if m.inside else "white", zorder=4)  # fmt: skip
            if law := findings.law_of(study, family, quantity):
                _law(ax, study, family, law, low, high, high, colour)
                best = study.laws[family][law][0]
                entries.append(
                    (
                        high,
                        figure.within(float(best(high)), ends),
                        f"{NAMES[family]} $C^{{{best.exponent:.2f}}}$",
                        colour,
                    )
                )
            elif minima:
                ax.plot([], [], " ", color=colour, label=f"{NAMES[family]}, no law")
        ax.set(xlim=(low, high), ylim=ends)
        figure.log_ticks(ax.xaxis, flops)
        figure.log_ticks(ax.yaxis, short)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, loc="lower right", labelcolor="linecolor")
        figure.labels_right(ax, entries)
    figure.save(fig, path)


def _published(ax, quantity: str, low: float, high: float) -> list[tuple]:
    """Published lines from `low` to `high` FLOPs; returns their labels."""
    entries = []
    for paper in PUBLISHED:
        if (law := getattr(paper, quantity)) is not None:
            grey = "0.45" if paper.family == "diffusion" else "0.6"
            ax.plot([low, high], law([low, high]), ":", color=grey, linewidth=1, zorder=1)
            own = max(low, paper.low), min(high, paper.high)
            if own[0] < own[1]:
                ax.plot(own, law(own), color=grey, linewidth=1.3, zorder=1)
            entries.append((high, float(law(high)), paper.name, grey))
    return entries


def _allocation_texts(study: Study) -> tuple[str, str]:
    """Title, and the exponents of N* with intervals."""
    found = {}
    for family in NAMES:
        if law := findings.law_of(study, family, "parameters"):
            found[NAMES[family]] = study.constants(family, law)["exponent"]
    if not found:
        return "No law of the best size yet", ""
    title = " and ".join(f"$C^{{{e['value']:.2f}}}$ ({name})" for name, e in found.items())
    exponents = ", ".join(f"{name} {findings.interval(e, '{:.2f}'.format)}" for name, e in found.items())
    return f"Compute-optimal: the best size grows as {title}", f"Exponents of N*: {exponents}."


def repeat(results: Sequence[Result], path: Path) -> None:
    """Loss against epochs, a panel per number of unique tokens; best epochs starred, crossovers marked or denied."""
    found, crossed = curves(results), crossovers(results)
    corpora = sorted({c.unique_tokens for c in found})
    subtitle = "Star: lowest loss. Square: LLaDA's first reading below the ARM after equally many epochs. Ring: below "
    subtitle += f"the ARM's lowest loss. {BOUND}"
    if cut := _cut(found):
        subtitle += " ARM curves go on above the picture."
    fig, axes = figure.panels(max(len(corpora), 1), _repeat_title(crossed), subtitle, sharex=True, sharey=True)
    sizes = sorted({c.parameters for c in found})
    shades = {f: dict(zip(sizes, figure.shades(colour, len(sizes)), strict=True)) for f, colour in COLOURS.items()}
    for ax, corpus in zip(axes, corpora, strict=False):
        here = [x for x in crossed if x.unique_tokens == corpus]
        ax.set(xscale="log", xlabel="epochs")
        ax.set_title("\n".join([f"{short(corpus)} unique tokens", *map(_crossing_text, here)]), fontsize=10)
        for curve in (c for c in found if c.unique_tokens == corpus):
            _epoch_curve(ax, curve, shades[curve.objective][curve.parameters])
        for x in here:
            own = next(c for c in found if (c.objective, c.size, c.unique_tokens) == ("diffusion", x.size, corpus))
            for epochs, marker in ((x.same_epochs, "s"), (x.below_best, "o")):
                if epochs is not None:
                    ax.plot(epochs, own.at(epochs), marker, markersize=13, markeredgecolor="black",
                            markerfacecolor="none", markeredgewidth=1.2, zorder=5)  # fmt: skip
    axes[0].set_ylabel("held-out nats per token")
    if not found:
        figure.say(axes[0], "no readings against epochs")
    if cut:
        axes[0].set_ylim(*cut)
    for family in NAMES:
        for size in sizes if any(c.objective == family for c in found) else []:
            axes[-1].plot(
                [], [], color=shades[family][size], marker="o", markersize=4, label=f"{NAMES[family]} {short(size)}"
            )
    if found:
        figure.log_ticks(axes[0].xaxis, short)
        axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=9, title="parameters")
    figure.save(fig, path)


def _cut(found: Sequence[Curve]) -> tuple[float, float] | None:
    """Ends of the loss axis where an ARM that learned its corpus by heart would press all else into a flat line."""
    low = min((min(c.loss) for c in found), default=0.0)
    seen = max((x for c in found for x in (c.loss if c.objective == "diffusion" else c.loss[:1])), default=0.0)
    top = low + 1.5 * (seen - low)
    return (low - 0.05 * (top - low), top) if low < seen and top < max(max(c.loss) for c in found) else None


def _epoch_curve(ax, curve: Curve, shade) -> None:
    ax.errorbar(curve.epochs, curve.loss, [2 * e for e in curve.stderr], color=shade, marker="o", markersize=4,
                capsize=2, linewidth=1.4, zorder=3)  # fmt: skip
    ax.plot(*curve.best, "*", color=shade, markersize=14, markeredgecolor="white", zorder=4)


def _crossing_text(x: Crossover) -> str:
    size = f"{short(x.parameters)}: "
    if x.same_epochs is None and x.below_best is None:
        return f"{size}no crossover up to {short(x.until)} epochs"
    at = [f"crossover at {short(x.same_epochs)} epochs"] if x.same_epochs is not None else []
    below = f"below the ARM's best at {short(x.below_best)}" if x.below_best is not None else "not below the ARM's best"
    return size + ", ".join([*at, below])


def _repeat_title(crossed: Sequence[Crossover]) -> str:
    if not crossed:
        return "Loss against epochs over the same tokens"
    won = [x.below_best for x in crossed if x.below_best is not None]
    passed = [x.same_epochs for x in crossed if x.same_epochs is not None]
    last = short(max(x.until for x in crossed))
    if won:
        share = "" if len(won) == len(crossed) else f" in {len(won)} of {len(crossed)} cases"
        return f"Repeated data: LLaDA goes below the ARM's best after {_span(won)} epochs{share}"
    if passed:
        return f"Repeated data: LLaDA passes the ARM after {_span(passed)} epochs, but not the ARM's best up to {last}"
    return f"Repeated data: LLaDA does not pass the ARM up to {last} epochs"


def _span(values: Sequence[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def _flops_label(results: Sequence[Result]) -> str:
    kinds = {"6nd": "6ND", "exact": "all matrix products"}
    matched = {kinds.get(r.matching, r.matching) for r in results}
    return "training FLOPs C" + (f" ({matched.pop()})" if len(matched) == 1 else "")
