"""A bar on standard error while something long goes on, where someone is looking."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function of (done, total) that draws, or None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(title)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


class Line(NamedTuple):
    """`now` shows what is going on, where someone is looking; `done` writes a line that stays, also into a log."""

    now: Callable[[str], None]
    done: Callable[[str], None]


@contextlib.contextmanager
def line() -> Iterator[Line]:
    """A spinner with its text, and finished lines above it."""
    # Not standard error itself: libtpu's chatter there is kept away while it compiles.
    with os.fdopen(os.dup(2), "w") as stream:
        if not sys.stderr.isatty():
            yield Line(lambda text: None, lambda text: print(text, file=stream, flush=True))
            return
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        with console.status("") as status:
            yield Line(status.update, lambda text: console.print(text, markup=False, soft_wrap=True))
