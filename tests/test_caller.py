"""One call in the trainer's words: it ends in time, says why, and counts its bytes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import pytest

from peer.errors import RemoteError
from peer.faults import Fault
from peer.framing import chunk_frame
from peer.memory_transport import MemoryNetwork
from peer.messages import Outcome, ReplyLimits
from peer.reply_stream import write_reply
from peer.transport import CallContext, CallRefused, Frame, Method, Refusal
from protos import swarm_pb2 as pb
from tests.transport_worlds import Answer, Member, World
from tests.virtual_clock import run_virtual
from tests.wire_calls import forward_call, frames_of, whole_answer
from trainer.caller import REASON_OF_ERROR, REASON_OF_OUTCOME, Ending, Heard, send_call
from trainer.ledger import LossReason

CALL = forward_call()
LIMITS = ReplyLimits.of(CALL, Method.FORWARD, num_rows=3)
TIMEOUT_S = 10.0


def answering(frames_out: Sequence[Frame], *, then: Callable[[], Coroutine] | None = None) -> Answer:
    """Reads the call, sends these frames, and does something else before it ends."""

    async def answer(frames: AsyncIterator[Frame], _: CallContext) -> AsyncIterator[Frame]:
        async for _frame in frames:
            pass
        for frame in frames_out:
            yield frame
        if then is not None:
            await then()

    return answer


def refusing(refusal: Refusal) -> Answer:
    async def refuse() -> None:
        raise CallRefused(refusal, "no")

    return answering([], then=refuse)


def for_ever() -> Coroutine:
    return asyncio.Event().wait()


WHOLE = list(write_reply(whole_answer()))


@dataclass
class Sent:
    heard: Heard
    took_s: float
    calls_made: int


def send(answer: Answer, *, fault: Fault = Fault.NONE, timeout_s: float = TIMEOUT_S, is_down: bool = False) -> Sent:
    """One call to one peer, on a virtual clock."""

    async def main() -> Sent:
        network = MemoryNetwork()
        world = World(network.transport)
        peer, trainer = await world.serving(answer), world.member()
        network.faults.fail_at(peer.identity.peer_id, Method.FORWARD, 0, fault)
        if is_down:
            network.faults.take_down(peer.identity.peer_id)
        clock = asyncio.get_running_loop().time
        started_s = clock()
        heard = Heard()
        ending = await send_call(
            trainer.transport, peer.endpoint, Method.FORWARD, CALL, LIMITS, heard.hear, timeout_s=timeout_s
        )
        heard.hear(ending)
        took_s = clock() - started_s
        await world.close()
        return Sent(heard, took_s, network.faults.num_calls(peer.identity.peer_id, Method.FORWARD))

    return run_virtual(main())


def leaves(kind: type[Exception]) -> set[type[Exception]]:
    below = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


def test_every_way_in_which_a_peer_can_fail_has_a_reason() -> None:
    assert leaves(RemoteError) <= REASON_OF_ERROR.keys()
    assert set(Outcome) - {Outcome.OK} == REASON_OF_OUTCOME.keys()


def test_a_whole_answer_is_no_loss() -> None:
    sent = send(answering(WHOLE))

    assert sent.heard.ending.failure is None
    assert sent.heard.outcomes[1] is Outcome.OK
    assert sent.heard.loss_reason(1) is None
    assert sent.heard.loss_reason(3) is LossReason.DECLINED
    assert sent.took_s == 0.0


def test_message_bytes_are_counted_both_ways() -> None:
    sent = send(answering(WHOLE))

    assert sent.heard.ending.bytes_up == sum(frame.ByteSize() for frame in asyncio.run(frames_of(CALL)))
    assert sent.heard.ending.bytes_down == sum(map(len, WHOLE))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (answering(WHOLE), Fault.TIMEOUT),
        (answering(WHOLE), Fault.ANSWER_LOST),
        (answering([], then=for_ever), Fault.NONE),
        (answering(WHOLE[:1], then=for_ever), Fault.NONE),
        (answering(WHOLE[:-1], then=for_ever), Fault.NONE),
        (answering(WHOLE), Fault.delay(11.0)),
    ],
    ids=["request lost", "answer lost", "hangs", "hangs inside a tensor", "hangs before its end", "late"],
)
def test_a_call_that_is_not_answered_ends_at_its_deadline(answer: Answer, fault: Fault) -> None:
    sent = send(answer, fault=fault)

    assert sent.heard.ending.failure is LossReason.TIMEOUT
    assert TIMEOUT_S <= sent.took_s <= TIMEOUT_S + 0.5


def test_what_came_before_the_deadline_counts() -> None:
    sent = send(answering(WHOLE[:-1], then=for_ever))

    assert sent.heard.outcomes[1] is Outcome.OK
    assert sent.heard.loss_reason(1) is None


def test_a_peer_that_has_vanished_is_unreachable_at_once() -> None:
    sent = send(answering(WHOLE), is_down=True)

    assert sent.heard.ending.failure is LossReason.UNREACHABLE
    assert sent.heard.loss_reason(1) is LossReason.UNREACHABLE
    assert sent.took_s == 0.0


@pytest.mark.parametrize("after_frames", range(len(WHOLE)))
def test_an_answer_cut_in_the_middle_keeps_what_came_whole(after_frames: int) -> None:
    sent = send(answering(WHOLE), fault=Fault.cut(after_frames))

    came_whole = after_frames >= 2  # a group and its tensor's only chunk
    assert sent.heard.ending.failure is LossReason.UNREACHABLE
    assert sent.heard.loss_reason(1) is (None if came_whole else LossReason.UNREACHABLE)


def test_an_answer_without_its_end_is_malformed() -> None:
    sent = send(answering(WHOLE[:-1]))

    assert sent.heard.ending.failure is LossReason.MALFORMED


def test_an_expert_that_is_left_out_is_lost_as_malformed() -> None:
    sent = send(answering(list(write_reply(whole_answer()[:1]))))

    assert sent.heard.loss_reason(1) is None
    assert sent.heard.loss_reason(3) is LossReason.MALFORMED


def test_an_answer_that_announces_more_than_was_asked_for_is_malformed() -> None:
    group = pb.ReplyFrame.FromString(WHOLE[0])
    group.group.tensor.size_bytes = 1 << 40

    sent = send(answering([group.SerializeToString(), *WHOLE[1:]]))

    assert sent.heard.ending.failure is LossReason.MALFORMED


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (Refusal.OVERLOADED, LossReason.DECLINED),
        (Refusal.UNAUTHENTICATED, LossReason.DECLINED),
        (Refusal.INVALID, LossReason.MALFORMED),
        (Refusal.WRONG_RUN, LossReason.MALFORMED),
        (Refusal.TOO_LARGE, LossReason.MALFORMED),
    ],
)
def test_a_refusal_has_its_reason(refusal: Refusal, reason: LossReason) -> None:
    sent = send(refusing(refusal))

    assert sent.heard.ending.failure is reason
    assert sent.heard.outcomes == {}


def test_a_peers_bug_is_as_good_as_no_peer() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    assert send(answering([], then=fail)).heard.ending.failure is LossReason.UNREACHABLE


def test_without_time_left_nothing_is_sent() -> None:
    sent = send(answering(WHOLE), timeout_s=0.0)

    assert sent.heard.ending.failure is LossReason.TIMEOUT
    assert sent.calls_made == 0


def test_whoever_answers_nonsense_is_hung_up_on() -> None:
    @dataclass
    class Line:
        hung_up: asyncio.Event = field(default_factory=asyncio.Event)

        async def hold(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                self.hung_up.set()

    async def main() -> tuple[Ending, bool]:
        line, world = Line(), World(MemoryNetwork().transport)
        peer = await world.serving(answering([chunk_frame([b"nonsense"])], then=line.hold))
        trainer: Member = world.member()
        ending = await send_call(
            trainer.transport, peer.endpoint, Method.FORWARD, CALL, LIMITS, Heard().hear, timeout_s=TIMEOUT_S
        )
        async with asyncio.timeout(0.1):
            await line.hung_up.wait()
        return ending, line.hung_up.is_set()

    ending, hung_up = run_virtual(main())

    assert ending.failure is LossReason.MALFORMED
    assert hung_up
