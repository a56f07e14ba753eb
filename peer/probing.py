"""The probe, both ends: how fast bytes go to another member and come back. Carries noise; knows no experts.

A `ProbeHeader`, then chunks up; as many bytes as the header asked for down, then `CallEnd`. The answering side bounds
both, and how long and how many at once: a probe is worth little to a stranger.
"""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from peer.errors import DeadlineExceeded, MalformedMessage, MalformedReply
from peer.framing import chunk_frame, parse_frame
from peer.rates import MeasuredLink
from peer.transport import CHUNK_BYTES, CallContext, CallRefused, Endpoint, Frame, Method, Refusal, Transport
from protos import swarm_pb2 as pb

MAX_PROBE_BYTES = 8 << 20
"""Each way. A gigabit link takes 70 ms for them."""
MAX_PROBE_S = 10.0
"""Who has not sent all by then is cut off, and who has not read all no longer counts as running."""
MAX_PROBES_AT_ONCE = 4
MEASURE_WITHIN_S = 2.0

_LATENCY_S = 0.1
_LATENCY_TRIES = 8
_FIRST_BYTES = 8 << 10
"""0.6 s at 0.1 Mbit/s: the slowest link that is measured."""
_LONG_ENOUGH_S = 0.1
_AIM_S = 0.2
_MOST_GROWTH = 32
_LEAST_CARRYING = 0.1
"""Of a probe's time at least this share was spent on its bytes, however the latency was that day."""
_NOISE = os.urandom(CHUNK_BYTES)  # some links compress


