"""Words while one waits."""

import time
from collections.abc import Callable


class Report:
    """Words on how far a long piece of work is: after a second, then less and less often, each minute at last.

    Whoever wants the work to end raises from `check`, which every call asks.
    """

    def __init__(self, progress: Callable[[str], None] | None, check: Callable[[], None] | None):
        self._progress, self._check = progress, check
        self._begun = time.monotonic()
        self._next = self._begun + 1

    def __call__(self, words: str) -> None:
        self.check()
        now = time.monotonic()
        if self._progress and now >= self._next:
            self._progress(words)
            self._next = now + min(max(1.0, 0.1 * (now - self._begun)), 60.0)

    def check(self) -> None:
        if self._check:
            self._check()
