"""A gRPC stream that carries call after call, because opening one costs several times what a small call does.

Measured on loopback: a kilobyte there and back takes 0.9 ms on a stream of its own, 0.14 ms on one that is open. An
empty message ends a call, in either direction, and leaves the line open for the next; a frame is never empty. Whoever
closes instead has sent its last call. A call that fails or is given up takes its line with it.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any

from peer.errors import PeerUnreachable, RemoteError
from peer.grpc_status import StatusWitness, grpc
from peer.transport import Frame, PeerId

END_OF_CALL = b""
_EOF = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]: its stubs forget it
CALL_LIMIT_KEY = "swarmoe-call-limit-ms"
"""Metadata of a line: how long its caller grants each of its calls."""


class CallerLine:
    """The caller's end. One call at a time."""

    def __init__(self, rpc: Any, *, peer_id: PeerId, method: str, call_limit_s: float) -> None:
        self.call_limit_s = call_limit_s
        self.is_late = False
        self._peer_id = peer_id
        self._method = method
        self._rpc = rpc
        self._witness = StatusWitness(rpc)
        self._num_calls = 0

    @property
    def is_open(self) -> bool:
        return not self._rpc.done()

    def expire(self) -> None:
        """The call's deadline is over."""
        self.is_late = True
        self._rpc.cancel()

    def cut(self) -> None:
        self._rpc.cancel()

    async def send(self, frames: AsyncIterable[Frame]) -> None:
        """Say one call. What `frames` raises cuts the line and is raised."""
        try:
            async for frame in frames:
                await self._rpc.write(frame)
            await self._rpc.write(END_OF_CALL)
        except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            return  # the line is cut; whoever reads learns why
        except Exception:
            self._rpc.cancel()
            raise

    async def replies(self) -> AsyncIterator[Frame]:
        """What is answered to one call. AioRpcError when the line broke, CancelledError when it was cut."""
        num_read = 0
        while message := await self._rpc.read():
            num_read += 1
            yield message
        if message is _EOF and num_read == 0 and self._num_calls > 0:
            raise PeerUnreachable("the peer closed", peer_id=self._peer_id, method=self._method)
        self._num_calls += 1

    async def error(self) -> RemoteError | None:
        """What to raise after an AioRpcError; None when the peer had said everything and closed."""
        return await self._witness.error(peer_id=self._peer_id, method=self._method)


class ServerLine:
    """The server's end: hands out the frames of one call after the other."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._first: Frame | None = None
        self.is_at_end = False
        """Has the caller ended its call, and may it make another?"""

    async def next_call(self) -> bool:
        """Wait until another call begins; False when none will."""
        message = await self._context.read()
        if message is _EOF:
            return False
        self._first, self.is_at_end = message, False
        return True

    async def frames(self) -> AsyncIterator[Frame]:
        """Of the present call."""
        message = self._first if self._first is not None else await self._context.read()
        self._first = None
        while message:
            yield message
            message = await self._context.read()
        self.is_at_end = message is not _EOF


def call_limit_s(context: Any, metadata: Mapping[str, str | bytes]) -> float | None:
    """What the caller grants each call of a line; None when it does not say."""
    said = metadata.get(CALL_LIMIT_KEY)
    if isinstance(said, str) and said.isascii() and said.isdigit() and len(said) < 10:
        return int(said) / 1000
    return context.time_remaining()
