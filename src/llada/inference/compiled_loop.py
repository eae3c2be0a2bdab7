"""What the compiled loops of both samplers share: their result, the clock, the observer, seeds and forbidden ids.

Shapes: B sequences, L canvas positions, V vocabulary, F forbidden ids.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import io_callback

from llada import mesh as mesh_lib

Array = Any  # what a program takes: an array of JAX or NumPy, or in a plan its shape and sharding

# Called after every step with the whole batch: (tokens_BL, step_BL, step). True ends the loop. It must not raise: of
# several devices, one that fails leaves the others waiting for it.
Observer = Callable[[np.ndarray, np.ndarray, int], bool | None]


class Relay:
    """An observer that passes on to another one: programs are compiled for one Relay, whoever listens."""

    def __init__(self) -> None:
        self._listener: Observer | None = None
        self._turn = threading.Lock()

    def __call__(self, tokens_BL: np.ndarray, step_BL: np.ndarray, step: int) -> bool | None:
        """Pass on to whoever listens now."""
        return None if self._listener is None else self._listener(tokens_BL, step_BL, step)

    @contextlib.contextmanager
    def to(self, listener: Observer) -> Iterator["Relay"]:
        """Pass on to `listener` while the block runs; blocks of other threads wait for it."""
        with self._turn:
            self._listener = listener
            try:
                yield self
            finally:
                self._listener = None


class Sample(NamedTuple):
    """Text of one batch, and what it cost.

    tokens_BL        the canvas, filled
    step_BL          at which step each position was written, -1 where it was part of the request
    forward_passes   of the model. A pass counts once per batch, twice with guidance; a cached pass over part of the
                     canvas counts like one over all of it, and so does a speculative one over several canvases
    seconds          of the compiled loop, without those that its observer took
    compile_seconds  before it; about 0 where these shapes were compiled before
    """

    tokens_BL: np.ndarray
    step_BL: np.ndarray
    forward_passes: int
    seconds: float
    compile_seconds: float


class _ObserverClock:
    """Seconds spent in observers so far, drawing and waiting: they are not sampling."""

    seconds = 0.0


_observer_clock = _ObserverClock()


def timed(loop, *arguments) -> Sample:
    """The Sample of a jitted loop that returns (tokens_BL, step_BL, passes), compiled before the clock starts."""
    start = time.perf_counter()
    loop.lower(*arguments).compile()
    compiled, observing = time.perf_counter(), _observer_clock.seconds
    tokens_BL, step_BL, passes = mesh_lib.on_host(loop(*arguments))
    seconds = time.perf_counter() - compiled - (_observer_clock.seconds - observing)
    return Sample(tokens_BL, step_BL, int(passes), max(seconds, 1e-9), compiled - start)


def report(
    observe: Observer | None, tokens_BL: jax.Array, step_BL: jax.Array, step: jax.Array | int
) -> jax.Array | bool:
    """From within a compiled loop, show the observer the canvases; whether the loop is to end."""
    if observe is None:
        return False

    def on_host(tokens_BL, step_BL, step):
        start = time.perf_counter()
        is_over = observe(np.asarray(tokens_BL), np.asarray(step_BL), int(step))
        _observer_clock.seconds += time.perf_counter() - start
        return np.bool_(is_over)

    return io_callback(on_host, jax.ShapeDtypeStruct((), bool), tokens_BL, step_BL, step, ordered=True)


def by_row(x: Array | None) -> Array | None:
    """Within a program an array (B,) or (B, L) that was given whole, each device with its own rows; None is None."""
    return None if x is None else mesh_lib.constrain(x, "BL" if x.ndim == 2 else "B")


def row_seeds(seed_B: np.ndarray | int, B: int) -> np.ndarray:
    """A seed for each of B rows: `seed_B` itself, or for a number that seed and the next ones."""
    return np.asarray(seed_B + np.arange(B) if np.ndim(seed_B) == 0 else seed_B, np.uint32)


def forbidden_list(forbidden_V: np.ndarray, *more: int | None) -> np.ndarray:
    """`forbidden_F`: the ids marked in `forbidden_V` and `more` (None adds nothing), ascending."""
    return np.union1d(np.flatnonzero(forbidden_V), [token for token in more if token is not None]).astype(np.int32)
