"""One packed call to one peer, in the trainer's words: what came back, or why not. Async; moves bytes, never tensors.

Lower-layer errors become loss reasons in one table; nothing here raises for a peer's failure.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from peer.call_stream import write_call
from peer.errors import (
    DeadlineExceeded,
    MalformedMessage,
    MalformedReply,
    NotAuthorised,
    PeerOverloaded,
    PeerUnreachable,
    RemoteError,
    RequestRejected,
)
from peer.messages import Call, GroupReply, Outcome, ReplyLimits
from peer.reply_stream import read_reply
from peer.transport import Endpoint, Frame, Method, Transport
from trainer.ledger import LossReason

log = structlog.get_logger(__name__)

REASON_OF_ERROR: dict[type[Exception], LossReason] = {
    PeerUnreachable: LossReason.UNREACHABLE,
    DeadlineExceeded: LossReason.TIMEOUT,
    PeerOverloaded: LossReason.DECLINED,
    MalformedReply: LossReason.MALFORMED,
    RequestRejected: LossReason.MALFORMED,
    NotAuthorised: LossReason.DECLINED,
    MalformedMessage: LossReason.MALFORMED,
    TimeoutError: LossReason.TIMEOUT,
}
"""Proved complete by a test: every leaf of RemoteError is here."""

REASON_OF_OUTCOME: dict[Outcome, LossReason] = {
    Outcome.DECLINED: LossReason.DECLINED,
    Outcome.UNKNOWN_EXPERT: LossReason.NO_PRIMARY,
    Outcome.STALE: LossReason.STALE,
    Outcome.MISSING_INPUTS: LossReason.TIMEOUT,
    Outcome.ALREADY_APPLIED: LossReason.TIMEOUT,
    Outcome.NON_FINITE: LossReason.NON_FINITE,
}
"""Every outcome but OK."""

KEEPS_THE_PEER = frozenset({LossReason.DECLINED, LossReason.STALE, LossReason.NO_PRIMARY})
"""Losses that say nothing against the peer that answered so."""


@dataclass(frozen=True)
class CallResult:
    """How one call ended. `groups` holds what arrived, also when the rest was cut off."""

    groups: tuple[GroupReply, ...]
    failure: LossReason | None
    """None when the peer answered to the end."""
    bytes_up: int
    bytes_down: int

    def outcome(self, index: int) -> Outcome | None:
        """What became of one expert's rows; None when nothing was heard of it."""
        found = (expert.outcome for group in self.groups for expert in group.experts if expert.index == index)
        return next(found, None)

    def is_all(self, outcome: Outcome) -> bool:
        """Did every expert that was answered end so?"""
        outcomes = {expert.outcome for group in self.groups for expert in group.experts}
        return outcomes == {outcome}

    def loss_reason(self, index: int) -> LossReason | None:
        """Why an expert's rows are lost; None when they are not."""
        outcome = self.outcome(index)
        if outcome is None:
            return self.failure or LossReason.MALFORMED
        return None if outcome is Outcome.OK else REASON_OF_OUTCOME[outcome]


async def send_call(
    transport: Transport, endpoint: Endpoint, method: Method, call: Call, limits: ReplyLimits, *, timeout_s: float
) -> CallResult:
    """Send one call and gather its reply until it ends, fails or `timeout_s` is over. Never raises a RemoteError."""
    if timeout_s <= 0:
        return CallResult((), LossReason.TIMEOUT, 0, 0)
    sizes = _Sizes()
    groups: list[GroupReply] = []
    sent = sizes.count_up(write_call(call))
    try:
        async with (
            asyncio.timeout(timeout_s),
            aclosing(transport.call(endpoint, method, sent, timeout_s=timeout_s)) as frames,
            aclosing(sizes.count_down(frames)) as counted,
        ):
            async for group in read_reply(counted, limits):
                groups.append(group)
    except (RemoteError, MalformedMessage, TimeoutError) as error:
        failure = _reason_of(error)
        log.warning("call.lost", peer=endpoint.peer_id[:8], method=method, reason=failure, detail=str(error))
        return CallResult(tuple(groups), failure, sizes.up, sizes.down)
    return CallResult(tuple(groups), None, sizes.up, sizes.down)


def _reason_of(error: Exception) -> LossReason:
    return next(reason for kind, reason in REASON_OF_ERROR.items() if isinstance(error, kind))


class _Sizes:
    """Counts message bytes as they pass."""

    def __init__(self) -> None:
        self.up = 0
        self.down = 0

    async def count_up(self, frames: AsyncIterator[Frame]) -> AsyncIterator[Frame]:
        async for frame in frames:
            self.up += len(frame)
            yield frame

    async def count_down(self, frames: AsyncIterator[Frame]) -> AsyncGenerator[Frame]:
        async for frame in frames:
            self.down += len(frame)
            yield frame
