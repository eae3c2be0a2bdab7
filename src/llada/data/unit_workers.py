"""The units of a plan, written in this process or by several.

Processes import this file and what it needs, so neither JAX nor Grain: they begin at once, and are small.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from llada import json_files
from llada.data import shards, text_files, tokenizer_files, units
from llada.data.shards import Options
from llada.data.tokenizer import Tokenizer
from llada.data.units import Piece
from llada.data.waiting import Report, clock
from llada.errors import PeerLost, UserError

FORMAT_VERSION = 1
_POLL_SECONDS = 0.2
_COMPRESSED_TO = 3  # what text is compressed to, about: for the time that is left
_TOKENS, _BYTES, _STOP = range(3)


class Plan(NamedTuple):
    """What is to be written: read from plan.json by every process."""

    options: Options
    units: list[list[Piece]]
    tokenizer_sha256: str
    asked: int | None  # how many units were asked for


def read_plan(directory: Path) -> Plan:
    """What plan.json says. UserError where it is not what was written."""
    path = directory / "plan.json"
    values = json_files.read(path)
    if values != json_files.sealed(values) or values["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} is not what this llada wrote; remove {directory}, and call llada tokenize again")
    return Plan(
        Options(**values["options"]), units.from_json(values["units"]), values["tokenizer_sha256"], values["shards"]
    )


class _Stopped(Exception):
    pass


def write(directory: Path, plan: Plan, tokenizer: Tokenizer, todo: list[int], workers: int, report: Report) -> None:
    """Write the units `todo`, by so many processes; `report` is called with how far they are.

    Errors are those of shards.write; PeerLost where a process dies.
    """
    total = sum(_weight(plan.units[unit]) for unit in todo)
    begun = time.monotonic()

    def show(shared: Any, done: int) -> None:
        seconds, read = time.monotonic() - begun, shared[_BYTES]
        rate = shared[_TOKENS] / max(seconds, 1e-3)
        left = f", {clock(seconds * (total - read) / read)} left" if read else ""
        report(
            f"tokenising: {done}/{len(todo)} shards, {shared[_TOKENS] / 1e6:.1f} M tokens, {rate:,.0f} tokens/s{left}"
        )

    if workers > 1:
        _in_processes(directory, todo, workers, show, report.check)
        return
    shared = [0, 0, 0]
    for done, unit in enumerate(todo):
        meter = _Meter(shared, plan.units[unit], functools.partial(show, shared, done))
        shards.write(directory, unit, plan.units, plan.options, tokenizer, meter.add)
        meter.finish()


class _Meter:
    """Counts a unit's tokens, and its bytes as a share of those of its files, into three numbers that others read."""

    def __init__(self, shared: Any, unit: list[Piece], show: Callable[[], None]):
        self._shared, self._show, self._weight = shared, show, _weight(unit)
        self._seen = self._credited = 0

    def add(self, piece: Piece, size: int, tokens: int) -> None:
        """Count a document. _Stopped where the others are to stop."""
        self._seen += size if text_files.cut_by(Path(piece.path)) == "lines" else size // _COMPRESSED_TO
        self._credit(min(self._seen, self._weight), tokens)
        self._show()

    def finish(self) -> None:
        """The unit has been read."""
        self._credit(self._weight, 0)

    def _credit(self, credited: int, tokens: int) -> None:
        with getattr(self._shared, "get_lock", contextlib.nullcontext)():
            self._shared[_TOKENS] += tokens
            self._shared[_BYTES] += credited - self._credited
        self._credited = credited
        if self._shared[_STOP]:
            raise _Stopped


def _weight(unit: list[Piece]) -> int:
    return sum(piece.weight for piece in unit)


def _in_processes(
    directory: Path, todo: list[int], workers: int, show: Callable[[Any, int], None], check: Callable[[], None]
) -> None:
    """Each process has a unit at a time. They are spawned: a fork would share threads and locks of libraries."""
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", 3)
    pool = ProcessPoolExecutor(workers, context, _begin, (directory, shared, os.getpid()))
    try:
        left: set[Future[None]] = {pool.submit(_work, unit) for unit in todo}
        while left:
            done, left = wait(left, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
            show(shared, len(todo) - len(left))
    except BrokenProcessPool as error:
        time.sleep(_POLL_SECONDS)  # a signal to all of the group may have come to the worker first
        check()
        raise PeerLost(
            f"a worker died, perhaps for memory; the shards that are finished in {directory} stay: call llada tokenize "
            "again, with fewer --workers where memory is short"
        ) from error
    finally:
        shared[_STOP] = 1
        pool.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    directory: Path
    plan: Plan
    tokenizer: Tokenizer
    shared: Any


_worker: list[_Worker] = []


def _begin(directory: Path, shared: Any, parent: int) -> None:
    """A process's beginning. It ends with its parent, which decides what becomes of signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    plan = read_plan(directory)
    path = tokenizer_files.in_workdir(directory)
    if path is None:
        raise UserError(f"the tokenizer in {directory} is gone; give another --out")
    _worker[:] = [_Worker(directory, plan, tokenizer_files.load(path), shared)]


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _work(unit: int) -> None:
    directory, plan, tokenizer, shared = _worker[0]
    meter = _Meter(shared, plan.units[unit], lambda: None)
    with contextlib.suppress(_Stopped):
        shards.write(directory, unit, plan.units, plan.options, tokenizer, meter.add)
        meter.finish()
