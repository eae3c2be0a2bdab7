"""Signals that ask a run to stop: received by any of its processes, known to all of them at the same step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada import processes, signals
from llada.errors import Interrupted


class Stop:
    """`number` is the signal to stop for, or 0; the same on all processes whenever they look at the same step.

    A single process takes the signal that it received. Of several, each step is followed by the maximum over all
    devices of what their processes received; like the step's metrics it is read one step later, without a wait.
    """

    def __init__(self, received: list[int], mesh: jax.sharding.Mesh):
        self._received = received
        self._alone = processes.count() == 1
        self._agreed = 0
        self._posted: jax.Array | None = None
        self._sharding = mesh_lib.sharding(mesh, "devices")
        self._devices = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=mesh_lib.sharding(mesh, "replicated"))

    @property
    def number(self) -> int:
        """The first signal received by any process, or 0."""
        return (self._received or [0])[0] if self._alone else self._agreed

    def post(self) -> None:
        """Start agreeing on what was received; all processes call it after dispatching the same step.

        From the first on, a signal has something to save.
        """
        signals.set_final(frozenset())
        if not self._alone:
            mine = np.full(1, (self._received or [0])[0], np.int32)
            with jax.transfer_guard("allow"):  # JAX takes it for a transfer that nobody asked for
                everyone = jax.make_array_from_callback((self._devices,), self._sharding, lambda index: mine)
            self._posted = self._largest(everyone)

    def collect(self) -> None:
        """Take in what was posted last; all processes call it at the same point of the run."""
        if self._posted is not None:
            self._agreed = self._agreed or int(jax.device_get(self._posted))
            self._posted = None


class Received(list[int]):
    """The numbers of signals received; `answer` is what is printed at the first one."""

    answer = "stopping"

    def check(self) -> None:
        """Called between pieces of work before the first step: Interrupted if a signal has come."""
        if self:
            raise Interrupted(self[0], "while preparing")


@contextlib.contextmanager
def stop_signals() -> Iterator[Received]:
    """Yield a list that receives the number of the first SIGINT, SIGTERM or SIGHUP (unless that is ignored: nohup).

    A Ctrl-C after it ends the process as usual: someone is waiting. A further SIGTERM does nothing: schedulers send it
    twice, and have SIGKILL for those that take too long. Before the first step has been dispatched (`Stop.post`)
    nothing is lost by ending within seconds, also out of a compilation.
    """
    received = Received()
    previous: dict[signal.Signals, Any] = {}

    @signals.stopping
    def handler(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            with contextlib.suppress(OSError, ValueError):  # with SIGHUP the terminal has gone
                sys.stderr.write(f"\n{received.answer}; Ctrl-C to stop at once\n")
                sys.stderr.flush()

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield received
        return
    signals.set_final(frozenset(signals.STOPPING))
    for number in signals.STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
        signals.set_final(frozenset() if received else None)
