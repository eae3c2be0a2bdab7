"""docs/reliability.md: written from the JSON beside it, which has a row for each goal that was tried."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from llada.files import write_atomically
from llada.scaling import provenance
from llada.training import calls

ENDINGS = 12  # kinds of endings that a row names; the others are counted together
HEAD = """# Reliability

Faults drawn from a seed, by the hundred, and what came of them. A case is right only where all of its demand holds;
nothing is tried twice. Written by `bash launch/faults.sh`, which runs every file `tests/faults/r*.py`; `--goals=R1,R4`
replaces single rows, `--share=0.1` draws a tenth of the cases.

The bound is the largest failure rate that so many right cases leave likely: an exact binomial limit, 95 %, one-sided.
"""


def where() -> dict[str, str]:
    """Commit, date and machine."""
    libraries = f"Python {platform.python_version()}, jax {version('jax')}"
    here = {"commit": provenance.commit(), "date": str(datetime.date.today())}
    return here | {"machine": f"{calls.processor()}, {os.cpu_count()} cores, {libraries}"}


def read(path: Path) -> dict[str, dict]:
    """The rows by number; none where there is no such file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(out: Path, rows: dict[str, dict]) -> None:
    """The JSON and the page."""
    write_atomically(out.with_suffix(".json"), (json.dumps(rows, indent=1) + "\n").encode())
    write_atomically(out, text(rows).encode())


def text(rows: dict[str, dict]) -> str:
    """The page as Markdown."""
    ordered = sorted(rows.values(), key=lambda row: int(row["number"][1:]))
    lines = [
        HEAD,
        "| goal | demand | right | failures, at most | seconds in all; timed | how they ended |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in ordered]
    lines += ["", "## What was wrong", ""]
    bad = [row for row in ordered if row["wrong_count"]]
    lines += [*(part for row in bad for part in _wrong(row))] if bad else ["Nothing.", ""]
    lines += ["## Where, when and how", "", "| goal | command | commit | date | machine |", "|---|---|---|---|---|"]
    for row in ordered:
        cells = [row["number"], f"`{row['command']}`", row["commit"], row["date"], _cell(row["machine"])]
        lines.append(f"| {' | '.join(cells)} |")
    total = sum(row["seconds"] for row in ordered)
    lines += ["", f"{sum(row['done'] for row in ordered):,} cases in {total / 60:.0f} minutes."]
    return "\n".join(lines) + "\n"


def bound(cases: int) -> float:
    """The failure rate with which `cases` right cases in a row have a probability of 5 %."""
    return 1 - 0.05 ** (1 / cases)


def _line(row: dict) -> str:
    right = f"**{row['right']} of {row['count']}**" if row["wrong_count"] else f"{row['right']} of {row['count']}"
    clean = row["complete"] and not row["wrong_count"]
    limit = f"{100 * bound(row['right']):.2g} %" if clean else "-"
    seconds = f"{row['seconds']:.0f}"
    if not row["complete"]:
        right += f" ({row['done']} tried)"
    if row["timed"]:
        seconds += f"; median {row['timed']['median']:.2g}, slowest {row['timed']['slowest']:.2g}"
    endings = list(row["endings"].items())
    shown = [f"{_cell(ended)} {count}" for ended, count in endings[:ENDINGS]]
    if endings[ENDINGS:]:
        shown.append(f"others {sum(count for _, count in endings[ENDINGS:])}")
    cells = [f"{row['number']} {row['title']}", row["demand"], right, limit, seconds, ", ".join(shown)]
    return f"| {' | '.join([*map(_cell, cells[:2]), *cells[2:]])} |"


def _wrong(row: dict) -> list[str]:
    """Verbatim, as blocks that no text in them can end."""
    lines = [f"### {row['number']} {row['title']}", ""]
    for case in row["wrong"]:
        block = f"{case['what']}: {case['ended']}\n{case['wrong']}".rstrip()
        lines += ["~~~~~text", block.replace("~~~~~", "~ ~ ~"), "~~~~~", ""]
    if hidden := row["wrong_count"] - len(row["wrong"]):
        lines += [f"And {hidden} more.", ""]
    return lines


def _cell(words: str) -> str:
    """One line that does not end its cell."""
    return " ".join(str(words).split()).replace("|", "\\|")
