"""llada sweep --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...] [--only=I/N] [--dry_run]

Trains a grid of runs (budgets x sizes x families), fits scaling laws through them and draws them: DIR/results.csv,
fits.json, isoflop.png, frontier.png, allocation.png (repeat.png in the data-limited mode) and report.md. Every run is
an ordinary workdir under DIR/runs. Called again it goes on where it stopped; finished runs are never repeated, and
failed ones with --retry_failed, or at a lower learning rate with --retry_rate=0.5. N jobs share a directory with
--only=1/N ... --only=N/N; whichever ends last writes the results of all. Without --config the grid is the one DIR
holds; with --results alone, readings of other sweeps are fitted and nothing is trained.

--estimator=sampler,chain_rule scores the finished runs, at their ends, by these measures of llada evaluate as well, on
--rows=N held-out rows; what was scored once is kept in each run's evaluation.json. The report then has the gap of each
LLaDA to its ARM twin by each measure, and which of them is a bound and which exact. Laws are fitted to none of them.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada import paths
from llada.commands import experiment
from llada.commands.command_flags import CommandFlags, required
from llada.errors import Diverged, Interrupted, UserError

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.scaling.grid import PlannedRun
    from llada.scaling.results import Result

FLAGS = CommandFlags(experiment.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "directory of the sweep; created if missing, continued if it holds one")
ONLY = FLAGS.define_string("only", None, "I/N: train only the I-th of N shares of the runs, equal in FLOPs")
DRY_RUN = FLAGS.define_bool("dry_run", False, "print the planning table and stop; nothing is written")
RETRY_FAILED = FLAGS.define_bool("retry_failed", False, "train failed runs again, from their last good checkpoint")
RETRY_RATE = FLAGS.define_float(
    "retry_rate", None, "train failed runs from the start, with their peak learning rate times this, such as 0.5"
)
RESULTS = FLAGS.define_multi_string("results", [], "results.csv of another sweep, to fit together with this one's")
PREDICT = FLAGS.define_float(
    "predict", None, "a budget in FLOPs whose best models and losses the report should predict"
)
ESTIMATOR = FLAGS.define_string(
    "estimator", None, "further measures of finished runs, separated by commas, of llada evaluate"
)
ROWS = FLAGS.define_integer(
    "rows", None, "held-out rows that --estimator reads of each run; default as many as training", lower_bound=1
)
MACHINE = FLAGS.define_string("machine", None, "accelerator to estimate hours for, such as v5p; default this machine")
CHIPS = FLAGS.define_integer("chips", 1, "how many of --machine", lower_bound=1)


def run(overrides: dict[str, str]) -> int:
    """Plan, train, fit, draw, report. 3 where runs diverged, 1 where they failed; 130 or 143 after a signal."""
    directory = _check_flags()
    from llada.scaling import results as results_lib

    others = [row for path in RESULTS.value for row in results_lib.read_csv(paths.readable_file(path, "--results"))]
    if not (experiment.CONFIG.value or (directory / "sweep.json").exists()) and others:
        return _fit_only(directory, others, overrides)

    from llada.scaling import grid, status
    from llada.scaling import sweep as sweep_lib

    base, group = _read(directory, overrides)
    sweep = sweep_lib.make(directory, base, group, typed=overrides, in_file=bool(experiment.CONFIG.value))
    mine = grid.share(sweep.runs, ONLY.value)
    before = sweep_lib.collect(sweep)
    results_lib.check_comparable([*before, *others])
    if not DRY_RUN.value:
        sweep_lib.require_documents(sweep)
    remarks = sweep_lib.remarks(sweep)
    _print_plan(mine, before, remarks, sweep.runs[0].config.model.dtype)
    if DRY_RUN.value:
        return 0
    sweep_lib.prepare(sweep, lambda text: print(text, file=sys.stderr))
    results_lib.check_comparable([*sweep_lib.collect(sweep), *others])  # before hours are spent
    printed, remarks = remarks, sweep_lib.remarks(sweep)
    for text in remarks:
        if text not in printed:
            print(text)
    if RETRY_RATE.value is not None:
        sweep = sweep_lib.retry_at(sweep, mine, RETRY_RATE.value)
        mine = grid.share(sweep.runs, ONLY.value)
    try:
        with status.Board(sweep.runs, lambda: sweep_lib.collect(sweep)) as board:
            sweep_lib.run_all(sweep, mine, board.progress, board.ended, RETRY_FAILED.value)
    except Interrupted as stop:
        print(f"llada sweep: {stop}", file=sys.stderr)
        return stop.status
    finished = [run for run in mine if sweep_lib.state(sweep.workdir(run), run.config.steps) == results_lib.FINISHED]
    _measure([sweep.workdir(run) for run in finished])
    rows = sweep_lib.collect(sweep)
    _report(directory, [*rows, *others], sweep.config.annealing_gain, remarks)
    return _print_failed(rows)


def _measure(workdirs: list[Path]) -> None:
    """Score the finished runs by the measures of --estimator."""
    if not ESTIMATOR.value:
        return
    from llada.commands import progress
    from llada.scaling import measures

    with progress.bar("rows scored") as show:
        measures.read_all(
            workdirs, _estimators(), ROWS.value, lambda line: print(line, file=sys.stderr, flush=True), show
        )


def _estimators() -> list[str]:
    """The names in --estimator."""
    return [name.strip() for name in (ESTIMATOR.value or "").split(",") if name.strip()]


def _print_failed(rows: list["Result"]) -> int:
    """Which runs failed, and why; the exit status."""
    from llada.scaling.results import DIVERGED, FAILED

    failed = {row.run: row.reason or "" for row in rows if row.status == FAILED}
    for name, reason in sorted(failed.items()):
        print(f"llada sweep: {name} failed: {reason}", file=sys.stderr)
    if failed and all(reason.startswith(DIVERGED) for reason in failed.values()):
        return Diverged.status
    return 1 if failed else 0


def _print_plan(runs: list["PlannedRun"], results: list["Result"], remarks: list[str], dtype: str) -> None:
    from rich.console import Console

    from llada.scaling import status

    if MACHINE.value:
        rate = status.on_device(MACHINE.value, CHIPS.value)
    else:
        rate = status.measured(results) or status.this_machine(dtype)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, markup=False, width=status.WIDE)
    retries = RETRY_FAILED.value or RETRY_RATE.value is not None
    console.print(status.plan_table(runs, results, rate, console.width))
    for text in (*remarks, status.plan_summary(runs, results, rate, retries)):
        console.print(text)


def _check_flags() -> Path:
    """The sweep's directory. UserError for what command line, disk and installation show to be wrong."""
    given = required(WORKDIR, "for example --workdir=runs/sweep")
    directory = paths.writable_directory(given, "--workdir", read_only=DRY_RUN.value)
    from llada.scaling.sweep_config import MOST

    if PREDICT.value is not None and not 0 < PREDICT.value <= MOST:
        raise UserError(f"--predict={PREDICT.value} must be a number of FLOPs above 0, such as 1e21, up to {MOST:g}")
    if RETRY_RATE.value is not None and not 0 < RETRY_RATE.value < 1:
        raise UserError(f"--retry_rate={RETRY_RATE.value} must be between 0 and 1, such as 0.5: what to multiply it by")
    if RETRY_RATE.value is not None and RETRY_FAILED.value:
        raise UserError("--retry_failed goes on at the rate of before, --retry_rate starts over at another; give one")
    if ROWS.value is not None and not _estimators():
        raise UserError(f"--rows={ROWS.value} is for --estimator: how many held-out rows the measures read of each run")
    if _estimators():
        from llada.scaling import measures

        measures.check(_estimators())
    if not DRY_RUN.value:
        from llada.scaling import figure

        figure.require_matplotlib()
    return directory


