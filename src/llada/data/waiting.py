"""How far a long piece of work is, for whoever waits for it."""

import time
from collections.abc import Callable


class Report:
    """Logs how far the work is: after a second, then less and less often, each minute at last.

    Whoever wants the work to end raises from `check`, which every call calls.
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
