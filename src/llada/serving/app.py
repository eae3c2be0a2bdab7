"""The endpoints: chat completions as OpenAI's, and the page that talks to them.

By default only this machine reaches them, and of its browsers' pages only our own: see `_Guard`.
"""

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llada.errors import UserError
from llada.inference.chat import Chat, Options
from llada.serving import page, protocol
from llada.serving.protocol import ApiError
from llada.serving.queue import Queue
from llada.serving.replies import Replies

MOST_BYTES = 1 << 20  # of a request's body
_BODY_SECONDS = 30.0  # for a client to send it


def make_app(chat: Chat, queue: Queue, model_name: str, defaults: Options, host: str = "127.0.0.1") -> ASGIApp:
    """The application, for a queue that somebody starts."""
    api = _Api(chat, queue, model_name, defaults)
    html, policy = page.page()

    async def index(request: Request) -> Response:
        return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-store"})

    routes = [
        Route("/", index),
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.completions, methods=["POST"]),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _our_error}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), host)  # type: ignore[arg-type]


async def _api_error(request: Request, error: ApiError) -> Response:
    return _json(error.body, error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    reason = f"{request.method} {request.url.path[:200]}: {error.detail}"
    if error.status_code in (404, 405):
        reason += "; there are POST /v1/chat/completions, GET /v1/models, GET /health and the page at /"
    return _json(ApiError(reason, status=error.status_code).body, error.status_code, dict(error.headers or {}))


async def _our_error(request: Request, error: Exception) -> Response:
    """What is no mistake of the client's; uvicorn logs its traceback here, and nothing of it goes out."""
    return _json(ApiError("the server failed; its log says why", status=500).body, 500)


def _json(value: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(protocol.encoded(value), status, headers, media_type="application/json")


class _Guard:
    """Refuses what a page of somebody else's, open in a browser on this machine, could send here.

    Its scripts may post to 127.0.0.1, so Origin must be ours where there is one. By DNS rebinding its own name may come
    to mean 127.0.0.1, so Host must be a name of this machine, unless the server was told to listen to others.
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app = app
        self._names = {"localhost", "127.0.0.1", "::1", host} if _is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            await _json(refusal.body, refusal.status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
            if self._names is None or name in self._names:
                if origin is None or origin == f"http://{host}":
                    return None
                return ApiError("requests of other sites' pages are refused", status=403, code="origin")
        return ApiError(
            "this server is for its own machine: open it as localhost or 127.0.0.1", status=403, code="host"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Api:
    """The endpoints."""

    def __init__(self, chat: Chat, queue: Queue, model_name: str, defaults: Options):
        self._chat, self._queue, self._name, self._defaults = chat, queue, model_name, defaults
        self._started, self._requests = int(time.time()), 0
        config = chat.run.config
        self._facts = {
            "family": config.objective.name,
            "context": config.model.max_length,
            "defaults": defaults._asdict(),
        }

    async def health(self, request: Request) -> Response:
        """Whether replies are being written, and how many wait."""
        alive = self._queue.alive
        return _json({"status": "ok" if alive else "stopped", **self._queue.counts}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        """The one model, with what the page wants to know."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same by its name."""
        if request.path_params["name"] != self._name:
            raise ApiError(f"there is no such model here; this server has {self._name!r}", "model", 404)
        return _json(self._model())

    def _model(self) -> dict:
        head = {"id": self._name, "object": "model", "created": self._started, "owned_by": "llada"}
        return head | {"llada": self._facts}

    async def completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        content = await _body(request)
        # Without a seed no two requests are alike; --seed begins their count.
        seed = (self._defaults.seed + self._requests) % (1 << 31)
        asked = protocol.read_request(content, self._name, self._defaults, seed)
        try:
            for options in {asked.options[0], asked.options[-1]}:
                await asyncio.to_thread(self._chat.check, asked.messages, options)
        except UserError as error:
            raise protocol.of_user_error(error) from error
        self._requests += 1
        replies = Replies(self._queue, asked, self._name, self._chat.run.tokenizer)
        if asked.stream:
            return _EventStream(replies.events(), replies.cancel)
        try:
            whole = await _unless_gone(request, replies.whole())
        finally:
            replies.cancel()
        return Response(status_code=499) if whole is None else _json(whole)


async def _body(request: Request) -> bytes:
    """The body of a request. ApiError for what is no JSON by its type, is too large, or does not come."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("content-type must be application/json", status=415)
    too_large = ApiError(f"the body has more than {MOST_BYTES:,} bytes", status=413)
    if (length := request.headers.get("content-length", "0")).isdigit() and int(length) > MOST_BYTES:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(f"the body took more than {_BODY_SECONDS:.0f} seconds to come", status=408) from None
    except ClientDisconnect:
        raise ApiError("the client has gone", status=400) from None
    return bytes(content)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, dict]) -> dict | None:
    """What `work` returns; None, and its end, where the client goes away before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called however they end."""

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()
