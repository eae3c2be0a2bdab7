"""Words while one waits."""

import time
from collections.abc import Callable


class Report:
    """Words on how far a long piece of work is, about once a second; whoever wants it to end raises from `check`."""

    def __init__(self, progress: Callable[[str], None] | None, check: Callable[[], None] | None):
        self._progress, self._check, self._next = progress, check, 0.0

    def __call__(self, words: str) -> None:
        self.check()
        now = time.monotonic()
        if self._progress and now >= self._next:
            self._progress(words)
            self._next = now + 1

    def check(self) -> None:
        if self._check:
            self._check()
