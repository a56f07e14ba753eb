"""What a process shows about itself over HTTP: state, metrics, health, a live feed, and the files of a page.

Read-only, without cookies or CORS. Refuses to know what a swarm is: it serves what it is given. Belongs to one loop.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peer.errors import CouldNotListen
from peer.event_feed import EventFeed, FeedFull, Listener

MAX_CONNECTIONS = 128
STALLED_CLIENT_MS = 20_000
CLOSE_WITHIN_S = 2.0
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Health:
    """Whether this process does its job, and in a few words how or why not."""

    ok: bool
    detail: str


@dataclass(frozen=True)
class StaticFile:
    """One file of a page."""

    content: bytes
    media_type: str


@dataclass(frozen=True)
class HttpContent:
    """What to answer. The functions run on the event loop for every request and must not block."""

    state_json: Callable[[], str]
    health: Callable[[], Health]
    registry: CollectorRegistry
    feed: EventFeed
    files: Mapping[str, StaticFile] = field(default_factory=dict[str, StaticFile])
    """By path, `/` included; empty for a process without a page."""


def http_app(content: HttpContent, *, allowed_hosts: tuple[str, ...] = ("*",)) -> Starlette:
    """`/api/state`, `/metrics`, `/healthz`, `/events` and the given files."""

    async def state(_: Request) -> Response:
        return Response(content.state_json(), media_type="application/json")

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(content.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: Request) -> Response:
        health = content.health()
        status = "ok" if health.ok else "failing"
        return JSONResponse({"status": status, "detail": health.detail}, status_code=200 if health.ok else 503)

    async def events(_: Request) -> Response:
        try:
            return EventStreamResponse(content.feed.listen())
        except FeedFull:
            return PlainTextResponse("too many listeners", status_code=503)

    async def file(request: Request) -> Response:
        found = content.files[request.url.path]
        return Response(found.content, media_type=found.media_type)

    routes = [
        Route("/api/state", state),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/events", events),
        *(Route(path, file) for path in content.files),
    ]
    middleware = [
        Middleware(SecurityHeaders),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False),
    ]
    return Starlette(routes=routes, middleware=middleware)


class SecurityHeaders:
    """Puts SECURITY_HEADERS on every response, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class EventStreamResponse(Response):
    """A listener's messages until the listener is ended or the client leaves, also in the middle of a write.

    A client that stops reading holds up nobody: the feed drops it, and the kernel its connection (STALLED_CLIENT_MS).
    """

    media_type = "text/event-stream"

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                either = {group.create_task(self._write(send)), group.create_task(_disconnected(receive))}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                for task in either:
                    task.cancel()
        finally:
            self._listener.end()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for message in self._listener.messages():
            await send({"type": "http.response.body", "body": message, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class HttpServer:
    """`http_app` listening in this process, on the loop that called `start`, until `close`."""

    def __init__(self, content: HttpContent, listening: socket.socket) -> None:
        """Takes the bound socket over. Use `start`."""
        host, port = listening.getsockname()[:2]
        self.address: str = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """HOST:PORT actually bound."""
        self._feed = content.feed
        self._uvicorn = _SignalFreeServer(
            uvicorn.Config(
                http_app(content, allowed_hosts=allowed_hosts(host)),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[listening]), name="http")

    @classmethod
    async def start(cls, content: HttpContent, listen: str) -> Self:
        """Serve on HOST:PORT (port 0: any). Raises CouldNotListen."""
        return cls(content, await _bound_socket(listen))

    async def close(self) -> None:
        """End the live feeds, let running requests finish, cut what is left. Within CLOSE_WITHIN_S. Idempotent."""
        self._feed.close()
        self._uvicorn.should_exit = True
        await asyncio.wait([self._serving], timeout=CLOSE_WITHIN_S / 2)
        for connection in list(self._uvicorn.server_state.connections):
            connection.transport.abort()
        async with asyncio.timeout(CLOSE_WITHIN_S / 2):
            await self._serving

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _SignalFreeServer(uvicorn.Server):
    """uvicorn's, without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def allowed_hosts(bound_host: str) -> tuple[str, ...]:
    """Names a request may ask for: a loopback listener answers to loopback names only.

    Otherwise any web page could read it by pointing a name of its own at 127.0.0.1 (DNS rebinding).
    """
    return LOOPBACK_HOSTS if ipaddress.ip_address(bound_host).is_loopback else ("*",)


async def _bound_socket(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, address = found[0]
        listening = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise CouldNotListen(
            f"cannot serve HTTP on {listen}: {error.strerror}; free it or give another --http"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_CLIENT_MS)
    return listening
