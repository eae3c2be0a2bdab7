"""A sweep as it goes: the grid of losses on a terminal, filling up; a line a run elsewhere."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llada.config import Config
from llada.objectives.families import FAMILIES
from llada.scaling.grid import PlannedRun
from llada.scaling.rates import Rate
from llada.scaling.results import FAILED, FINISHED, RUNNING, Result
from llada.training.progress import Progress, clock

_REFRESH_SECONDS = 2.0
_LINE_SECONDS = 60.0  # in a file, a line of news so often


# Columns of the planning table: title, cell, and whether a narrow terminal does without it.
COLUMNS = (
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
    columns = [(title, cell) for title, cell, spare in COLUMNS if width >= WIDE or not spare]
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
    again = "trained again" if retries else "left so: see --retry_rate and --retry_failed"
    told = f", {len(lost)} failed ({again})" if lost else ""
    return (
        f"{len(runs)} runs, {finished} of them finished{told}; {flops:.3g} FLOPs in all (all matrix products); "
        f"about {duration(sum(map(rate.seconds, left)))} left ({rate.basis})"
    )


def short(count: float) -> str:
    """1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """1:02:03 up to four days, whole hours beyond."""
    return clock(seconds) if seconds < 4 * 86_400 else f"{seconds / 3600:,.0f} h"


def _done(run: PlannedRun, results: Sequence[Result]) -> bool:
    return all(row.status in (FINISHED, FAILED) for row in results if row.run == run.name)


def _failed(run: PlannedRun, results: Sequence[Result]) -> bool:
    return any(row.status == FAILED for row in results if row.run == run.name)


def grid_table(runs: Sequence[PlannedRun], results: Sequence[Result], current: dict[str, str]) -> Table:
    """Sizes down, budgets (or amounts of data) and families across, losses in the cells; the lowest of a column bold.

    `current`: what to write for runs that are under way, by name.
    """
    table = Table(title_justify="left")
    sizes = list(dict.fromkeys(run.size for run in sorted(runs, key=lambda r: r.config.model.width)))
    columns = list(dict.fromkeys((run.group, run.objective) for run in runs))
    columns.sort(key=lambda column: list(FAMILIES).index(column[1]))
    table.add_column("size")
    for group, objective in columns:
        table.add_column(f"{FAMILIES[objective].title}\n{group}", justify="right")
    last = {row.run: row for row in results}
    cells = {(run.size, run.group, run.objective): [] for run in runs}
    for run in runs:
        cells[run.size, run.group, run.objective].append(last[run.name])
    for size in sizes:
        shown = [Text(size)]
        for column in columns:
            rows = cells.get((size, *column), [])
            best = min((r.nats_per_token for k, v in cells.items() if k[1:] == column for r in v if r.measured),
                       default=None)  # fmt: skip
            shown.append(Text(" ").join(_cell(row, best, current) for row in rows))
        table.add_row(*shown)
    return table


def _cell(row: Result, best: float | None, current: dict[str, str]) -> Text:
    # Text, not markup: lines printed beside the live table are without markup, and so would be the table.
    if row.run in current:
        return Text(current[row.run], style="yellow")
    if row.status == FAILED:
        return Text("failed", style="red")
    if row.measured:
        return Text(f"{row.nats_per_token:.4f}", style="bold green" if row.nats_per_token == best else "")
    return Text("begun", style="cyan") if row.status == RUNNING else Text("·", style="dim")


class Board:
    """Shows a sweep; `progress(run)` is what `loop.train` tells, `ended` closes a run. Use as a context manager."""

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

    def progress(self, run: PlannedRun) -> Progress:
        """For `loop.train`."""
        return _RunProgress(run, self)

    def ended(self, run: PlannedRun, how: str) -> None:
        """A run came to its end, or was left alone."""
        self.current.pop(run.name, None)
        self.results = self.collect()
        rows = [row for row in self.results if row.run == run.name]
        done = sum(_done(r, self.results) for r in self.runs)
        figure = rows[-1]
        if figure.measured and how == FINISHED:
            error = "" if figure.stderr is None else f" ± {figure.stderr:.4f}"
            how = f"{figure.nats_per_token:.4f}{error} nats/token in {clock(figure.seconds or 0)}"
        elif how == FAILED:
            how = f"failed: {figure.reason}"
        self.say(f"[{done}/{len(self.runs)}] {run.name}: {how}")
        self.show(force=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text, style="red" if "failed" in text else ""))

    def show(self, force: bool = False) -> None:
        """Draw anew, not more often than an eye wants; the disk tells what other jobs did meanwhile."""
        now = time.monotonic()
        if not self.live:
            if not force and now - self._shown > _LINE_SECONDS and self.line:
                self._shown = now
                self.say(self.line)
            return
        if not force and now - self._shown < _REFRESH_SECONDS:
            return
        if now - self._shown > 5 * _REFRESH_SECONDS:
            self.results = self.collect()
        self._shown = now
        done = sum(_done(r, self.results) for r in self.runs)
        lost = sum(_failed(r, self.results) for r in self.runs)
        told = f" ({lost} failed)" if lost else ""
        status = f"{done}/{len(self.runs)} runs{told}, {clock(now - self._began)} here   {self.line}"
        self.live.update(Group(grid_table(self.runs, self.results, self.current), Text(status)), refresh=True)


class _RunProgress:
    """One run's news, on the board."""

    def __init__(self, run: PlannedRun, board: Board):
        self.config: Config = run.config
        self.run, self.board = run, board
        board.current[run.name] = "starting"
        board.show()

    def log(self, text: str) -> None:
        self.board.line = text if text.startswith("continuing") else self.board.line

    def window(self, step: int, values: dict[str, float]) -> None:
        rate = values.get("speed/tokens_per_second")
        left = f", {clock((self.config.steps - step) * self.config.tokens_per_step / rate)} left" if rate else ""
        self.board.current[self.run.name] = f"{step / self.config.steps:.0%}"
        self.board.line = (
            f"{self.run.name}: step {step}/{self.config.steps}, loss {values['train/loss_nats_per_token']:.4f}{left}"
        )
        self.board.show()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.board.show()
