"""Variants of an objective ranked: what a sweep of mode `variants` says, in words, tables and pictures.

Held-out figures are the bound (of an ARM, the NLL) for all runs, whatever they were trained on.
Units: FLOPs, nats per token.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from llada.scaling import figure
from llada.scaling.numbers import count, flops, markdown_table, or_dash, times
from llada.scaling.ranking import LEVEL, Cell, Estimate, Ranked, rank
from llada.scaling.results import Result
from llada.scaling.series import Series, of_key, ordered

_LEVEL = f"{LEVEL:.0%}"
_TICKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 2.5, 3)  # of shares


class Group(NamedTuple):
    """The readings of one series at one size and budget."""

    series: Series
    size: str
    parameters: int  # without embeddings
    budget: float
    losses: dict[int, float]  # by seed

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation between seeds; None of one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


def groups(results: Sequence[Result]) -> list[Group]:
    """Of all measured readings, by size and budget, rising, then by series; two of one seed count by their mean."""
    found: dict[tuple, dict[int, list[float]]] = {}
    for r in results:
        if r.measured:
            key = (r.non_embedding_parameters, r.size, r.budget, r.series)
            found.setdefault(key, {}).setdefault(r.seed, []).append(r.loss)
    order = ordered(r.series.key for r in results)
    keys = sorted(found, key=lambda key: (*key[:3], order.index(key[3])))
    return [
        Group(
            series, size, n, budget, {seed: statistics.fmean(of) for seed, of in found[n, size, budget, series].items()}
        )
        for n, size, budget, series in keys
    ]


def ranking(results: Sequence[Result]) -> dict[Series, Ranked]:
    """Every variant that has a seed in common with its plain family at some size and budget, the best first."""
    return dict(_ranking(tuple(groups(results)), tuple(ordered(r.series.key for r in results))))


def _ranking(found: Sequence[Group], series: Sequence[Series]) -> dict[Series, Ranked]:
    by_place = {(g.series, g.size, g.budget): g for g in found}
    cells: dict[str, list[Cell]] = {each.key: [] for each in series if each.variant}
    for g in (g for g in found if g.series.variant):
        plain = by_place.get((g.series.plain, g.size, g.budget))
        if plain and (seeds := sorted(g.losses.keys() & plain.losses.keys())):
            losses = (tuple(each.losses[seed] for seed in seeds) for each in (plain, g))
            cells[g.series.key].append(Cell(g.size, g.budget, *losses))
    return {of_key(key): ranked for key, ranked in rank(cells).items()}


def to_json(results: Sequence[Result]) -> dict[str, Any]:
    """For fits.json: `best` is the first variant's name, `better_than_chance` whether it is so among all compared.

    `saving`: the names of all that are.
    """
    ranked = ranking(results)
    first = next(iter(ranked), None)
    keys = {r.series: r.variant_keys for r in results}
    trained = {r.series: r.bound_trained for r in results}
    return {
        "level": LEVEL,
        "compared": len(ranked),
        "best": first.variant if first else None,
        "better_than_chance": bool(first and _saves(ranked[first])),
        "saving": [series.variant for series, of in ranked.items() if _saves(of)],
        "variants": [
            {
                "variant": series.variant,
                "family": series.family.name,
                "keys": keys[series],
                "bound_trained": trained[series],
                "degrees_of_freedom": of.dof,
                "share": of.share.to_json() if of.share else None,
                "difference": of.difference.to_json(),
                "sizes": [s._asdict() | {"share": s.share.to_json()} for s in of.by_size],
                "cells": [
                    {"size": cell.size, "budget": cell.budget, "seeds": len(cell.plain), **difference.to_json()}
                    for cell, difference in zip(of.cells, of.differences, strict=True)
                ],
            }
            for series, of in ranked.items()
        ],
        "losses": [
            {"series": g.series.key, "size": g.size, "parameters": g.parameters, "budget": g.budget}
            | {"mean": g.mean, "spread": g.spread, "by_seed": {str(seed): loss for seed, loss in g.losses.items()}}
            for g in groups(results)
        ],
    }


def _saves(ranked: Ranked) -> bool:
    """Whether it is better than its family by more than the best of all compared would be by chance."""
    if ranked.share is None:
        return ranked.difference.sure and ranked.difference.value < 0
    return ranked.share.sure and ranked.share.value < 1


# --- words and tables


def summary(results: Sequence[Result]) -> list[str]:
    """Sentences for the head of the report."""
    ranked = ranking(results)
    if not ranked:
        return ["No variant has a figure beside its plain family with the same seed, so there is nothing to rank."]
    first, of = next(iter(ranked.items()))
    found, number = f"{first.title} {_found(first, of)}", len(ranked)
    if not of.dof:
        return [f"{found}, first of {number} compared; with one seed nothing tells whether that is more than chance."]
    compared = "the only variant compared" if number == 1 else f"the best of {number} variants compared"
    adjusted = f"{1 - (1 - LEVEL) / number:.1%}"
    others = [f"{each.title} {_found(each, ranked[each])}" for each in ranked if each != first and _saves(ranked[each])]
    if _saves(of):
        also = f" So {'does' if len(others) == 1 else 'do'}: {'; '.join(others)}." if others else ""
        return [
            f"**{found}**: {compared}, and more than chance allows (the interval is for one variant; the one at "
            f"{adjusted}, which allows for {number}, is on the same side of no difference).{also}"
        ]
    place = (
        f"The first of the ranking, {first.title}, {_found(first, of)}; it is {compared}, and the interval at "
        f"{adjusted}, which allows for {number}, includes no difference or is on its other side (the one given is for "
        "one variant)."
    )
    if others:
        return [f"By more than chance allows **{'**, and **'.join(others)}**. {place}"]
    return [f"No variant is better than its plain family by more than chance allows. {place}"]


def _found(series: Series, of: Ranked) -> str:
    """The figure it is ranked by, as the end of a sentence about it."""
    plain = series.plain.title
    if of.share is None:
        return f"ends {_estimate(of.difference, '{:+.4f}'.format)} nats per token from plain {plain}"
    show = _estimate(of.share, times, f"{_LEVEL} interval ")
    return f"needs {show} the training FLOPs to come down to plain {plain}'s final loss"


def _estimate(e: Estimate, show: Any, words: str = "") -> str:
    ends = "" if e.low is None or e.high is None else f" ({words}{show(e.low)} to {show(e.high)})"
    return f"{show(e.value)}{ends}"


def sections(results: Sequence[Result]) -> dict[str, str]:
    """The tables of the report, by their headings."""
    ranked = ranking(results)
    return {
        "FLOPs to reach the plain final loss": _shares(results, ranked),
        "Losses": _losses(groups(results), ranked),
        "How the intervals are made": _method(ranked),
    }


def _shares(results: Sequence[Result], ranked: dict[Series, Ranked]) -> str:
    if not any(of.share for of in ranked.values()):
        return "There is no share to give: it takes two budgets of a size that a variant and its family have both."
    sizes = list(dict.fromkeys(g.size for g in groups(results)))
    biased = {r.series for r in results if r.bound_trained is False}
    cells = [["", "variant", "share of FLOPs, all sizes", *sizes, "mean difference, nats per token", "training loss"]]
    for place, (series, of) in enumerate(ranked.items(), start=1):
        by_size = {s.size: s for s in of.by_size}
        shares = [_share(by_size[size]) if size in by_size else "-" for size in sizes]
        share = _estimate(of.share, times) if of.share else "-"
        measure = "NLL" if series.exact else "bound"
        kind = f"not the {measure}" if series in biased else measure
        difference = _estimate(of.difference, "{:+.4f}".format)
        cells.append([str(place), series.title, share, *shares, difference, kind])
    ends = {(series.plain.title, s.size): (s.target, s.largest) for series, of in ranked.items() for s in of.by_size}
    targets = [f"{title} {size} {loss:.4f} at {flops(at)}" for (title, size), (loss, at) in ends.items()]
    text = (
        f"The share of the largest budget at which a variant is down to the loss that its plain family ends with "
        f"({'; '.join(targets)} FLOPs), by lines of the mean losses in log C; below 1x it saves FLOPs. All sizes: the "
        f"geometric mean. In brackets: {_LEVEL} intervals, each for one variant; {len(ranked)} were compared. `(!)`: "
        "beyond the budgets that have runs, so extrapolated. The mean difference is over all sizes and budgets."
    )
    return f"{markdown_table(cells)}\n\n{text}"


def _share(s: Any) -> str:
    return _estimate(s.share, times) + (" (!)" if s.extrapolated else "")


def _losses(found: Sequence[Group], ranked: dict[Series, Ranked]) -> str:
    if not found:
        return ""
    differences = {
        (series, cell.size, cell.budget): difference
        for series, of in ranked.items()
        for cell, difference in zip(of.cells, of.differences, strict=True)
    }
    cells = [["size", "N", "FLOPs", "series", "seeds", "nats per token", "± between seeds", "over the plain family"]]
    for g in found:
        difference = differences.get((g.series, g.size, g.budget))
        row = [g.size, count(g.parameters), flops(g.budget), g.series.title, str(len(g.losses)), f"{g.mean:.4f}"]
        over = _estimate(difference, "{:+.4f}".format) if difference else "-"
        cells.append([*row, or_dash(g.spread, ".4f"), over])
    text = f"Means over seeds; ± is one seed's standard deviation. Differences are paired by seed; {_LEVEL} intervals."
    return f"{markdown_table(cells)}\n\n{text}"


def _method(ranked: dict[Series, Ranked]) -> str:
    known = {of.dof for of in ranked.values()} - {0}
    if not known:
        return "There are none: they need two seeds or more (`--config.sweep.seeds=0,1,2`)."
    low, high = min(known), max(known)
    dof = f"{low}" if low == high else f"{low} to {high}"
    return (
        "A variant and its plain family are compared seed by seed: the same seed has the same initial weights and "
        "rows, and all runs the same held-out masks. Seeds are few, so the covariance of such pairs is taken to be the "
        f"same at all sizes and budgets (the table shows how far it is), and pooled: {dof} degrees of freedom a "
        "variant. Intervals are percentiles of draws from Student's t about the means found. They tell how far other "
        "seeds would go. They do not tell of other corpora, sizes, budgets or learning rates, nor how far a line is "
        "from the curve: losses fall less steeply at a larger budget, so with budgets far apart a share is nearer to 1 "
        "than it should be."
    )


# --- pictures


def pictures(results: Sequence[Result]) -> dict[str, bytes]:
    """By the names of their files; without a variant that compares, none."""
    ranked = ranking(results)
    if not ranked:
        return {}
    styles = figure.styles(r.series.key for r in results)
    images = {"losses.png": _curves(groups(results), ranked, styles)}
    if any(of.share for of in ranked.values()):
        biased = {r.series for r in results if r.bound_trained is False}
        images = {"ranking.png": _dots(ranked, styles, biased)} | images
    return images


def _dots(ranked: dict[Series, Ranked], styles: dict[Series, figure.Style], biased: set[Series]) -> bytes:
    """A row for each variant: its share with the interval, and small beside it those of the sizes."""
    shown = {series: of for series, of in ranked.items() if of.share}
    first, of = next(iter(shown.items()))
    assert of.share is not None
    saving = [series.variant or series.title for series, each in shown.items() if _saves(each)]
    chance = f"; beyond chance: {', '.join(saving)}" if saving else "; none saves more than chance allows"
    title = f"First of {len(shown)}: {first.title} needs {_estimate(of.share, times)} the FLOPs{chance}"
    caption = (
        f"Share of the FLOPs at which a variant reaches its plain family's final held-out loss. Bars: {_LEVEL} "
        f"intervals, each for one variant of {len(shown)} compared. Small: each size alone, the smallest above. "
        "Hollow: trained on a loss that is not the bound. A bar that ends at the edge goes on beyond it."
    )
    fig, (ax,) = figure.panels(1, title, caption)
    values = [e for of in shown.values() for e in (of.share, *(s.share for s in of.by_size)) if e]
    finite = [v for e in values for v in (e.value, e.low, e.high) if v and math.isfinite(v)]
    # An interval may go anywhere; the axis stays near.
    ends = max(min(*finite, 0.9) / 1.1, 0.02), min(max(*finite, 1.1) * 1.1, 50.0)
    ax.set(xscale="log", xlim=ends, ylim=(len(shown) - 0.4, -0.6), xlabel="share of the plain family's FLOPs")
    ax.axvline(1, color="0.3", linewidth=1, zorder=1)
    for y, (series, of) in enumerate(shown.items()):
        colour, marker = styles[series]
        style = dict(color=colour, marker=marker, markerfacecolor="white" if series in biased else colour)
        _bar(ax, y, of.share, ends, markersize=8, elinewidth=2, capsize=4, **style)
        for i, s in enumerate(of.by_size):
            at = y + 0.22 + 0.22 * (i + 1) / (len(of.by_size) + 1)
            _bar(ax, at, s.share, ends, markersize=3, elinewidth=0.8, alpha=0.6, **style)
    ax.set_yticks(range(len(shown)), [series.title for series in shown])
    ax.grid(axis="y", visible=False)
    figure.log_ticks(ax.xaxis, "{:g}x".format)
    if ends[1] < 4 * ends[0]:  # too narrow for these
        ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
        ax.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        ax.minorticks_off()
    return figure.png(fig)


def _bar(ax, y: float, e: Estimate | None, ends: tuple[float, float], **style: Any) -> None:
    if e is None:
        return
    clamp = functools.partial(figure.clamp, ends=ends)
    x = clamp(e.value)
    low, high = (x if end is None else clamp(end) for end in (e.low, e.high))
    ax.errorbar(x, y, xerr=[[max(x - low, 0)], [max(high - x, 0)]], linestyle="", zorder=3, **style)


def _curves(found: Sequence[Group], ranked: dict[Series, Ranked], styles: dict[Series, figure.Style]) -> bytes:
    """Mean loss against FLOPs: a panel a variant, its plain family in grey; a line a size."""
    caption = (
        "Means over seeds, bars the standard deviation between seeds; a line for each size, the largest darkest. Grey: "
        f"the plain family. {figure.MEASURES}."
    )
    title = "Held-out loss against training FLOPs, variants in the order of the ranking"
    fig, axes = figure.panels(len(ranked), title, caption, sharex=True, sharey=True, small=True)
    sizes = list(dict.fromkeys(g.size for g in found))
    for ax, series in zip(axes, ranked, strict=True):
        ax.set_title(series.title, fontsize=10)
        ax.set(xscale="log")
        for each, colour, marker in ((series.plain, "#999999", "o"), (series, *styles[series])):
            for size, shade in zip(sizes, figure.shades(colour, len(sizes)), strict=True):
                of = [g for g in found if g.series == each and g.size == size]
                loss, spread = [g.mean for g in of], [g.spread or 0.0 for g in of]
                line = dict(color=shade, marker=marker, markersize=4, linewidth=1.3, capsize=2)
                ax.errorbar([g.budget for g in of], loss, spread, **line)
    budgets = sorted({g.budget for g in found})
    axes[0].set_xlim(budgets[0] / 1.15, budgets[-1] * 1.15)
    figure.log_ticks(axes[0].xaxis, flops)
    if len(budgets) <= 4:
        axes[0].set_xticks(budgets, list(map(flops, budgets)))
        axes[0].minorticks_off()
    for i, ax in enumerate(axes):
        if i + figure.ACROSS >= len(axes):  # nothing below it
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("training FLOPs C")
        if i % figure.ACROSS == 0:
            ax.set_ylabel("nats per token")
    return figure.png(fig)
