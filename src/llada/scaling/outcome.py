"""From readings to what a sweep leaves behind: results.csv, fits.json, pictures and report.md."""

import json
from collections.abc import Sequence
from pathlib import Path

from llada.files import write_atomically
from llada.scaling import pictures, results, study
from llada.scaling.results import Result
from llada.scaling.sweep_report import report


def write(
    directory: Path,
    rows: Sequence[Result],
    command: str,
    predict: float | None = None,
    annealing_gain: float = 0.0,
) -> list[Path]:
    """Write everything that `rows` allow into `directory`; returns the files. UserError where rows do not compare.

    command         how this was called, for the report
    predict         a budget in FLOPs to foretell
    annealing_gain  share of the loss taken off readings without annealing before the fits
    """
    results.write_csv(rows, directory / "results.csv")
    results.check_comparable(rows)
    found = study.fit(results.points(rows, annealing_gain))
    fits = {"annealing_gain": annealing_gain, "matching": rows[0].matching} | found.to_json()
    write_atomically(directory / "fits.json", (json.dumps(fits, indent=2) + "\n").encode())
    drawn = draw(directory, rows, found, predict)
    text = report(
        rows,
        found,
        command=command,
        matching=rows[0].matching,
        predict=predict,
        pictures={name: path.name for name, path in drawn.items()},
        annealing_gain=annealing_gain,
    )
    write_atomically(directory / "report.md", text.encode())
    return [directory / "results.csv", directory / "fits.json", *drawn.values(), directory / "report.md"]


def draw(directory: Path, rows: Sequence[Result], found: study.Study, predict: float | None) -> dict[str, Path]:
    """The pictures that suit the readings, by name; none before there is a figure."""
    if not any(row.measured for row in rows):
        return {}
    if repeats(rows):
        pictures.repeat(rows, directory / "repeat.png")
        return {"repeat": directory / "repeat.png"}
    pictures.isoflop(rows, found, directory / "isoflop.png")
    pictures.frontier(rows, found, directory / "frontier.png", predict)
    pictures.allocation(rows, found, directory / "allocation.png")
    return {name: directory / f"{name}.png" for name in ("isoflop", "frontier", "allocation")}


def repeats(rows: Sequence[Result]) -> bool:
    """Whether the readings are of the data-limited mode: several numbers of epochs of one run."""
    return any(a.run == b.run and a.epochs != b.epochs for a in rows[:1] for b in rows) and "_U" in rows[0].run
