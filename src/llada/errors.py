"""What a user can put right, by kind: every command turns it into one line and the exit status of its kind.

0 success. 1 a failure of ours, with its traceback. 2 a mistake in what was given: flags, config, an experiment file, a
damaged small file. 3 training diverged. 4 the data are damaged, or not those that the run was trained on. 5 the disk
is full or failing. 128 + n: stopped by signal n, everything saved. Only 1 and 5 are worth another try as things are:
launch/keep_training.sh and the other launchers go by this table.
"""

import errno
import signal
from collections.abc import Iterator

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class UserError(ValueError):
    """A user's mistake. The message is one line: what was given, what is allowed, which flag to change."""

    status = 2


class Diverged(UserError):
    """Loss or gradient stopped being a number. Nothing was saved after the last good checkpoint."""

    status = 3


class DataError(UserError):
    """Rows, or what they were made from, are damaged or are not those that the run was trained on."""

    status = 4


class DiskError(UserError):
    """No space left, a quota or limit reached, a disk that fails or cannot be written."""

    status = 5


class Interrupted(Exception):
    """A signal asked to stop, and what was to be saved is saved. Not a mistake: the same command goes on from there."""

    def __init__(self, signal_number: int, where: str):
        """`where` it stopped: "after step 40"."""
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {where}; run again to continue")
        self.signal_number, self.where = signal_number, where
        self.status = 128 + signal_number


KINDS = {kind.__name__: kind for kind in (UserError, Diverged, DataError, DiskError)}


def disk_error(error: BaseException, what: str) -> DiskError | None:
    """The DiskError for an exception that a full or failing disk raised while `what`; None for any other.

    Libraries pass the system's words on in exceptions of their own, so those are looked for as well.
    """
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            where = f" ({seen.filename})" if seen.filename else ""
            return DiskError(f"{seen.strerror} while {what}{where}; make room, then run the same command again")
        words = str(seen)
        for phrase in ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED: Error"):
            if phrase in words:
                return DiskError(f"{phrase} while {what}; make room, then run the same command again")
    return None


def causes(error: BaseException, implicit: bool = True) -> Iterator[BaseException]:
    """The exception and what it was raised from, outermost first; `implicit`: also what was being handled then.

    Causes may form a circle: each comes once.
    """
    met: list[BaseException] = []
    while error is not None and not any(error is other for other in met):
        met.append(error)
        yield error
        error = error.__cause__ or (error.__context__ if implicit else None)
