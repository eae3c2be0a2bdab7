"""A bar on standard error while something long goes on, where someone is looking."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator


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


@contextlib.contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is going on now: a spinner with its text, or nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    # Not standard error itself: libtpu's chatter there is kept away while it compiles.
    with os.fdopen(os.dup(2), "w") as stream, Console(file=stream).status("") as status:
        yield status.update
