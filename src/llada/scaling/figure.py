"""What all pictures share: panels under a title and a caption, colours of families, axis limits, ticks, line labels.

matplotlib (extra `plots`) is imported where it is used, so that everything else runs without it.
"""

import importlib
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada.errors import UserError
from llada.objectives.families import FAMILIES
from llada.scaling.series import Series, ordered

COLOURS = dict(zip(FAMILIES, itertools.cycle(("#c8553d", "#2a6f97", "#588157", "#7f5539")), strict=False))
_OF_VARIANTS = "#588157 #7f5539 #8e5ea2 #d19a00 #0f9b9b #d65c9d #5c677d #8fb339 #f0855a #1b4965 #b08968 #6a040f".split()
_MARKERS = "sD^vP*X<>ph8"  # of variants; plain families have circles
ACROSS = 4  # panels of a row
MEASURES = "; ".join(f"{f.title}: {'exact NLL' if f.exact else 'upper bound on its NLL'}" for f in FAMILIES.values())


class Style(NamedTuple):
    """How a series is drawn."""

    colour: str
    marker: str


def styles(keys: Iterable[str]) -> dict[Series, Style]:
    """Of all plain families and the variants among `keys`: a colour and a marker each."""
    series = ordered(keys)
    of_variants = zip(itertools.cycle(_OF_VARIANTS), itertools.cycle(_MARKERS), strict=True)
    return {
        each: Style(*next(of_variants)) if each.variant else Style(COLOURS[each.family.name], "o") for each in series
    }


def require_matplotlib() -> None:
    """UserError where it is not installed, or cannot be imported."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install 'llada-jax[plots]'") from error


def panels(
    number: int, title: str, caption: str, sharex: bool = False, sharey: bool = False, small: bool = False
) -> tuple[Any, list[Any]]:
    """A figure with axes in rows, the title above and the caption below them, both wrapped to the width.

    `small`: panels of about half the area, for many of a kind.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns, rows = min(number, ACROSS), math.ceil(number / ACROSS)
    width = 8.0 if columns == 1 else (3.7 if small else 5.6) * columns
    title, caption = textwrap.fill(title, int(9.2 * width)), textwrap.fill(caption, int(15 * width))
    head, foot = 0.22 * (title.count("\n") + 1) + 0.12, 0.15 * (caption.count("\n") + 1) + 0.08
    height = (3.1 if small and number > 1 else 4.6) * rows + head + foot
    fig = plt.figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = fig.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).ravel()
    layout: Any = fig.get_layout_engine()
    layout.set(rect=(0, foot / height, 1, 1 - (head + foot) / height), w_pad=0.08, h_pad=0.06)
    fig.text(0.012, 1 - 0.08 / height, title, fontsize=13, fontweight="bold", va="top")
    fig.text(0.012, 0.07 / height, caption, fontsize=8, color="0.35", va="bottom")
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[:number]:
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, list(axes[:number])


def png(fig) -> bytes:
    """The figure as a PNG file; it is closed."""
    from matplotlib import pyplot as plt

    image = io.BytesIO()
    fig.savefig(image, format="png")
    plt.close(fig)
    return image.getvalue()


def note(ax, text: str) -> None:
    """A text in the middle of an empty panel."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.4", fontsize=12)


def shades(colour: str, number: int) -> list[np.ndarray]:
    """From light to dark, the colour itself in between."""
    from matplotlib.colors import to_rgb

    base = np.array(to_rgb(colour))
    if number == 1:
        return [base]
    steps = np.linspace(-0.55, 0.45, number)
    return [base + (1 - base) * -s if s < 0 else base * (1 - s) for s in steps]


def limits(values: Iterable[float], share: float, log: bool = False) -> tuple[float, float]:
    """Ends of an axis: those of the finite values and `share` of their distance beyond, in logs a factor 2 at least.

    A law fitted to little data may go anywhere; the axes stay with the data.
    """
    shown = [math.log(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log)] or [0.0]
    low, high = min(shown), max(shown)
    pad = max(share * (high - low), math.log(2) if log else 0.05 * abs(high), 1e-9)
    return (math.exp(low - pad), math.exp(high + pad)) if log else (low - pad, high + pad)


def clamp(value: float, ends: tuple[float, float]) -> float:
    """The value, or the end of the axis nearest to it."""
    return min(max(value, ends[0]), ends[1])


def log_ticks(axis, show: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis written by `show`: 1 2 5, 1 3, or decades, as many as its limits leave room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1, 2, 3, 5, 7) if decades < 0.7 else (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 3.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_formatter(NullFormatter())


def labels_right(ax, entries: Sequence[tuple[float, float, str, Any]]) -> None:
    """Label lines at the right edge, at the height where they end, moved apart where labels would touch.

    An entry is the line's end (x, y), its label and colour.
    """
    if not entries:
        return
    ax.figure.canvas.draw()  # fixes the limits and the panel's height
    height = ax.get_window_extent().height / ax.figure.dpi * 72
    to_axes = ax.transData + ax.transAxes.inverted()
    spots = sorted((to_axes.transform((x, y))[1], text, colour, (x, y)) for x, y, text, colour in entries)
    heights: list[float] = []
    for spot, text, *_ in spots:
        need = 13.5 * (text.count("\n") + 1) / height
        heights.append(max(spot, heights[-1] + need) if heights else spot)
    shift = max(heights[-1] - 1.0, 0.0)
    for own_height, (_, text, colour, end) in zip(heights, spots, strict=True):
        at = 1.03, own_height - shift
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1}
        ax.annotate("", end, xytext=at, textcoords="axes fraction", annotation_clip=False, arrowprops=leader)
        ax.text(at[0] + 0.008, at[1], text, transform=ax.transAxes, color=colour, fontsize=9, va="center")
