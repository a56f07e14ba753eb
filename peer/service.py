"""The expert service: frames in, frames out. Validates at the edge and passes calls to the host. Knows no torch."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from peer.arrival import Arrival
from peer.call_room import CallRoom, RoomTaken
from peer.call_stream import read_call
from peer.compute_thread import ComputeThreadStopped
from peer.expert_host import ExpertHost
from peer.messages import Call, CallLimits
from peer.probing import ProbeAnswerer
from peer.reply_stream import END, write_group
from peer.transport import CallContext, CallRefused, Frame, Method, PeerId, Refusal
from peer.wire_codecs import Codec, DType, size_bytes
from protos.swarm_pb2 import InfoReply, InfoRequest

_LAST_WORD_SHARE = 0.05
"""Of a call's time, for the news that there was no room."""


@dataclass
class _Visit:
    """A call that is here."""

    method: Method
    caller: PeerId
    deadline_s: float
    taken_bytes: int = 0


class ExpertService:
    """Answers Info at once, and Forward and Backward through the host. Runs on the event loop."""

    def __init__(
        self,
        host: ExpertHost,
        limits: CallLimits,
        introduce: Callable[[InfoRequest], InfoReply],
        *,
        max_bytes_in_flight: int,
    ) -> None:
        """`max_bytes_in_flight`: decoded tensors, there and back, of all calls that are read, wait or are answered."""
        self._host = host
        self._room = CallRoom(max_bytes=max_bytes_in_flight)
        self._limits = limits
        self._introduce = introduce
        self._prober = ProbeAnswerer()
        self._leaving = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def info(self, request: InfoRequest) -> InfoReply:
        return self._introduce(request)

    def forward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._answer(Method.FORWARD, frames, context)

    def backward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._answer(Method.BACKWARD, frames, context)

    def probe(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._prober.answer(frames, context)

    async def leave(self, *, timeout_s: float) -> bool:
        """Refuse new calls and wait for the running ones; False when some were still running at the end."""
        self._leaving = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _answer(self, method: Method, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        if self._leaving:
            raise CallRefused(Refusal.OVERLOADED, "this peer is leaving; ask another")
        visit = _Visit(method, context.caller, context.deadline_s)
        self._running += 1
        self._idle.clear()
        try:
            call = await self._read(visit, frames)
            left_s = visit.deadline_s - asyncio.get_running_loop().time()
            async with aclosing(self._host.answer(method, context.caller, replace(call, timeout_s=left_s))) as groups:
                async for group in groups:
                    for frame in write_group(group):
                        yield frame
            yield END
        except RoomTaken as taken:
            raise CallRefused(Refusal.OVERLOADED, str(taken)) from None
        except ComputeThreadStopped:
            raise CallRefused(Refusal.OVERLOADED, "this peer is leaving; ask another") from None
        finally:
            self._room.give_back(visit.caller, visit.taken_bytes)
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _read(self, visit: _Visit, frames: AsyncIterator[Frame]) -> Call:
        """The call, once there is room for it and for as long as its bytes keep coming."""
        loop = asyncio.get_running_loop()

        async def admit(announced: Call, call_bytes: int) -> None:
            """Before its tensors are read. A backward waits for room: its forward's work is spent already."""
            visit.deadline_s = min(visit.deadline_s, loop.time() + announced.timeout_s)
            self._host.check(visit.method, visit.caller, announced)
            needed_bytes = call_bytes + self._answer_bytes(announced)
            if visit.method is Method.FORWARD:
                self._room.take(visit.caller, needed_bytes)
            else:
                patience.reschedule(visit.deadline_s - _LAST_WORD_SHARE * (visit.deadline_s - loop.time()))
                await self._room.wait(visit.caller, needed_bytes)
            visit.taken_bytes = needed_bytes

        async def as_they_come() -> AsyncGenerator[Frame]:
            header = await anext(frames, None)
            if header is None:
                return
            yield header  # goes on when there is room
            arrival = Arrival(now_s=loop.time())
            patience.reschedule(min(arrival.until_s, visit.deadline_s))
            async for frame in frames:
                arrival.came(len(frame), now_s=loop.time())
                patience.reschedule(min(arrival.until_s, visit.deadline_s))
                yield frame

        try:
            async with asyncio.timeout(None) as patience, aclosing(as_they_come()) as coming:
                return await read_call(coming, self._limits, visit.method, admit=admit)
        except TimeoutError:
            what = "its bytes come too slowly" if visit.taken_bytes else "there was no room for it in its time"
            raise CallRefused(Refusal.OVERLOADED, f"{what}; try later") from None

    def _answer_bytes(self, call: Call) -> int:
        """Inside. At most: a backward has a row per distinct row of its forward, and these are no more than pairs."""
        return size_bytes(DType.FLOAT32, Codec.RAW, (call.num_pairs, self._limits.dim))
