"""A run that hangs ends: where no step finishes in time, all stacks are written down and the process gives up."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llada import processes
from llada.errors import PeerLost

_REPORT_SECONDS = 5  # the disk, or whoever reads standard error, may be what hangs


class Watchdog:
    """Ends the process with the status of PeerLost once `alive` has not been called for `seconds`; None: never.

    The clock starts with the first call, so that what comes before, such as compilation, may take any time. Stacks go
    to standard error and to `hung.PROCESS.txt` in the workdir. Where Python itself hangs, within a call that does not
    release its global lock, the process ends a little later, with status 1 and stacks on standard error only.
    """

    def __init__(self, seconds: float | None, workdir: Path):
        self._seconds = seconds
        self._pause = min(1.0, (seconds or 1.0) / 4)
        self._path = workdir / f"hung.{processes.index()}.txt"
        self._last: float | None = None  # None while nothing is watched
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """A step has finished."""
        watched, self._last = self._last is not None, time.monotonic()
        if self._seconds is not None and not watched:
            self._arm()
            if self._thread.ident is None:
                self._thread.start()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """A block that may take any time, as it compiles."""
        watched, self._last = self._last is not None, None
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            if watched:
                self.alive()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no more."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """A C thread of its own, for the time when the other one does not get Python's lock."""
        assert self._seconds is not None
        faulthandler.dump_traceback_later(self._seconds + 2 * self._pause, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._over.wait(self._pause):
            if self._last is not None:
                self._arm()
            last = self._last
            if last is None:
                faulthandler.cancel_dump_traceback_later()
            elif time.monotonic() - last > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        report = threading.Thread(target=self._report, daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        os._exit(PeerLost.status)

    def _report(self) -> None:
        line = f"process {processes.index()} of {processes.count()}: no step has finished for {self._seconds:g} s"
        line += " (train.watchdog_seconds)"
        with contextlib.suppress(OSError, ValueError):
            os.write(2, f"llada: {line}; all stacks are here and in {self._path}; run again to continue\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