class ProbeAnswerer:
    """The answering side. One per process; belongs to the event loop."""

    def __init__(self) -> None:
        self._started_s: list[float] = []
        """Of those that run."""

    async def answer(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        """Take the caller's bytes and send what it asked for. Raises CallRefused."""
        now_s = asyncio.get_running_loop().time()
        num_running = sum(now_s - started_s < MAX_PROBE_S for started_s in self._started_s)
        if num_running >= MAX_PROBES_AT_ONCE:
            raise CallRefused(Refusal.OVERLOADED, f"{num_running} probes are running already; try later")
        self._started_s.append(now_s)
        try:
            async with asyncio.timeout(MAX_PROBE_S):
                reply_bytes = await _read_probe(frames)
            for frame in _chunks(reply_bytes):
                yield frame
            yield pb.ReplyFrame(end=pb.CallEnd()).SerializeToString()
        except MalformedMessage as error:
            raise CallRefused(Refusal.INVALID, str(error)) from None
        finally:
            self._started_s.remove(now_s)


async def measure_link(
    transport: Transport, endpoint: Endpoint, *, timeout_s: float = MEASURE_WITHIN_S
) -> MeasuredLink:
    """The way to this member: latency, then up, then down, each with as many bytes as take about 0.2 s.

    Half of what time there is after the latency goes to each direction; what a direction measured by then counts.
    Raises a RemoteError when there is no answer to the smallest probe.
    """
    way = _Way(transport, endpoint)
    end_s = asyncio.get_running_loop().time() + timeout_s
    await way.time(timeout_s=timeout_s)  # opens the connection
    latency_s = await way.latency_s(timeout_s=_left(end_s))
    up_bits_per_s = await _bits_per_s(
        lambda size_bytes, left_s: way.time(up_bytes=size_bytes, timeout_s=left_s),
        latency_s=latency_s,
        timeout_s=_left(end_s) / 2,
    )
    down_bits_per_s = await _bits_per_s(
        lambda size_bytes, left_s: way.time(down_bytes=size_bytes, timeout_s=left_s),
        latency_s=latency_s,
        timeout_s=_left(end_s),
    )
    return MeasuredLink(
        up_bits_per_s=round(up_bits_per_s),
        down_bits_per_s=round(down_bits_per_s),
        latency_ms=round(latency_s * 1e3, 2),
    )


class _Way:
    """To one member, and back."""

    def __init__(self, transport: Transport, endpoint: Endpoint) -> None:
        self._transport = transport
        self._endpoint = endpoint

    async def latency_s(self, *, timeout_s: float) -> float:
        """Of an empty probe, the fastest of a few: of fewer where each takes long."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + timeout_s
        enough_s = clock() + _LATENCY_S
        tries_s: list[float] = []
        while len(tries_s) < 2 or (len(tries_s) < _LATENCY_TRIES and clock() < enough_s):
            tries_s.append(await self.time(timeout_s=_left(end_s)))
        return min(tries_s)

    async def time(self, *, up_bytes: int = 0, down_bytes: int = 0, timeout_s: float) -> float:
        """Seconds from the first byte up to the last one down. Raises a RemoteError."""
        clock = asyncio.get_running_loop().time
        frames = _probe(up_bytes, down_bytes)
        started_s = clock()
        async with aclosing(self._transport.call(self._endpoint, Method.PROBE, frames, timeout_s=timeout_s)) as replies:
            try:
                await _read_reply(replies, down_bytes)
            except MalformedMessage as error:
                peer_id = self._endpoint.peer_id
                raise MalformedReply(str(error), peer_id=peer_id, method=Method.PROBE.value) from None
        return max(clock() - started_s, 1e-6)


async def _bits_per_s(probe: Callable[[int, float], Awaitable[float]], *, latency_s: float, timeout_s: float) -> float:
    """By larger and larger probes, until one takes long enough twice, is the largest, or time is up.

    Twice, because this process may have been busy with something else meanwhile; the faster one counts.
    """
    end_s = asyncio.get_running_loop().time() + timeout_s
    size_bytes, measured, was_long = _FIRST_BYTES, 0.0, False
    while True:
        try:
            elapsed_s = await probe(size_bytes, _left(end_s))
        except DeadlineExceeded:
            if not measured:
                raise
            return measured
        carrying_s = max(elapsed_s - latency_s, _LEAST_CARRYING * elapsed_s)
        measured = max(8 * size_bytes / carrying_s, measured if was_long else 0.0)
        is_long = carrying_s >= _LONG_ENOUGH_S
        if (is_long and was_long) or (not is_long and size_bytes == MAX_PROBE_BYTES):
            return measured
        was_long = is_long
        if not is_long:
            size_bytes = min(MAX_PROBE_BYTES, int(size_bytes * min(_MOST_GROWTH, _AIM_S / carrying_s)))


async def _probe(up_bytes: int, down_bytes: int) -> AsyncIterator[Frame]:
    yield pb.CallFrame(probe=pb.ProbeHeader(reply_bytes=down_bytes)).SerializeToString()
    for frame in _chunks(up_bytes):
        yield frame


def _chunks(size_bytes: int) -> list[Frame]:
    """Frames of noise: whole chunks are one object, however many there are."""
    num_whole, rest_bytes = divmod(size_bytes, CHUNK_BYTES)
    rest = [chunk_frame([memoryview(_NOISE)[:rest_bytes]])] if rest_bytes else []
    return [_WHOLE_CHUNK] * num_whole + rest


async def _read_probe(frames: AsyncIterator[Frame]) -> int:
    """How many bytes it asks for, once all it sends has come. Raises MalformedMessage or CallRefused."""
    header = parse_frame(await anext(frames, b""), pb.CallFrame)
    if not isinstance(header, pb.CallFrame) or not header.HasField("probe"):
        raise MalformedMessage("a probe starts with its header")
    reply_bytes = header.probe.reply_bytes
    if reply_bytes > MAX_PROBE_BYTES:
        raise CallRefused(Refusal.TOO_LARGE, f"a probe asks for at most {MAX_PROBE_BYTES} bytes")
    came_bytes = 0
    async for frame in frames:
        came_bytes += _chunk_bytes(parse_frame(frame, pb.CallFrame))
        if came_bytes > MAX_PROBE_BYTES:
            raise CallRefused(Refusal.TOO_LARGE, f"a probe carries at most {MAX_PROBE_BYTES} bytes")
    return reply_bytes


async def _read_reply(replies: AsyncIterable[Frame], asked_bytes: int) -> None:
    """Raises MalformedMessage unless as many bytes come as were asked for, then the end, and nothing after it."""
    came_bytes, has_ended = 0, False
    async for frame in replies:
        message = parse_frame(frame, pb.ReplyFrame)
        if has_ended:
            raise MalformedMessage("the answer goes on after its end")
        if isinstance(message, pb.ReplyFrame) and message.HasField("end"):
            has_ended = True
            continue
        came_bytes += _chunk_bytes(message)
        if came_bytes > asked_bytes:
            raise MalformedMessage(f"more than the {asked_bytes} bytes asked for came")
    if not has_ended or came_bytes != asked_bytes:
        raise MalformedMessage(f"the answer ended after {came_bytes} of {asked_bytes} bytes")


def _chunk_bytes(message: pb.CallFrame | pb.ReplyFrame | memoryview) -> int:
    if not isinstance(message, memoryview) or not message:
        raise MalformedMessage("nothing but chunks belongs there")
    return len(message)


def _left(end_s: float) -> float:
    return max(0.001, end_s - asyncio.get_running_loop().time())


_WHOLE_CHUNK = chunk_frame([_NOISE])
