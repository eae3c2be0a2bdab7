"""Errors that a user can fix, by kind: a command prints each as one line and ends with the exit status of its kind.

`ENDINGS` is the table of statuses; launch/common.sh and docs/running.md follow it, and tests compare them.
"""

import errno
import os
import re
import signal
from collections.abc import Iterator
from typing import NamedTuple

_NO_ROOM, _FAILING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, {errno.EIO, errno.EROFS}
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")  # in what tensorstore raises


class Ending(NamedTuple):
    """What an exit status of `llada train` means, and whether a launcher runs the same command again."""

    kind: str  # one word, as launch/common.sh has it
    meaning: str
    again: str


_NO, _TRIES = "no", "yes, five times without a new checkpoint"
ENDINGS = {
    0: Ending("done", "done", _NO),
    1: Ending("crash", "a crash of ours or of a library, with its traceback", _TRIES),
    2: Ending("mistake", "a mistake in flags, config, experiment file, or a damaged small file", _NO),
    3: Ending("diverged", "training diverged; the last good checkpoint is there", "no: it would at the same step"),
    4: Ending("data", "data damaged, or not those that the run was trained on", _NO),
    5: Ending("disk", "the disk is full or fails", "yes, after longer pauses, six times without a new checkpoint"),
    6: Ending("peer", "another process died or hangs, or no step finished in time", _TRIES),
    128 + signal.SIGHUP: Ending("preempted", "SIGHUP; everything is saved", "yes"),
    128 + signal.SIGINT: Ending("interrupted", "Ctrl-C; everything is saved", _NO),
    128 + signal.SIGTERM: Ending("preempted", "SIGTERM; everything is saved", "yes"),
}  # any other status is the end of a crash: 137 is SIGKILL, often for memory


class UserError(ValueError):
    """A user's mistake. The message is one line: the value given, what is allowed, the flag to change."""

    status = 2


class Diverged(UserError):
    """Loss or gradient became NaN or infinite. Nothing was saved after the last good checkpoint."""

    status = 3


class Damaged(UserError):
    """A checkpoint is not what was saved. Training sets it aside and goes on from an older one."""


class StepRemoved(UserError):
    """Training, which retains only the newest steps, removed one while it was being read."""


class DataError(UserError):
    """Rows, or their sources, are damaged or are not those that the run was trained on."""

    status = 4


class DiskError(UserError):
    """No space left, a quota or size limit reached, or an input/output error of the disk."""

    status = 5


class PeerLost(UserError):
    """Another process of the run died, hangs or cannot be reached, or no step finished in time: nothing to correct."""

    status = int(signal.SIGABRT)  # JAX aborts a process that has lost the others; processes.py makes that this status


class Interrupted(Exception):
    """A signal stopped the work after everything was saved. Not a mistake: the same command continues from there."""

    def __init__(self, signal_number: int, where: str):
        """`where` is the point it reached: "after step 40"."""
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {where}; run again to continue")
        self.signal_number, self.where = signal_number, where
        self.status = 128 + signal_number


KINDS = {kind.__name__: kind for kind in (UserError, Diverged, Damaged, StepRemoved, DataError, DiskError, PeerLost)}


def disk_error(error: BaseException, what: str, writable: bool = False) -> DiskError | None:
    """The DiskError for an exception caused by a full or failing disk during `what`; None for any other exception.

    Libraries wrap the system's error in exceptions of their own: the causes are searched, and their texts as well.
    `writable`: the disk was, until now. If it has become read-only it fails; otherwise that is a user's mistake.
    """
    known = _NO_ROOM | _FAILING if writable else _NO_ROOM | _FAILING - {errno.EROFS}
    for cause in causes(error):
        text = str(cause)
        found = _SYSTEM_ERROR.search(text)
        number = cause.errno if isinstance(cause, OSError) else int(found[1]) if found else None
        if number in known:
            name = cause.filename if isinstance(cause, OSError) else None
            remedy = "make room" if number in _NO_ROOM else "see to the disk"
            where = f" ({name})" if name else ""
            return DiskError(f"{os.strerror(number)} while {what}{where}; {remedy}, then run the same command again")
        for phrase in ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED: Error"):
            if phrase in text:
                return DiskError(f"{phrase} while {what}; make room, then run the same command again")
    return None


def in_brief(error: object) -> str:
    """What a library says, as part of a line: on one line, and at most 200 characters of it, as it may quote a file."""
    words = " ".join(str(error).split())
    return f"{words[:200]}{'...' if words[200:] else ''}"


def causes(error: BaseException, implicit: bool = True) -> Iterator[BaseException]:
    """The exception and its causes, outermost first; `implicit`: also exceptions that were being handled at the time.

    Causes may form a cycle: each is yielded once.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and not any(current is other for other in seen):
        seen.append(current)
        yield current
        current = current.__cause__ or (current.__context__ if implicit else None)
