"""The replies to one request while they are written: all at once, or as events."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np

from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.inference.canvas import until_end
from llada.inference.chat import Reply
from llada.serving import protocol
from llada.serving.protocol import ApiError, Asked
from llada.serving.queue import Closed, Full, Job, Queue
from llada.serving.text_stream import TextStream

_HEARTBEAT_SECONDS = 15.0  # of a stream that has nothing to say: proxies close silent connections
_RETRY_SECONDS = 2


class Replies:
    """The n replies to a request, queued; used on the event loop that made it."""

    def __init__(self, queue: Queue, asked: Asked, model_name: str, tokenizer: Tokenizer):
        """Queue a job for each. ApiError where there is no room."""
        self._tokenizer, self._queue, self._asked = tokenizer, queue, asked
        self._heading = protocol.Heading(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model_name)
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._news.set)

        self._jobs = [Job(asked.messages, options, wake, asked.stream) for options in asked.options]
        self._texts = [TextStream(tokenizer, asked.stops) for _ in self._jobs]
        self._ended = [False] * len(self._jobs)
        try:
            queue.submit(self._jobs)
        except (Full, Closed) as error:
            raise _failure(error) from None

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._queue.cancel(self._jobs)

    async def whole(self) -> dict:
        """All replies at once. ApiError where one fails."""
        while not all(job.done for job in self._jobs):
            await self._news.wait()
            self._news.clear()
        replies = [_reply(job) for job in self._jobs]
        for text, reply in zip(self._texts, replies, strict=True):
            text.grow(reply.ids, last=True)
        choices = [protocol.choice(i, text.text, self._finish_reason(i)) for i, text in enumerate(self._texts)]
        figures = protocol.figures(replies, self._asked.options)
        return self._heading.completion(choices, protocol.usage(replies), figures)

    async def events(self) -> AsyncIterator[bytes]:
        """The same as server-sent events, as they come."""
        more = {"usage": None} if self._asked.include_usage else {}
        try:
            for i in range(len(self._jobs)):
                first = protocol.delta(i, {"role": "assistant", "content": ""})
                yield _event(self._heading.chunk([first], **more))
            left = list(range(len(self._jobs)))
            while left:
                try:
                    await asyncio.wait_for(self._news.wait(), _HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield b": waiting\n\n"
                self._news.clear()
                for i in left:
                    for chunk in self._news_of(i):
                        yield _event(chunk | more)
                left = [i for i in left if not self._ended[i]]
            if more:
                used = protocol.usage([_reply(job) for job in self._jobs])
                yield _event(self._heading.chunk([], usage=used))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _news_of(self, i: int) -> Iterator[dict]:
        """What has happened to choice i since the last look."""
        job, text = self._jobs[i], self._texts[i]
        done = job.done  # before the frames are taken: none is left behind
        frames = [job.frames.popleft() for _ in range(len(job.frames))]
        for frame in frames if self._asked.canvas else frames[-1:]:
            final = int(np.argmax(np.append(frame.step_A < 0, True)))  # what is written up to here stays
            added = text.grow(until_end(frame.ids_A[:final].tolist(), self._tokenizer.special.ends, 0))
            canvas = {"canvas": protocol.canvas(i, frame, self._tokenizer)} if self._asked.canvas else {}
            if added or canvas:
                yield self._heading.chunk([protocol.delta(i, {"content": added} if added else {})], **canvas)
        if done:
            reply = _reply(job)
            if added := text.grow(reply.ids, last=True):
                yield self._heading.chunk([protocol.delta(i, {"content": added})])
            figures = protocol.figures([reply], [self._asked.options[i]])
            yield self._heading.chunk([protocol.delta(i, {}, self._finish_reason(i))], llada=figures)
            self._ended[i] = True

    def _finish_reason(self, i: int) -> str:
        return "stop" if self._texts[i].stopped else _reply(self._jobs[i]).finish_reason


def _reply(job: Job) -> Reply:
    """The job's reply. ApiError where there is none."""
    if job.reply is None:
        raise _failure(job.error)
    return job.reply


def _failure(error: Exception | None) -> ApiError:
    """What a client is told about a job that failed."""
    if isinstance(error, UserError):
        return protocol.of_user_error(error)
    if isinstance(error, Closed):
        return ApiError("the server is shutting down", status=503, code="shutting_down")
    if isinstance(error, Full):
        headers = {"retry-after": str(_RETRY_SECONDS)}
        return ApiError("the queue is full; try again", status=503, code="queue_full", headers=headers)
    return ApiError("the server failed; its log says why", status=500)


def _event(value: dict) -> bytes:
    return b"data: " + protocol.encoded(value) + b"\n\n"
