"""One packed call to one peer, in the trainer's words: what comes back, and why the rest does not. Moves bytes only.

Lower-layer errors become loss reasons in one table; nothing here raises for a peer's failure.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
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
class Ending:
    """How one call ended."""

    failure: LossReason | None
    """None when the peer answered to the end."""
    bytes_up: int = 0
    bytes_down: int = 0
    is_ours: bool = False
    """Nothing was sent: no fault of the peer's."""


Said = GroupReply | Ending
"""What is heard of a call: groups, as many as come, and one ending."""


class Heard:
    """What has been heard of one call so far. What came before a cut counts."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.ending = Ending(None)

    def hear(self, said: Said) -> None:
        if isinstance(said, Ending):
            self.ending = said
        else:
            self.outcomes |= {expert.index: expert.outcome for expert in said.experts}

    def is_all(self, outcome: Outcome) -> bool:
        """Did every expert that was answered end so?"""
        return set(self.outcomes.values()) == {outcome}

    def loss_reason(self, index: int) -> LossReason | None:
        """Why an expert's rows are lost; None when they are not. To be asked once the call has ended."""
        outcome = self.outcomes.get(index)
        if outcome is None:
            return self.ending.failure or LossReason.MALFORMED
        return None if outcome is Outcome.OK else REASON_OF_OUTCOME[outcome]


async def send_call(
    transport: Transport,
    endpoint: Endpoint,
    method: Method,
    call: Call,
    limits: ReplyLimits,
    tell: Callable[[GroupReply], None],
    *,
    timeout_s: float,
) -> Ending:
    """Send one call and `tell` each group of its answer, until it ends, fails or `timeout_s` is over.

    Never raises a RemoteError.
    """
    if timeout_s <= 0:
        return Ending(LossReason.TIMEOUT, is_ours=True)
    sizes = _Sizes()
    sent = sizes.count_up(write_call(call))
    try:
        async with (
            asyncio.timeout(timeout_s),
            aclosing(transport.call(endpoint, method, sent, timeout_s=timeout_s)) as frames,
            aclosing(sizes.count_down(frames)) as counted,
        ):
            async for group in read_reply(counted, limits):
                tell(group)
    except (RemoteError, MalformedMessage, TimeoutError) as error:
        failure = _reason_of(error)
        log.warning("call.lost", peer=endpoint.peer_id[:8], method=method, reason=failure, detail=str(error))
        return Ending(failure, sizes.up, sizes.down)
    return Ending(None, sizes.up, sizes.down)


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
