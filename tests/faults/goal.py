"""What the fault suite is made of: each file `r*.py` beside this one is a goal, tried many times from a seed.

A goal's module has

    NUMBER = "R4"
    TITLE = "Damaged checkpoints"                  # a row of docs/reliability.md
    DEMAND = "no silent damage; training falls back"   # what counts as right, in one line
    FULL, SAMPLE = 1000, 6                         # how many cases the suite draws, and a test
    def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]

`outcomes` yields as it goes, so that a suite that is stopped keeps what it has. Case i depends on (seed, i) alone.
"""

from typing import NamedTuple


class Outcome(NamedTuple):
    """One case. `what`: the fault as drawn; `ended`: how it ended, a word or two that can be counted.

    `wrong` says what should not be, with all that is needed to see why; "" where all is right. `seconds`: what was
    timed, if anything was.
    """

    what: str
    ended: str
    wrong: str = ""
    seconds: float | None = None
