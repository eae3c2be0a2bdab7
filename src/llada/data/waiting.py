"""Progress lines of long preparations."""

import math
import time
from collections.abc import Callable


class Report:
    """Logs progress: after a second, then at growing intervals of at most a minute.

    Every call calls `check`, which may raise to end the work.
    """

    def __init__(self, log: Callable[[str], None], check: Callable[[], None]):
        self._log, self.check = log, check
        self._begun = time.monotonic()
        self._next = self._begun + 1

    def __call__(self, text: str) -> None:
        self.check()
        now = time.monotonic()
        if now >= self._next:
            self._log(text)
            self._next = now + min(max(1.0, 0.1 * (now - self._begun)), 60.0)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
