"""A transport behind emulated links: the same promises, later and narrower. For any `Transport`; needs no root.

Each process limits itself. What it sends goes through its uplink, what it receives through its downlink, calls that it
makes and calls that it answers alike, and first contact too. Latency is one way and paid by whoever receives: a round
trip grows by the latency of the caller and by that of the peer. Bandwidth counts message bytes; those of TLS, HTTP/2
and TCP come on top. An answer may be lost, by chance, at the caller, which then waits for its deadline.

A sender gets its turn when the link is free, so nothing piles up in front of it; behind it, at most `_WINDOW` frames
of a stream are under way, as in a TCP window. What the arithmetic is stands in `links`.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing, suppress

from peer.errors import DeadlineExceeded, RemoteError
from peer.links import Link, Stream, uniform
from peer.settings import LinkSettings
from peer.transport import CallContext, Endpoint, Frame, Method, Server, Servicer, Transport
from protos.swarm_pb2 import InfoReply, InfoRequest

_WINDOW = 32


def emulate(inner: Transport, settings: LinkSettings, *, seed: int, answer_loss: float = 0.0) -> Transport:
    """`inner` behind the links of these settings; `inner` itself when nothing is to be emulated."""
    if not (settings.is_emulated or answer_loss):
        return inner
    bits_per_s = None if settings.bandwidth_mbit is None else settings.bandwidth_mbit * 1e6
    delay = uniform(settings.latency_ms / 1e3, settings.jitter_ms / 1e3)
    return EmulatedTransport(
        inner,
        up=Link(bits_per_s=bits_per_s),
        down=Link(bits_per_s=bits_per_s, delay=delay, rng=random.Random(f"delays {seed}")),
        answer_loss=answer_loss,
        rng=random.Random(f"losses {seed}"),
    )


class EmulatedTransport:
    """One process's `Transport`. The links may be replaced while calls are running; it counts for the next ones."""

    def __init__(
        self,
        inner: Transport,
        *,
        up: Link | None = None,
        down: Link | None = None,
        answer_loss: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        self.up = up or Link()
        self.down = down or Link()
        self._inner = inner
        self._answer_loss = answer_loss
        self._rng = rng or random.Random(0)

    @property
    def certificate_der(self) -> bytes:
        return self._inner.certificate_der

    async def info(self, address: str, request: InfoRequest, *, timeout_s: float) -> tuple[InfoReply, bytes]:
        """See `Transport`."""
        down = self.down.stream()
        try:
            async with asyncio.timeout(timeout_s):
                await _send(self.up.stream(), request.ByteSize())
                reply, certificate_der = await self._inner.info(address, request, timeout_s=timeout_s)
                await _until(await _send(down, reply.ByteSize()) + down.latency_s)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s", peer_id=address, method="Info") from None
        return reply, certificate_der

    async def call(
        self, endpoint: Endpoint, method: Method, frames: AsyncIterable[Frame], *, timeout_s: float
    ) -> AsyncGenerator[Frame]:
        """See `Transport`."""
        if timeout_s <= 0:
            raise DeadlineExceeded("no time left", peer_id=endpoint.peer_id, method=method.value)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        is_lost = method is not Method.PROBE and self._rng.random() < self._answer_loss
        sent = _sending(frames, self.up.stream())
        async with (
            aclosing(self._inner.call(endpoint, method, sent, timeout_s=timeout_s)) as replies,
            aclosing(_arriving(replies, self.down.stream())) as arriving,
        ):
            try:
                if is_lost:
                    await _lose(arriving, deadline_s)
                while (frame := await _next(arriving, deadline_s)) is not None:
                    yield frame
            except TimeoutError:
                message = f"no answer within {timeout_s:g} s"
                raise DeadlineExceeded(message, peer_id=endpoint.peer_id, method=method.value) from None

    async def serve(self, servicer: Servicer, listen: str) -> Server:
        """See `Transport`."""
        return await self._inner.serve(_EmulatedServicer(servicer, self), listen)

    async def close(self) -> None:
        """See `Transport`."""
        await self._inner.close()


class _EmulatedServicer:
    """A servicer whose calls come in and whose answers go out through the links of its process."""

    def __init__(self, inner: Servicer, links: EmulatedTransport) -> None:
        self._inner = inner
        self._links = links

    async def info(self, request: InfoRequest) -> InfoReply:
        down = self._links.down.stream()
        await _until(await _send(down, request.ByteSize()) + down.latency_s)
        reply = await self._inner.info(request)
        await _send(self._links.up.stream(), reply.ByteSize())
        return reply

    def forward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._answer(self._inner.forward, frames, context)

    def backward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._answer(self._inner.backward, frames, context)

    def probe(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._answer(self._inner.probe, frames, context)

    async def _answer(
        self,
        answer: Callable[[AsyncIterator[Frame], CallContext], AsyncIterator[Frame]],
        frames: AsyncIterator[Frame],
        context: CallContext,
    ) -> AsyncGenerator[Frame]:
        async with aclosing(_arriving(frames, self._links.down.stream())) as received:
            replies = answer(received, context)
            try:
                async for frame in _sending(replies, self._links.up.stream()):
                    yield frame
            finally:
                if isinstance(replies, AsyncGenerator):
                    await replies.aclose()


async def _sending(frames: AsyncIterable[Frame], stream: Stream) -> AsyncGenerator[Frame]:
    """Frames as they leave: the next is asked for when the one before has gone."""
    async for frame in frames:
        await _send(stream, len(frame))
        yield frame


async def _arriving(frames: AsyncIterable[Frame], stream: Stream) -> AsyncGenerator[Frame]:
    """Frames as they arrive, and at last the ending of `frames`, whichever it was, as late as a frame would be."""
    arrivals: asyncio.Queue[tuple[Frame | None, float]] = asyncio.Queue()
    room = asyncio.Semaphore(_WINDOW)
    receiver = asyncio.create_task(_receive(frames, stream, arrivals, room))  # ours: ended and awaited below
    try:
        while True:
            frame, arrives_s = await arrivals.get()
            await _until(arrives_s)
            if frame is None:
                break
            room.release()
            yield frame
        await receiver
    finally:
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)


async def _receive(
    frames: AsyncIterable[Frame],
    stream: Stream,
    arrivals: asyncio.Queue[tuple[Frame | None, float]],
    room: asyncio.Semaphore,
) -> None:
    try:
        async for frame in frames:
            await room.acquire()
            arrivals.put_nowait((frame, await _send(stream, len(frame)) + stream.latency_s))
    finally:
        arrivals.put_nowait((None, asyncio.get_running_loop().time() + stream.latency_s))


async def _send(stream: Stream, size_bytes: int) -> float:
    """Wait until a message has gone; when that was, by the link's reckoning."""
    now_s = asyncio.get_running_loop().time
    gone_s = now_s()
    for piece_bytes in stream.pieces(size_bytes):
        gone_s = stream.send(piece_bytes, now_s=now_s())
        await _until(gone_s)
    return gone_s


async def _next(arriving: AsyncGenerator[Frame], deadline_s: float) -> Frame | None:
    """None at the end; TimeoutError at the deadline."""
    async with asyncio.timeout_at(deadline_s):
        return await anext(arriving, None)


async def _lose(arriving: AsyncGenerator[Frame], deadline_s: float) -> None:
    """Let the peer do its work, and hear nothing of it: TimeoutError at the deadline."""
    async with asyncio.timeout_at(deadline_s):
        with suppress(RemoteError):
            async for _ in arriving:
                pass
        await asyncio.Event().wait()


async def _until(time_s: float) -> None:
    delay_s = time_s - asyncio.get_running_loop().time()
    if delay_s > 0:
        await asyncio.sleep(delay_s)
