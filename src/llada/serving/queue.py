"""Replies wanted by many clients, written by one thread: a bounded queue, in which what can share a batch does.

The model runs on one thread, since a second reply at the same time would only make both slower. While a batch runs
others wait; the next batch is the one that has waited longest, with all the others that agree with its options. What a
client gets does not depend on who shares its batch: that is a promise of `inference/generation.py`.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llada.errors import UserError
from llada.inference.chat import Chat, Options, Reply
from llada.inference.generation import BATCH

CAPACITY = 64  # replies that may wait
_FRAMES = 64  # steps that a slow reader may be behind

_log = logging.getLogger(__name__)


class Full(Exception):
    """No room for another reply in the queue."""


class Closed(Exception):
    """The server is shutting down, or the client has gone."""


class Frame(NamedTuple):
    """An answer after `step`: its ids, and at which step each was written, -1 where that is still to come."""

    ids_A: np.ndarray
    step_A: np.ndarray
    step: int


class Job:
    """A reply that is wanted. `wake` is called, on the model's thread, whenever there is something new to see here.

    frames   the steps since they were last taken: of a reader who is slow, the newest only
    reply    None until it is there
    error    why there will be no reply: Closed, a UserError, or a bug of ours
    """

    def __init__(self, messages: list[dict], options: Options, wake: Callable[[], None], watched: bool = False):
        """A reply to `messages`; `watched`: there shall be frames."""
        self.messages, self.options, self._wake, self.watched = messages, options, wake, watched
        self.frames: deque[Frame] = deque(maxlen=_FRAMES)
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.cancelled = False

    @property
    def done(self) -> bool:
        """There is a reply, or an error."""
        return self.reply is not None or self.error is not None

    def show(self, frame: Frame) -> None:
        """Take a step of the reply."""
        self.frames.append(frame)
        self._wake()

    def finish(self, reply: Reply | None, error: Exception | None = None) -> None:
        """Take the reply, or the reason why there is none."""
        self.reply, self.error = reply, error
        self._wake()


class Queue:
    """Jobs waiting for the model, and the thread that runs it: `start`, then `submit` and `cancel`, then `close`."""

    def __init__(self, chat: Chat, capacity: int = CAPACITY):
        """Nothing runs before `start`; `capacity` is how many jobs may wait."""
        self._chat, self._capacity = chat, capacity
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs wait and run."""
        return {"waiting": len(self._waiting), "running": len(self._running)}

    @property
    def alive(self) -> bool:
        """Jobs are being taken."""
        return self._thread.is_alive() and not self._closed

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of `jobs`, or none: Full where there is no room, Closed after `close`."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) + len(jobs) > self._capacity:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for `jobs` any more: queued ones go, running ones are not waited for if they are alone."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                with contextlib.suppress(ValueError):
                    self._waiting.remove(job)

    def close(self, patience: float = 2.0) -> bool:
        """Refuse new jobs, fail the others with Closed; whether the thread has ended within `patience` seconds."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            job.cancelled = True
            if not job.done:
                job.finish(None, Closed())
        if self._thread.ident is not None:
            self._thread.join(patience)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                replies = self._chat.reply([job.messages for job in batch], [job.options for job in batch], self._show)
                for job, reply in zip(batch, replies, strict=True):
                    job.finish(reply)
            except Closed:
                pass  # nobody waits for any of them
            except Exception as error:  # a client's trouble ends with its batch; the thread serves the next one
                if not isinstance(error, UserError):
                    _log.exception("a batch of %d replies failed", len(batch))
                for job in batch:
                    job.finish(None, error)

    def _show(self, index: int, tokens_A: np.ndarray, step_A: np.ndarray, step: int) -> None:
        """Between two steps: hand the canvas on, or end a batch that nobody waits for."""
        if all(job.cancelled for job in self._running):
            raise Closed
        job = self._running[index]
        if job.watched:
            job.show(Frame(np.array(tokens_A), np.array(step_A), step))

    def _next_batch(self) -> list[Job]:
        """The jobs that run next; waits until there are any. None at all after `close`."""
        with self._changed:
            self._running = []
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            wanted = _shared(self._waiting[0])
            self._running = [job for job in self._waiting if _shared(job) == wanted][:BATCH]
            chosen = set(map(id, self._running))
            self._waiting = deque(job for job in self._waiting if id(job) not in chosen)
            return self._running


def _shared(job: Job) -> Options:
    """What jobs of one batch agree in: all options but the seed."""
    return job.options._replace(seed=0)
