"""The expert service: frames in, frames out. Validates at the edge and passes calls to the host. Knows no torch."""

import asyncio
from collections.abc import AsyncIterator, Callable

from peer.call_stream import read_call
from peer.compute_thread import ComputeThreadStopped
from peer.expert_host import ExpertHost
from peer.messages import CallLimits
from peer.probing import ProbeAnswerer
from peer.reply_stream import write_reply
from peer.transport import CallContext, CallRefused, Frame, Method, Refusal
from protos.swarm_pb2 import InfoReply, InfoRequest

MAX_QUEUED_ROWS = 1 << 20
"""More than this waiting and a peer says "not now" instead of growing its queue."""


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
        """`max_bytes_in_flight`: tensor bytes of all calls that are being read, waiting or answered."""
        self._host = host
        self._max_bytes_in_flight = max_bytes_in_flight
        self._bytes_in_flight = 0
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
        if self._host.queued_rows > MAX_QUEUED_ROWS:
            raise CallRefused(Refusal.OVERLOADED, f"{self._host.queued_rows} rows are waiting already; try later")
        announced_bytes = 0

        def admit(size_bytes: int) -> None:
            nonlocal announced_bytes
            if self._bytes_in_flight + size_bytes > self._max_bytes_in_flight:
                message = f"calls in progress have {self._bytes_in_flight} of {self._max_bytes_in_flight} bytes"
                raise CallRefused(Refusal.OVERLOADED, f"{message}, and this one needs {size_bytes}; try later")
            self._bytes_in_flight += size_bytes
            announced_bytes = size_bytes

        self._running += 1
        self._idle.clear()
        try:
            call = await read_call(frames, self._limits, method, admit=admit)
            reply = await self._host.answer(method, context.caller, call)
            for frame in write_reply([reply]):
                yield frame
        except ComputeThreadStopped:
            raise CallRefused(Refusal.OVERLOADED, "this peer is leaving; ask another") from None
        finally:
            self._bytes_in_flight -= announced_bytes
            self._running -= 1
            if not self._running:
                self._idle.set()
