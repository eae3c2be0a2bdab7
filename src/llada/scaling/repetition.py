"""Repeated data: losses against epochs over the same unique tokens, and where a family overtakes the reference.

Everything of the data-limited mode: its findings, its picture and its part of the report.

The claim under test is that of "Diffusion language models are super data learners" (arXiv 2511.03276): with few unique
tokens and enough epochs, a diffusion model ends below an autoregressive one of its size. Its figure here is a bound,
so a crossover in the figures is one of the models too; none seen does not mean that there is none.
Units: epochs, tokens, nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada.scaling import figure
from llada.scaling.numbers import count, markdown_table, short, three
from llada.scaling.results import Result
from llada.scaling.series import REFERENCE, Series, compared_by, of_key, ordered


class Curve(NamedTuple):
    """Held-out loss against epochs of one series, size and corpus; means over seeds, epochs rising."""

    series: Series
    size: str
    parameters: int  # without embeddings
    unique_tokens: int
    epochs: tuple[float, ...]
    loss: tuple[float, ...]
    stderr: tuple[float, ...]  # of the Monte Carlo estimate; 0 where exact

    @property
    def best(self) -> tuple[float, float]:
        """(epochs, loss) of the lowest reading."""
        i = min(range(len(self.loss)), key=self.loss.__getitem__)
        return self.epochs[i], self.loss[i]

    def at(self, epochs: float) -> float:
        """The loss at so many epochs, between readings by interpolation in log epochs."""
        return float(np.interp(math.log(epochs), np.log(self.epochs), self.loss))

    @property
    def still_falling(self) -> bool:
        """Whether the lowest reading is the last: more epochs may lower it."""
        return self.best[0] == self.epochs[-1]


class Crossover(NamedTuple):
    """Where `series` overtakes the reference of its size on the same unique tokens: epochs of the first such reading.

    `same_epochs`: its bound is below the reference's loss after equally many epochs, up to `until`. `below_best`: it is
    below the lowest loss that the reference reaches at all. None: at no reading.
    """

    series: Series
    reference: Series
    curve: Curve
    reference_curve: Curve
    same_epochs: float | None
    below_best: float | None

    @property
    def until(self) -> float:
        """Epochs at which the shorter of the two curves ends."""
        return min(self.curve.epochs[-1], self.reference_curve.epochs[-1])

    def to_json(self) -> dict[str, Any]:
        """For fits.json."""
        return {
            **{key: getattr(self.curve, key) for key in ("size", "parameters", "unique_tokens")},
            **{key: getattr(self, key) for key in ("same_epochs", "below_best", "until")},
            f"{self.series.key}_best": self.curve.best,
            f"{self.reference.key}_best": self.reference_curve.best,
            f"{self.series.key}_still_falling": self.curve.still_falling,
        }


def curves(results: Iterable[Result]) -> list[Curve]:
    """One per series, size and number of unique tokens, by unique tokens, then size, then series."""
    groups: dict[tuple, dict[float, list[Result]]] = {}
    for r in results:
        if r.measured and r.epochs is not None and r.unique_tokens is not None:
            key = (r.unique_tokens, r.non_embedding_parameters, r.series.key, r.size)
            groups.setdefault(key, {}).setdefault(float(f"{r.epochs:.4g}"), []).append(r)
    drawn = []
    for (unique_tokens, parameters, key, size), readings in sorted(groups.items()):
        epochs = tuple(sorted(readings))
        seeds = [readings[e] for e in epochs]
        loss = tuple(sum(r.loss for r in rs) / len(rs) for rs in seeds)
        stderr = tuple(math.hypot(*(r.monte_carlo_stderr or 0.0 for r in rs)) / len(rs) for rs in seeds)
        drawn.append(Curve(of_key(key), size, parameters, unique_tokens, epochs, loss, stderr))
    return drawn


def _pairs(results: Iterable[Result]) -> list[tuple[Series, Series]]:
    """Every series with the reference, whom the claim is about."""
    return [(series, REFERENCE) for series in ordered(r.series.key for r in results) if series != REFERENCE]


def _twins(results: Iterable[Result]) -> list[dict[Series, Curve]]:
    """Curves of one size and number of unique tokens, by series."""
    by_key: dict[tuple, dict[Series, Curve]] = {}
    for curve in curves(results):
        by_key.setdefault((curve.unique_tokens, curve.size), {})[curve.series] = curve
    return list(by_key.values())


def _unpaired(results: Iterable[Result]) -> list[str]:
    """A sentence for every size and number of unique tokens that one series alone was read at."""
    alone = [curve for twins in _twins(results) if len(twins) == 1 for curve in twins.values()]
    return [f"Size {c.size} at {c.unique_tokens:,} unique tokens was read for {c.series.key} alone." for c in alone]


def crossovers(results: Sequence[Result]) -> list[Crossover]:
    """One per pair, size and number of unique tokens that both series were read at, in the order of `curves`."""
    return [
        _crossover(series, reference, twins[series], twins[reference])
        for series, reference in _pairs(results)
        for twins in _twins(results)
        if {series, reference} <= twins.keys()
    ]


def _crossover(series: Series, reference: Series, curve: Curve, rival: Curve) -> Crossover:
    readings = list(zip(curve.epochs, curve.loss, strict=True))
    both = [(e, loss) for e, loss in readings if rival.epochs[0] <= e <= rival.epochs[-1]]
    same_epochs = next((e for e, loss in both if loss < rival.at(e)), None)
    below_best = next((e for e, loss in readings if loss < rival.best[1]), None)
    return Crossover(series, reference, curve, rival, same_epochs, below_best)


# --- picture


def picture(results: Sequence[Result]) -> bytes:
    """Loss against epochs, a panel per number of unique tokens; best epochs starred, crossovers marked or denied."""
    drawn, crossed = curves(results), crossovers(results)
    corpora, sizes = sorted({c.unique_tokens for c in drawn}), sorted({c.parameters for c in drawn})
    cut = _cut(drawn)
    caption = (
        f"Star: lowest loss. Square: first reading below the {REFERENCE.title} after equally many epochs. Ring: below "
        f"the {REFERENCE.title}'s lowest loss. {figure.MEASURES}."
        + (f" {REFERENCE.title} curves go on above the picture." if cut else "")
    )
    fig, axes = figure.panels(max(len(corpora), 1), _repeat_title(crossed), caption, sharex=True, sharey=True)
    styles = figure.styles(c.series.key for c in drawn)
    shades = {
        (series, size): shade
        for series, style in styles.items()
        for size, shade in zip(sizes, figure.shades(style.colour, len(sizes)), strict=True)
    }
    several = len({x.series for x in crossed}) > 1
    for ax, corpus in zip(axes, corpora, strict=False):
        overtakes = [x for x in crossed if x.curve.unique_tokens == corpus]
        ax.set_title(
            "\n".join([f"{short(corpus)} unique tokens", *(_crossing_text(x, several) for x in overtakes)]), fontsize=10
        )
        _panel(ax, [c for c in drawn if c.unique_tokens == corpus], overtakes, styles, shades)
    axes[0].set_ylabel("held-out nats per token")
    if cut:
        axes[0].set_ylim(*cut)
    for (series, size), shade in shades.items():
        if any(c.series == series for c in drawn):
            label, marker = f"{series.title} {short(size)}", styles[series].marker
            axes[-1].plot([], [], color=shade, marker=marker, markersize=4, label=label)
    if drawn:
        figure.log_ticks(axes[0].xaxis, short)
        axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=9, title="parameters")
    else:
        figure.note(axes[0], "no readings against epochs")
    return figure.png(fig)


def _panel(
    ax,
    drawn: list[Curve],
    crossed: list[Crossover],
    styles: dict[Series, figure.Style],
    shades: dict[tuple[Series, int], np.ndarray],
) -> None:
    """The curves of one amount of unique tokens."""
    ax.set(xscale="log", xlabel="epochs")
    line = dict(markersize=4, capsize=2, linewidth=1.4, zorder=3)
    ring = dict(markersize=13, markeredgecolor="black", markerfacecolor="none", markeredgewidth=1.2, zorder=5)
    for c in drawn:
        shade, marker = shades[c.series, c.parameters], styles[c.series].marker
        ax.errorbar(c.epochs, c.loss, [2 * e for e in c.stderr], color=shade, marker=marker, **line)
        ax.plot(*c.best, "*", color=shade, markersize=14, markeredgecolor="white", zorder=4)
    for x in crossed:
        for epochs, marker in ((x.same_epochs, "s"), (x.below_best, "o")):
            if epochs is not None:
                ax.plot(epochs, x.curve.at(epochs), marker, **ring)


def _cut(drawn: Sequence[Curve]) -> tuple[float, float] | None:
    """Ends of the loss axis where an ARM that learned its corpus by heart would press all else into a flat line."""
    low = min((min(c.loss) for c in drawn), default=0.0)
    seen = max((x for c in drawn for x in (c.loss[:1] if c.series.exact else c.loss)), default=0.0)
    top = low + 1.5 * (seen - low)
    return (low - 0.05 * (top - low), top) if low < seen and top < max(max(c.loss) for c in drawn) else None


def _crossing_text(x: Crossover, several: bool) -> str:
    """Of one pair; `several`: whether it must say which."""
    size = f"{short(x.curve.parameters)}: "
    size = f"{x.series.title} {size}" if several else size
    if x.same_epochs is None and x.below_best is None:
        return f"{size}no crossover up to {short(x.until)} epochs"
    crossed = [f"crossover at {short(x.same_epochs)} epochs"] if x.same_epochs is not None else []
    best = f"the {x.reference.title}'s best"
    below = f"below {best} at {short(x.below_best)}" if x.below_best is not None else f"not below {best}"
    return size + ", ".join([*crossed, below])


def _repeat_title(crossed: Sequence[Crossover]) -> str:
    """Of the first pair that was compared."""
    if not crossed:
        return "Loss against epochs over the same tokens"
    series, reference = crossed[0].series.title, crossed[0].reference.title
    crossed = [x for x in crossed if x.series == crossed[0].series]
    won = [x.below_best for x in crossed if x.below_best is not None]
    passed = [x.same_epochs for x in crossed if x.same_epochs is not None]
    last = short(max(x.until for x in crossed))
    if won:
        share = "" if len(won) == len(crossed) else f" in {len(won)} of {len(crossed)} cases"
        return f"Repeated data: {series} goes below the {reference}'s best after {_span(won)} epochs{share}"
    if passed:
        return (
            f"Repeated data: {series} passes the {reference} after {_span(passed)} epochs, but not the {reference}'s "
            f"best up to {last}"
        )
    return f"Repeated data: {series} does not pass the {reference} up to {last} epochs"


def _span(values: Sequence[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


# --- report


def summary(results: Sequence[Result]) -> list[str]:
    """Sentences for the head of the report."""
    crossed = crossovers(results)
    if not crossed:
        return ["No size and corpus was read for both families, so there is no crossover to look for."]
    texts = []
    for series, reference in _pairs(results):
        pairs = [x for x in crossed if x.series == series]
        if not pairs:
            continue
        won, by = [(x.below_best, x) for x in pairs if x.below_best is not None], compared_by(series, reference)
        last = three(max(x.until for x in pairs))
        text = (
            f"{series.title} ends below the {reference.title}'s best loss{by and f' ({by})'} in {len(won)} of "
            f"{len(pairs)} pairs of equal size and unique tokens"
        )
        if not won:
            texts.append(f"{text}: no crossover up to {last} epochs.")
            continue
        epochs, first = min(won, key=lambda pair: pair[0])
        texts += [
            f"{text}, up to {last} epochs.",
            f"The earliest crossover is at {three(epochs)} epochs ({count(first.curve.parameters)} parameters, "
            f"{count(first.curve.unique_tokens)} unique tokens).",
        ]
    return texts


def section(results: Sequence[Result]) -> str:
    """A table of crossovers for each pair of series, in Markdown."""
    crossed = crossovers(results)
    tables = [
        _table(series, reference, pairs)
        for series, reference in _pairs(results)
        if (pairs := [x for x in crossed if x.series == series])
    ]
    alone = "".join(f" {text}" for text in _unpaired(results))
    if not tables:
        return f"No size and corpus was read for both families.{alone}"
    text = "Epochs are those of the first reading that is below; the crossing lies between it and the reading before. "
    return "\n\n".join([*tables, f"{text}Losses are held-out nats per token, means over seeds.{alone}"])


def _table(series: Series, reference: Series, crossed: Sequence[Crossover]) -> str:
    arm = reference.title
    head = ["unique tokens", "parameters", f"below the {arm} after equally many epochs", f"below the {arm}'s best"]
    kinds = ("exact NLL" if each.exact else "bound" for each in (series, reference))
    cells = [[*head, *(f"{name}'s best, {kind}" for name, kind in zip((series.title, arm), kinds, strict=True))]]
    for x in crossed:
        none = f"no crossover up to {three(x.until)} epochs"
        at = [none if e is None else f"at {three(e)} epochs" for e in (x.same_epochs, x.below_best)]
        bests = [f"{loss:.4f} at {three(e)} epochs" for e, loss in (x.curve.best, x.reference_curve.best)]
        bests[0] += " (still falling)" if x.curve.still_falling else ""
        cells.append([count(x.curve.unique_tokens), count(x.curve.parameters), *at, *bests])
    return markdown_table(cells)
