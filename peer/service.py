"""The expert service: frames in, frames out. Validates at the edge and passes calls to the host. Knows no torch."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace

from peer.call_room import CallRoom, RoomTaken
from peer.call_stream import read_call
from peer.compute_thread import ComputeThreadStopped
from peer.expert_host import ExpertHost
from peer.messages import Call, CallLimits
from peer.probing import ProbeAnswerer
from peer.reply_stream import END, write_group
from peer.transport import CallContext, CallRefused, Frame, Method, Refusal
from peer.wire_codecs import DType, size_bytes
from protos.swarm_pb2 import InfoReply, InfoRequest


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
        """`max_bytes_in_flight`: tensor bytes, there and back, of all calls that are read, wait or are answered."""
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
        taken_bytes, deadline_s = 0, context.deadline_s

        async def admit(announced: Call, call_bytes: int) -> None:
            """Before its tensors are read. A backward waits for room: its forward's work is spent already."""
            nonlocal taken_bytes, deadline_s
            deadline_s = min(deadline_s, asyncio.get_running_loop().time() + announced.timeout_s)
            self._host.check(method, context.caller, announced)
            needed_bytes = call_bytes + self._answer_bytes(announced)
            if method is Method.FORWARD:
                self._room.take(needed_bytes)
            else:
                await self._room.wait(needed_bytes)
            taken_bytes = needed_bytes

        self._running += 1
        self._idle.clear()
        try:
            call = await read_call(frames, self._limits, method, admit=admit)
            left_s = deadline_s - asyncio.get_running_loop().time()
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
            self._room.give_back(taken_bytes)
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _answer_bytes(self, call: Call) -> int:
        """At most: a backward's answer has a row per distinct row of its forward, and these are no more than pairs."""
        return size_bytes(DType.FLOAT32, call.reply_codec, (call.num_pairs, self._limits.dim))
