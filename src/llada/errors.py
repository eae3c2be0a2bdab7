"""Errors that a user can fix, by kind: a command prints each as one line and ends with the exit status of its kind.

    0        success
    1        a bug of ours or a crash, with its traceback
    2        a mistake in the input: flags, config, experiment file, a damaged small file
    3        training diverged
    4        the data are damaged, or not those that the run was trained on
    5        the disk is full or failing
    128 + n  stopped by signal n, with everything saved

Only after 1 and 5 is the same command worth another try; launch/keep_training.sh and the other launchers rely on it.
"""

import errno
import signal
from collections.abc import Iterator

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class UserError(ValueError):
    """A user's mistake. The message is one line: the value given, what is allowed, the flag to change."""

    status = 2


class Diverged(UserError):
    """Loss or gradient became NaN or infinite. Nothing was saved after the last good checkpoint."""

    status = 3


class DataError(UserError):
    """Rows, or their sources, are damaged or are not those that the run was trained on."""

    status = 4


class DiskError(UserError):
    """No space left, a quota or size limit reached, or an input/output error of the disk."""

    status = 5


class Interrupted(Exception):
    """A signal stopped the work after everything was saved. Not a mistake: the same command continues from there."""

    def __init__(self, signal_number: int, where: str):
        """`where` is the point it reached: "after step 40"."""
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {where}; run again to continue")
        self.signal_number, self.where = signal_number, where
        self.status = 128 + signal_number


KINDS = {kind.__name__: kind for kind in (UserError, Diverged, DataError, DiskError)}


def disk_error(error: BaseException, what: str) -> DiskError | None:
    """The DiskError for an exception caused by a full or failing disk during `what`; None for any other exception.

    Libraries wrap the system's error in exceptions of their own: the causes are searched, and their texts as well.
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            where = f" ({cause.filename})" if cause.filename else ""
            return DiskError(f"{cause.strerror} while {what}{where}; make room, then run the same command again")
        text = str(cause)
        for phrase in ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED: Error"):
            if phrase in text:
                return DiskError(f"{phrase} while {what}; make room, then run the same command again")
    return None


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
