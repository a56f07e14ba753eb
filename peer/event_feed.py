"""One publisher, many listeners, each with a short queue: server-sent events without a slow reader slowing anybody.

A listener that falls behind is dropped, not waited for: its browser reconnects and is greeted with the whole picture.
Belongs to one event loop. Knows nothing of what the messages say.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import structlog

log = structlog.get_logger(__name__)

MAX_LISTENERS = 64
MAX_WAITING = 16
BEAT_EVERY_S = 8.0
"""A named event and not a comment: a page cannot see comments, and must notice a coordinator that hangs."""


class FeedFull(Exception):
    """There are MAX_LISTENERS already."""


class EventFeed:
    """What was published since a listener came, in order, after a greeting."""

    def __init__(self, greeting: Callable[[], bytes]) -> None:
        self._greeting = greeting
        self._listeners: set[Listener] = set()
        self._closed = False

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def publish(self, message: bytes) -> None:
        """Queue one message, made by `event_bytes`, for everybody. Never waits."""
        for listener in list(self._listeners):
            listener.offer(message)

    def listen(self) -> "Listener":
        """A new listener, whose first message is the greeting. Raises FeedFull."""
        if len(self._listeners) >= MAX_LISTENERS:
            raise FeedFull
        listener = Listener(self._listeners.discard)
        if self._closed:
            listener.end()
        else:
            self._listeners.add(listener)
            listener.offer(self._greeting())
        return listener

    def close(self) -> None:
        """End every listener's messages. Idempotent."""
        self._closed = True
        for listener in list(self._listeners):
            listener.end()


class Listener:
    """One reader's queue."""

    def __init__(self, forget: Callable[["Listener"], None]) -> None:
        self._forget = forget
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_WAITING)

    def offer(self, message: bytes) -> None:
        """Take one more message, or give up on a reader that has MAX_WAITING unread ones."""
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("feed.listener_dropped", waiting=MAX_WAITING)
            self.end()

    def end(self) -> None:
        """Leave the feed; what is still unread is dropped. Idempotent."""
        self._forget(self)
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)

    async def messages(self, *, beat_every_s: float = BEAT_EVERY_S) -> AsyncIterator[bytes]:
        """Messages as they come, a beat when none came for a while; ends when the listener is."""
        while True:
            try:
                async with asyncio.timeout(beat_every_s):
                    message = await self._waiting.get()
            except TimeoutError:
                message = BEAT
            if message is None:
                return
            yield message


def event_bytes(name: str, data: str) -> bytes:
    """One server-sent event."""
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {name}\n{lines}\n".encode()


BEAT = event_bytes("beat", "")
