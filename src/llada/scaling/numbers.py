"""How numbers, intervals and tables of them are written in tables, pictures and reports."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


def flops(value: float) -> str:
    """3e+18 as 3e18; three digits at most."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def short(value: float) -> str:
    """1500000 as 1.5 M: three digits at most."""
    return _with_unit(value, "{:.3g}".format)


def count(value: float) -> str:
    """1000000 as 1.00 M: always three digits; inf and nan as "none"."""
    return _with_unit(value, three) if math.isfinite(value) else "none"


def _with_unit(value: float, show: Callable[[float], str]) -> str:
    for unit, name in _UNITS:
        if value >= 0.9995 * unit:
            return show(value / unit) + name
    return show(value)


def three(value: float) -> str:
    """Three significant digits, without an exponent where that is short: 16.4, 0.00123, 12300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return flops(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(2 - math.floor(math.log10(abs(rounded))), 0)}f}"


def times(value: float) -> str:
    """A ratio as 16x, 9.4x or 0.45x; inf as "unbounded"."""
    if not math.isfinite(value):
        return "unbounded"
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x" if value < 10 else f"{value:,.0f}x"


def interval(estimate: dict[str, Any], show: Callable[[float], str] = "{:.3f}".format) -> str:
    """An estimate of `Study` as 0.512 (0.480 to 0.544); what is not finite is "unbounded"."""
    value, low, high = ("unbounded" if estimate[k] is None else show(estimate[k]) for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def listed(words: Sequence[str]) -> str:
    """Words as a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def or_dash(value: float | None, form: str) -> str:
    """The number in Python's format `form`; a dash where there is none, or none that is finite."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def filled(text: str) -> str:
    """A paragraph of Markdown in lines of 120 characters at most."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def markdown_table(cells: list[list[str]]) -> str:
    """Header and rows as a table in Markdown, its columns padded so that it reads as plain text too."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def markdown_list(texts: Iterable[str]) -> str:
    """A line each."""
    return "\n".join(f"- {text}" for text in texts)


def markdown_cell(text: str) -> str:
    """Any text as a cell of such a table: on one line, its bars and angle brackets as they are."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
