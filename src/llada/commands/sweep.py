"""llada sweep --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...] [--only=I/N] [--dry_run]

Trains a grid of runs (budgets x sizes x families), fits scaling laws through them and draws them: DIR/results.csv,
fits.json, isoflop.png, frontier.png, allocation.png (repeat.png in the data-limited mode) and report.md. Every run is
an ordinary workdir under DIR/runs. Called again it goes on where it stopped; finished runs are never repeated. N jobs
share a directory with --only=1/N ... --only=N/N; whichever ends last writes the whole. Without --config the grid is
the one DIR holds; with --results alone, readings of other sweeps are fitted and nothing is trained.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from llada.commands import experiment
from llada.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the sweep; made if missing, continued if it holds one")
ONLY = flags.DEFINE_string("only", None, "I/N: train only the I-th of N shares of the runs, equal in FLOPs")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the planning table and stop; nothing is written")
RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "train failed runs again, from their last good checkpoint")
RESULTS = flags.DEFINE_multi_string("results", [], "results.csv of another sweep, to fit together with this one's")
PREDICT = flags.DEFINE_float(
    "predict", None, "a budget in FLOPs whose best models and losses the report should predict"
)
MACHINE = flags.DEFINE_string("machine", None, "accelerator to estimate hours for, such as v5p; default this machine")
CHIPS = flags.DEFINE_integer("chips", 1, "how many of --machine", lower_bound=1)
flags.adopt_module_key_flags(experiment)


def run(overrides: dict[str, str]) -> int:
    """Plan, train, fit, draw, report. 1 where runs failed; 130 or 143 after a signal, everything saved."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/sweep")
    if PREDICT.value is not None and not 0 < PREDICT.value < float("inf"):
        raise UserError(f"--predict={PREDICT.value} must be a number of FLOPs above 0, such as 1e21")
    from llada.scaling import results as results_lib

    directory = Path(WORKDIR.value)
    others = [row for path in RESULTS.value for row in results_lib.read_csv(Path(path))]
    if not (experiment.CONFIG.value or (directory / "sweep.json").exists()) and others:
        return _fit_only(directory, others)

    from rich.console import Console

    from llada.scaling import grid, rates, status
    from llada.scaling import sweep as sweep_lib
    from llada.training import loop

    sweep = sweep_lib.make(directory, *_read(directory, overrides))
    mine = grid.share(sweep.runs, ONLY.value)
    before = sweep_lib.collect(sweep)
    dtype = sweep.runs[0].config.model.dtype
    rate = rates.on_device(MACHINE.value, CHIPS.value) if MACHINE.value else rates.measured(before) or rates.here(dtype)
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=status.WIDE)
    console.print(status.plan_table(mine, before, rate, console.width))
    console.print(status.plan_summary(mine, before, rate))
    if DRY_RUN.value:
        return 0
    sweep_lib.prepare(sweep)
    results_lib.check_comparable([*sweep_lib.collect(sweep), *others])  # before hours are spent
    try:
        with status.Board(sweep.runs, lambda: sweep_lib.collect(sweep)) as board:
            sweep_lib.run_all(sweep, mine, board.progress, board.ended, RETRY_FAILED.value)
    except loop.Interrupted as stop:
        print(f"llada sweep: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    rows = sweep_lib.collect(sweep)
    _report(directory, [*rows, *others], sweep.config.annealing_gain)
    failed = sorted({row.run for row in rows if row.status == results_lib.FAILED})
    for name in failed:
        print(f"llada sweep: {name} failed: {results_lib.failure(directory / 'runs' / name)}", file=sys.stderr)
    return 1 if failed else 0


def _read(directory: Path, overrides: dict[str, str]):
    """The grid of --config, or else the directory's own."""
    if experiment.CONFIG.value:
        return experiment.read_sweep(experiment.CONFIG.value, overrides)
    from llada.scaling import sweep as sweep_lib

    return experiment.override_sweep(*sweep_lib.read(directory), overrides)


def _fit_only(directory: Path, rows) -> int:
    """Readings of other sweeps alone."""
    directory.mkdir(parents=True, exist_ok=True)
    _report(directory, rows, annealing_gain=0.0)
    return 0


def _report(directory: Path, rows, annealing_gain: float) -> None:
    from llada.scaling import outcome

    command = shlex.join(["llada", *sys.argv[1:]])
    for path in outcome.write(directory, rows, command, PREDICT.value, annealing_gain):
        print(path)