def _read(directory: Path, overrides: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The grid of --config, or else the directory's own."""
    if experiment.CONFIG.value:
        return experiment.read_sweep(experiment.CONFIG.value, overrides)
    from llada.scaling import sweep as sweep_lib

    return experiment.override_sweep(*sweep_lib.read(directory), overrides)


def _fit_only(directory: Path, rows: list["Result"], overrides: dict[str, str]) -> int:
    """Readings of other sweeps alone."""
    given = [f"--{flag.name}" for flag in (ONLY, RETRY_FAILED, RETRY_RATE, MACHINE, ESTIMATOR) if flag.value]
    given += [f"--config.{key}" for key in overrides if key != "sweep.annealing_gain"]
    if given:
        raise UserError(f"{given[0]} is for training, and --results alone trains nothing; leave it out")
    _, group = experiment.override_sweep({}, {}, overrides)
    gain = group.get("annealing_gain", 0.0)
    if not 0 <= gain < 1:
        raise UserError(f"--config.sweep.annealing_gain={gain} must be in [0, 1)")
    if (directory / "config.json").exists():
        raise UserError(f"--workdir={directory} is a run or a model, not a sweep; give a directory of its own")
    from llada.scaling import results as results_lib

    results_lib.check_comparable(rows)
    if DRY_RUN.value:
        print(f"{len(rows)} readings of {len({row.run for row in rows})} runs would be fitted, and nothing trained")
        return 0
    _report(directory, rows, gain, [])
    return 0


def _report(directory: Path, rows: list["Result"], annealing_gain: float, remarks: list[str]) -> None:
    from llada.scaling import sweep_report
    from llada.scaling.results import each_once

    rows, dropped = each_once(rows)
    if dropped:
        print(f"llada sweep: {dropped} readings were given more than once and count once", file=sys.stderr)
    command = shlex.join(["llada", *sys.argv[1:]])
    for path in sweep_report.write(directory, rows, command, PREDICT.value, annealing_gain, remarks):
        print(path)
