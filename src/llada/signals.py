"""Signals that ask a command to stop: SIGTERM, SIGINT and SIGHUP, noticed also where Python runs no handler.

Python calls handlers between its own instructions, so never during a long call into C++: a compilation, a wait for
other processes. A thread learns of a signal at once and ends the process some seconds later, unless there is work to
save.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS = 5  # the time that Python's own way out may take
_AGAIN_SECONDS = 0.05

# Signals that end the process after `_SECONDS`, whatever it does. SIGINT is not among them: a chat takes it for an end
# of its present answer.
_UNCONDITIONAL = frozenset({signal.SIGTERM, signal.SIGHUP})
_final = _UNCONDITIONAL
_reported = False


def listen() -> None:
    """Have the three signals end this process, in one line, from now on; but for those that are ignored (nohup)."""
    defaults = {signal.SIGINT: signal.default_int_handler}
    sys.unraisablehook = _again_if_lost(sys.unraisablehook)
    ours = [number for number in STOPPING if signal.getsignal(number) is defaults.get(number, signal.SIG_DFL)]
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
    for number in ours:
        signal.signal(number, _handle)


def ignore() -> None:
    """From here on the exit status is settled: a signal that comes while Python ends does not change it."""
    for number in STOPPING:
        if stops(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)


def set_final(numbers: frozenset[signal.Signals] | None = None) -> None:
    """Which signals end the process within seconds, whatever it does; None: those that do so by default."""
    global _final
    _final = _UNCONDITIONAL if numbers is None else numbers


def report(number: int) -> None:
    """The line about a signal that ends the process: once, and to the descriptor, which works at any moment."""
    global _reported
    if not _reported:
        line = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        with contextlib.suppress(OSError):  # with SIGHUP the terminal has gone
            os.write(2, f"llada: {line}\n".encode())
    _reported = True


def stopping(handler: Callable[[int, FrameType | None], None]) -> Callable[[int, FrameType | None], None]:
    """Mark a handler as one that stops the command: the thread of `listen` may end the process in its stead."""
    handler.stops = True  # type: ignore[attr-defined]
    return handler


def stops(handler: object) -> bool:
    """Whether a handler is one of those."""
    return getattr(handler, "stops", False)


@stopping
def _handle(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or SystemExit for the other signals.

    During an import that can leave a C++ module half initialised and crash: exit at once instead, as nothing is open
    yet.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end(number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    report(number)
    sys.exit(128 + number)


def end(number: int) -> None:
    """End the process at once, with the signal's line and status."""
    report(number)
    os._exit(128 + number)


def _again_if_lost(report_unraisable: Callable[[Any], None]) -> Callable[[Any], None]:
    """A hook for exceptions that Python can only report: raised in finalizers and in callbacks, as JAX has them.

    Where it is ours a signal has not been heard: it is sent again a moment later.
    """

    def hook(lost: Any) -> None:
        trace = lost.exc_traceback
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is None or trace.tb_frame.f_code is not _handle.__code__:
            report_unraisable(lost)
            return
        number = signal.SIGINT if isinstance(lost.exc_value, KeyboardInterrupt) else lost.exc_value.code - 128
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()

    return hook


def _watch(descriptor: int) -> None:
    while True:
        for number in os.read(descriptor, 64):
            if number in STOPPING and stops(signal.getsignal(number)):
                threading.Thread(target=_end_later, args=(number,), daemon=True).start()


def _end_later(number: int) -> None:
    time.sleep(_SECONDS)
    if number in _final:
        end(number)
