"""What a sweep's runs will take and how far they are: the planning table, estimates of time, the grid filling up.

On a terminal the grid of losses is drawn and redrawn; elsewhere a line is printed for each run that ends.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llada import accounting
from llada.errors import UserError
from llada.scaling.grid import PlannedRun
from llada.scaling.numbers import or_dash, short
from llada.scaling.results import FAILED, FINISHED, RUNNING, Result
from llada.scaling.series import Series, ordered
from llada.training.metrics import training_loss
from llada.training.progress import clock

# --- how long runs take: from runs that are finished, a product timed here, or an accelerator's data sheet

# Share of its matrix peak that training reaches. On TPUs, published runs of dense models reach 0.4 to 0.7; small widths
# reach less everywhere. Only for planning: a finished run takes its place.
UTILISATION = 0.4
OVERHEAD_SECONDS = 10.0  # to compile, read the held-out rows and save; nothing beside a long run


class Rate(NamedTuple):
    """FLOPs (all matrix products) a second, by size name where known; `basis` says where they come from."""

    typical: float
    by_size: dict[str, float]
    basis: str
    overhead: float = OVERHEAD_SECONDS  # of every run

    def seconds(self, run: PlannedRun) -> float:
        """Of a whole run."""
        return self.overhead + run.flops / self.by_size.get(run.size, self.typical)


def on_device(machine: str, chips: int) -> Rate:
    """A named accelerator, such as v5p, at a stated share of its bfloat16 peak. UserError listing the known names."""
    wanted = machine.lower().replace("tpu", "").strip()
    for name, peak in accounting.PEAK_FLOPS.items():
        if wanted in (name.lower(), name.lower().replace("tpu", "").strip()):
            basis = f"{chips} x {name} at {UTILISATION:.0%} of {peak:.3g} FLOP/s (assumed)"
            return Rate(UTILISATION * peak * chips, {}, basis)
    raise UserError(f"--machine={machine} is not one of {', '.join(accounting.PEAK_FLOPS)}")


def measured(results: Sequence[Result]) -> Rate | None:
    """What finished runs reached, and what they took beside training; None where there are none.

    A run's seconds are those of its wall clock, its tokens per second those of its steps alone, where it had enough of
    them; the difference is starting, compiling, reading the held-out rows and saving.
    """
    rates: dict[str, list[float]] = {}
    overheads = []
    for r in results:
        if not r.seconds:
            continue
        rate = r.tokens_per_second * r.flops_exact / r.tokens if r.tokens_per_second else r.flops_exact / r.seconds
        rates.setdefault(r.size, []).append(rate)
        overheads.append(max(r.seconds - r.flops_exact / rate, 0.0))
    if not rates:
        return None
    by_size = {size: statistics.median(values) for size, values in rates.items()}
    basis = f"as in {len(overheads)} finished runs"
    return Rate(statistics.median(by_size.values()), by_size, basis, statistics.median(overheads))


def this_machine(dtype: str, size: int = 1024) -> Rate:
    """By its data sheet, or else the best of a few square products, times the share that training reaches."""
    kind = jax.devices()[0].device_kind
    if kind in accounting.PEAK_FLOPS:
        return on_device(kind, jax.device_count())
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - start)
    peak = 2 * size**3 / min(seconds)
    basis = f"{UTILISATION:.0%} of the {peak:.2g} FLOP/s of a {dtype} product timed here"
    return Rate(UTILISATION * peak, {}, basis)


# --- the planning table

# Columns: title, cell, and whether a narrow terminal does without it.
_COLUMNS: tuple[tuple[str, Callable[[Result], str], bool], ...] = (
    ("N", lambda row: short(row.non_embedding_parameters), False),
    ("N + emb.", lambda row: short(row.parameters), True),
    ("tokens", lambda row: short(row.tokens), False),
    ("tokens/N", lambda row: f"{row.tokens / row.non_embedding_parameters:.3g}", False),
    ("epochs", lambda row: "?" if row.epochs is None else f"{row.epochs:.2f}", True),
    ("steps", lambda row: f"{row.steps:,}", True),
    ("batch", lambda row: f"{row.batch_size}", True),
    ("peak rate", lambda row: f"{row.peak_learning_rate:.2e}", True),
    ("FLOPs 6ND", lambda row: f"{row.flops_6nd:.3g}", False),
    ("exact", lambda row: f"{row.flops_exact:.3g}", True),
)
WIDE = 150  # characters that all of them take


def plan_table(runs: Sequence[PlannedRun], results: Sequence[Result], rate: Rate, width: int) -> Table:
    """What the grid will train, a line a run: sizes, tokens, both counts of FLOPs, time, state.

    N is without embeddings. On fewer than `WIDE` characters some columns are left out.
    """
    columns = [(title, cell) for title, cell, spare in _COLUMNS if width >= WIDE or not spare]
    table = Table(title=f"{len(runs)} runs", caption=f"time: {rate.basis}", title_justify="left")
    # Text, not markup: names of sizes may hold brackets.
    table.add_column("run", no_wrap=True)
    for title in (*(title for title, _ in columns), "time", "state"):
        table.add_column(title, justify="right", no_wrap=True)
    last = {row.run: row for row in results}  # a run's last reading is its end
    for run in runs:
        row = last[run.name]
        table.add_row(Text(run.name), *(cell(row) for _, cell in columns), duration(rate.seconds(run)), row.status)
    return table


def plan_summary(runs: Sequence[PlannedRun], results: Sequence[Result], rate: Rate, retries: bool = False) -> str:
    """The totals in a sentence or two; `retries`: whether failed runs are to be trained again."""
    lost = [run for run in runs if _failed(run, results)]
    left = [run for run in runs if not _done(run, results) or (retries and run in lost)]
    finished = sum(_done(run, results) for run in runs) - len(lost)
    flops = sum(run.flops for run in runs)
    plan = "trained again" if retries else "left so: see --retry_rate and --retry_failed"
    failed = f", {len(lost)} failed ({plan})" if lost else ""
    return (
        f"{len(runs)} runs, {finished} of them finished{failed}; {flops:.3g} FLOPs in all (all matrix products); "
        f"about {duration(sum(map(rate.seconds, left)))} left ({rate.basis})"
    )


def duration(seconds: float) -> str:
    """1:02:03 up to four days, whole hours beyond."""
    return clock(seconds) if seconds < 4 * 86_400 else f"{seconds / 3600:,.0f} h"


def _done(run: PlannedRun, results: Sequence[Result]) -> bool:
    return all(row.status in (FINISHED, FAILED) for row in results if row.run == run.name)


def _failed(run: PlannedRun, results: Sequence[Result]) -> bool:
    return any(row.status == FAILED for row in results if row.run == run.name)


# --- the grid as it fills up


def grid_table(runs: Sequence[PlannedRun], results: Sequence[Result], current: dict[str, str]) -> Table:
    """Sizes down, budgets (or amounts of data) and series across, losses in the cells; the lowest of a column bold.

    `current`: what to write for runs that are under way, by name.
    """
    sizes = list(dict.fromkeys(run.size for run in sorted(runs, key=lambda r: r.config.model.width)))
    columns = list(dict.fromkeys((run.series, run.group) for run in runs))
    order = ordered(run.series.key for run in runs)
    columns.sort(key=lambda column: order.index(column[0]))
    last = {row.run: row for row in results}
    cells: dict[tuple[Series, str], dict[str, list[Result]]] = {column: {} for column in columns}
    for run in runs:
        cells[run.series, run.group].setdefault(run.size, []).append(last[run.name])
    table = Table(title_justify="left")
    table.add_column("size")
    for series, group in columns:
        table.add_column(f"{series.title}\n{group}", justify="right")
    lowest = {
        column: min((row.loss for rows in by_size.values() for row in rows if row.measured), default=None)
        for column, by_size in cells.items()
    }
    for size in sizes:
        shown = (
            Text(" ").join(_cell(row, lowest[column], current) for row in cells[column].get(size, ()))
            for column in columns
        )
        table.add_row(Text(size), *shown)
    return table


def _cell(row: Result, lowest: float | None, current: dict[str, str]) -> Text:
    # Text, not markup: lines printed beside the live table are without markup, and so would be the table.
    if row.run in current:
        return Text(current[row.run], style="yellow")
    if row.status == FAILED:
        return Text("failed", style="red")
    if row.measured:
        return Text(f"{row.loss:.4f}", style="bold green" if row.loss == lowest else "")
    return Text("begun", style="cyan") if row.status == RUNNING else Text("·", style="dim")


_REFRESH_SECONDS = 2.0
_LINE_SECONDS = 60.0  # in a file, between two lines of a run that goes on


class Board:
    """Shows a sweep; `progress(run)` is what `loop.train` reports to, `ended` closes a run. A context manager."""

    def __init__(self, runs: Sequence[PlannedRun], collect: Callable[[], list[Result]], console: Console | None = None):
        self.runs, self.collect = runs, collect
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.current: dict[str, str] = {}
        self.line = ""
        self.results = collect()
        self._shown = self._began = time.monotonic()

    def __enter__(self):
        if self.live:
            self.live.start()
        self.show(force=True)
        return self

    def __exit__(self, *exception):
        self.show(force=True)
        if self.live:
            self.live.stop()

    def progress(self, run: PlannedRun) -> "RunProgress":
        """For `loop.train`."""
        return RunProgress(run, self)

    def ended(self, run: PlannedRun, how: str) -> None:
        """A run came to its end, or was left alone; `how` is its state, or a remark."""
        self.current.pop(run.name, None)
        self.results = self.collect()
        last = [row for row in self.results if row.run == run.name][-1]
        done = sum(_done(r, self.results) for r in self.runs)
        if last.measured and how == FINISHED:
            error = "" if last.stderr is None else f" ± {last.stderr:.4f}"
            how = f"{last.loss:.4f}{error} nats/token in {clock(last.seconds or 0)}"
        elif how == FAILED:
            how = f"failed: {last.reason}"
        self.print(f"[{done}/{len(self.runs)}] {run.name}: {how}")
        self.show(force=True)

    def print(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text, style="red" if "failed" in text else ""))

    def show(self, force: bool = False) -> None:
        """Redraw, not more often than is readable; now and then with what other jobs have left on the disk."""
        now = time.monotonic()
        if not self.live:
            if not force and now - self._shown > _LINE_SECONDS and self.line:
                self._shown = now
                self.print(self.line)
            return
        if not force and now - self._shown < _REFRESH_SECONDS:
            return
        if now - self._shown > 5 * _REFRESH_SECONDS:
            self.results = self.collect()
        self._shown = now
        done = sum(_done(r, self.results) for r in self.runs)
        lost = sum(_failed(r, self.results) for r in self.runs)
        failed = f" ({lost} failed)" if lost else ""
        status = f"{done}/{len(self.runs)} runs{failed}, {clock(now - self._began)} here   {self.line}"
        self.live.update(Group(grid_table(self.runs, self.results, self.current), Text(status)), refresh=True)


class RunProgress:
    """One run's `training.progress.Progress`, on the board."""

    def __init__(self, run: PlannedRun, board: Board):
        self.run, self.board = run, board
        board.current[run.name] = "starting"
        board.show()

    def log(self, text: str) -> None:
        """Only that a run is continued is worth the board's line."""
        if text.startswith("continuing"):
            self.board.line = text

    def window(self, step: int, values: dict[str, float]) -> None:
        """The share of its steps in the run's cell; step, loss and time left in the line below the grid."""
        config = self.run.config
        rate = values.get("speed/tokens_per_second")
        left = f", {clock((config.steps - step) * config.tokens_per_step / rate)} left" if rate else ""
        self.board.current[self.run.name] = f"{step / config.steps:.0%}"
        loss = or_dash(training_loss(values), ".4f")  # none where all of the window was skipped
        self.board.line = f"{self.run.name}: step {step}/{config.steps}, loss {loss}{left}"
        self.board.show()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The figure is in the run's cell when it has ended."""
        self.board.show()
