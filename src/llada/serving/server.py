"""The HTTP server of `llada chat --serve`.

Requests are read and answered on one event loop (`app`), on the main thread; the model runs on the thread of `queue`.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable

import uvicorn

from llada.errors import UserError
from llada.inference.chat import Chat, Options
from llada.serving.app import make_app
from llada.serving.queue import CAPACITY, Queue

_SHUTDOWN_SECONDS = 3


def serve(
    chat: Chat,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str = "llada",
    defaults: Options = Options(),  # noqa: B008, immutable
    ready: Callable[[str], None] = lambda url: None,
    capacity: int = CAPACITY,
) -> None:
    """Serve until SIGINT or SIGTERM; call `ready` with the page's address once a first reply has been compiled.

    `defaults` holds what requests leave open; port 0 is any free one. UserError for an address that cannot be used, and
    for defaults that the model cannot do.
    """
    with _listen(host, port) as listener:
        _warm_up(chat, defaults)
        address = f"[{host}]" if ":" in host else host
        queue = Queue(chat, capacity)
        app = make_app(chat, queue, model_name, defaults, host)
        Server(app, queue, lambda: ready(f"http://{address}:{listener.getsockname()[1]}/")).run([listener])
        if not queue.close():
            # It compiles, which nothing can interrupt; Python's own end would be a crash of that thread.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


class Server(uvicorn.Server):
    """uvicorn, ending as a command should: no stream outlasts a signal, and the signal is not sent again at the end."""

    def __init__(self, app: Callable, queue: Queue, ready: Callable[[], None] = lambda: None):
        """Serve `app`, whose jobs go to `queue`; `ready` is called when connections are taken."""
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            )
        )
        self._queue, self._ready = queue, ready

    def run(self, sockets=None) -> None:
        """Serve until a signal or `should_exit`. The queue's thread ends after its present step."""
        self._queue.start()
        try:
            super().run(sockets)
        finally:
            self._queue.close(patience=0)

    def handle_exit(self, sig, frame) -> None:
        """A second signal does not wait for connections to close."""
        self.force_exit, self.should_exit = self.should_exit, True

    async def startup(self, sockets=None) -> None:
        """Also say so."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets=None) -> None:
        """Fail what waits first: the connections of those clients then close by themselves."""
        self._queue.close(patience=0)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--serve={port}: cannot listen on {host} port {port}: {reason}; give another port") from error


def _warm_up(chat: Chat, defaults: Options) -> None:
    """Compile what a first short question needs, watched as all replies here are."""
    question = [{"role": "user", "content": "Hello"}]
    with contextlib.suppress(_Compiled):
        chat.reply([question], [defaults], _stop_at_once)


class _Compiled(Exception):
    pass


def _stop_at_once(*_: object) -> None:
    raise _Compiled
