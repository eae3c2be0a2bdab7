"""Progress of long work on standard error: a bar on a terminal, else a plain line now and then."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llada import processes

_QUIET_SECONDS = 20  # between lines in a log


def _is_drawn() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function of (done, total) that shows how far it is; of several processes, all but the first get None."""
    if not processes.is_first():
        yield None
        return
    if not _is_drawn():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(title)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


def _lines(title: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _QUIET_SECONDS:
            last = now
            print(f"{title}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)

    return show


class Line(NamedTuple):
    """`now` shows what is going on, on a terminal only; `done` writes a line that stays, also into a log."""

    now: Callable[[str], None]
    done: Callable[[str], None]


@contextlib.contextmanager
def line() -> Iterator[Line]:
    """A spinner with a text, below the permanent lines."""
    # A copy of standard error, which itself is redirected while libtpu compiles and prints to it.
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as stream:
        if not _is_drawn():
            yield Line(lambda text: None, lambda text: print(text, file=stream, flush=True))
            return
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        with console.status("") as status:
            yield Line(status.update, lambda text: console.print(text, markup=False, soft_wrap=True))


_WORTH_SAYING = 1000  # forward passes of a row


def with_cost(show: Callable[[int, int], None] | None, what: str, passes: int) -> Callable[[int, int], None] | None:
    """`show`, with lines that stay: how many forward passes of a row are ahead, and after two batches their seconds.

    The first batch is compiled as well, so the second one is timed. Nothing is said of work that is soon done.
    """
    if show is None or passes < _WORTH_SAYING:
        return show
    print(f"{what}: at most {passes:,} forward passes of a row", file=sys.stderr, flush=True)
    seen: list[tuple[float, int]] = []

    def timed(done: int, total: int) -> None:
        seen.append((time.monotonic(), done))
        if len(seen) == 2 and done < total:
            (start, before), (now, _) = seen
            left = (now - start) / (done - before) * (total - done)
            print(f"{what}: about {left:.0f} seconds more", file=sys.stderr, flush=True)
        show(done, total)

    return timed
