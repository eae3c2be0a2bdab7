"""From readings to what a sweep leaves behind: results.csv, fits.json, pictures and report.md."""

from collections.abc import Sequence
from pathlib import Path

from llada import json_files
from llada.files import lock, write_atomically
from llada.scaling import pictures, results, study
from llada.scaling.repetition import crossovers, is_data_limited
from llada.scaling.results import Result
from llada.scaling.sweep_report import report


def write(
    directory: Path,
    rows: Sequence[Result],
    command: str,
    predict: float | None = None,
    annealing_gain: float = 0.0,
    remarks: Sequence[str] = (),
) -> list[Path]:
    """Write everything that `rows` allow into `directory`; returns the files. UserError where rows do not compare.

    command         how this was called, for the report
    predict         a budget in FLOPs to foretell
    annealing_gain  share of the loss taken off readings without annealing before the fits
    remarks         on what is not among the rows
    """
    results.check_comparable(rows)
    with lock(directory / "outcome.lock", wait=True):  # jobs that end together take turns
        return _write(directory, rows, command, predict, annealing_gain, remarks)


def _write(
    directory: Path,
    rows: Sequence[Result],
    command: str,
    predict: float | None,
    annealing_gain: float,
    remarks: Sequence[str],
) -> list[Path]:
    results.write_csv(rows, directory / "results.csv")
    repeated = is_data_limited(rows)
    # Laws of the budget say nothing of data read again and again: those readings are no isoFLOP profile.
    found = study.fit({} if repeated else results.points(rows, annealing_gain))
    fits = {"annealing_gain": annealing_gain, "matching": rows[0].matching} | found.to_json()
    if repeated:
        fits["crossovers"] = [crossover._asdict() for crossover in crossovers(rows)]
    write_atomically(directory / "fits.json", (json_files.dumps(fits, indent=2) + "\n").encode())
    drawn = draw(directory, rows, found, predict, annealing_gain)
    text = report(
        rows,
        found,
        command=command,
        matching=rows[0].matching,
        predict=predict,
        pictures={name: path.name for name, path in drawn.items()},
        annealing_gain=annealing_gain,
        remarks=remarks,
    )
    write_atomically(directory / "report.md", text.encode("utf-8", "backslashreplace"))
    return [directory / "results.csv", directory / "fits.json", *drawn.values(), directory / "report.md"]


def draw(
    directory: Path, rows: Sequence[Result], found: study.Study, predict: float | None, annealing_gain: float
) -> dict[str, Path]:
    """The pictures that suit the readings, by name; none before there is a figure."""
    if not any(row.measured for row in rows):
        return {}
    names = ("repeat",) if is_data_limited(rows) else ("isoflop", "frontier", "allocation")
    drawn = {name: directory / f"{name}.png" for name in names}
    if "repeat" in drawn:
        pictures.repeat(rows, drawn["repeat"])
        return drawn
    pictures.isoflop(rows, found, drawn["isoflop"], annealing_gain=annealing_gain)
    pictures.frontier(rows, found, drawn["frontier"], predict, annealing_gain=annealing_gain)
    pictures.allocation(rows, found, drawn["allocation"])
    return drawn
