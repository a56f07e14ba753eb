"""Whom to ask for which expert, asking several peers at once, and whom to blame. Moves calls; knows no autograd.

Called from training threads, which block until every call has ended; the event loop moves the bytes.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from peer.directory import Directory
from peer.event_loop import EventLoopThread
from peer.messages import Call, ReplyLimits
from peer.transport import Endpoint, Method, Transport
from trainer.absences import Absences
from trainer.caller import KEEPS_THE_PEER, CallResult, send_call
from trainer.ledger import LossReason
from trainer.routing.plan import Plan
from trainer.scope import StepScope

log = structlog.get_logger(__name__)

_BRIDGE_SLACK_S = 0.5
"""Calls end by their own deadlines; the training thread waits this much longer for the loop to say so."""
_OUT_OF_TIME = CallResult((), LossReason.TIMEOUT, 0, 0)
"""Of a call that was lost by nobody's fault but ours."""


@dataclass(frozen=True)
class Outgoing:
    """A call, where it goes and what may come back."""

    endpoint: Endpoint
    call: Call
    limits: ReplyLimits


class Switchboard:
    """This process's lines to the peers of a run. Any training thread may use it."""

    def __init__(
        self, transport: Transport, directory: Directory, loop: EventLoopThread, *, call_timeout_s: float
    ) -> None:
        self.absences = Absences()
        self._transport = transport
        self._directory = directory
        self._loop = loop
        self._call_timeout_s = call_timeout_s

    def assign(self, plan: Plan, layer: int, scope: StepScope) -> dict[int, Endpoint]:
        """The replica of each chosen expert: the first that is neither suspected in this step nor absent."""
        snapshot = self._directory.snapshot()
        avoided = scope.suspects() | self.absences.absent(snapshot)
        hosts = snapshot.layer(layer, plan.num_experts, without=avoided)
        chosen = ((slot, hosts.host(slot)) for slot, _ in plan.groups())
        return {slot: snapshot.endpoints[peer_id] for slot, peer_id in chosen if peer_id is not None}

    def send(self, method: Method, calls: Sequence[Outgoing], scope: StepScope) -> list[CallResult]:
        """Send calls side by side and wait for all of them. Blocks the training thread, not the loop."""
        timeout_s = min(self._call_timeout_s, scope.deadline_s - time.monotonic())
        if not calls or timeout_s <= 0:
            return [_OUT_OF_TIME] * len(calls)
        try:
            results = self._loop.run(self._send_all(method, calls, timeout_s), timeout_s=timeout_s + _BRIDGE_SLACK_S)
        except TimeoutError:  # the calls have ended, and the loop was too busy to say how
            log.warning(
                "calls.lost", method=method, calls=len(calls), reason="this process is overloaded or was paused"
            )
            return [_OUT_OF_TIME] * len(calls)
        for outgoing, result in zip(calls, results, strict=True):
            if result.failure is not None and result.failure not in KEEPS_THE_PEER:
                scope.suspect(outgoing.endpoint.peer_id)
                self.absences.failed(outgoing.endpoint.peer_id, self._directory.snapshot())
        return results

    async def _send_all(self, method: Method, calls: Sequence[Outgoing], timeout_s: float) -> list[CallResult]:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._send_one(method, replace(outgoing.call, timeout_s=timeout_s), outgoing))
                for outgoing in calls
            ]
        return [task.result() for task in running]

    async def _send_one(self, method: Method, call: Call, outgoing: Outgoing) -> CallResult:
        started_s = time.monotonic()
        result = await send_call(
            self._transport, outgoing.endpoint, method, call, outgoing.limits, timeout_s=call.timeout_s
        )
        if result.failure is None:
            self._directory.observe_latency(outgoing.endpoint.peer_id, time.monotonic() - started_s)
        return result
