"""The expert service between the wire and the host: who is let in, who is told to wait, and how it leaves."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
import torch

from experts.uid import ExpertUid
from peer.call_stream import write_call
from peer.errors import DeadlineExceeded, PeerOverloaded, PeerUnreachable, RequestRejected
from peer.expert_host import ExpertHost
from peer.memory_transport import MemoryNetwork
from peer.messages import Call, CallLimits, ExpertRows, GroupReply, Mode, Outcome, ReplyLimits
from peer.reply_stream import read_reply
from peer.service import ExpertService
from peer.tensors import Role, decode, encode
from peer.transport import Endpoint, Frame, Method
from peer.wire_codecs import Codec
from protos.swarm_pb2 import InfoReply, InfoRequest
from tests.swarm import CPU, DIM, seeded, tiny_run
from tests.transport_worlds import Member, World

RUN = tiny_run()
X_ND = torch.randn(6, DIM, generator=seeded(0))
ROOM_BYTES = 2 * 8 * 2 * X_ND.nbytes
"""Eight calls of one caller and their answers fit at a time, and not nine: they have half of it."""


@dataclass
class Served:
    """A service, its host, and somebody who calls it."""

    host: ExpertHost
    service: ExpertService
    endpoint: Endpoint
    trainer: Member
    stranger: Member

    async def ask(self, call: Call, *, timeout_s: float = 5.0) -> list[GroupReply]:
        frames = self.trainer.transport.call(self.endpoint, Method.FORWARD, write_call(call), timeout_s=timeout_s)
        limits = ReplyLimits.of(call, Method.FORWARD, num_rows=len(X_ND))
        return [group async for group in read_reply(frames, limits)]


def introduce(request: InfoRequest) -> InfoReply:
    return InfoReply(software_version="test", signature=request.nonce)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    world = World(MemoryNetwork().transport)
    peer, trainer, stranger = world.member(), world.member(), world.member()
    host = ExpertHost(RUN, device=CPU, snapshots=None, max_experts=4)
    host.start()
    await host.host([ExpertUid(0, 0)], {})
    service = ExpertService(host, CallLimits.of(RUN), introduce, max_bytes_in_flight=ROOM_BYTES)
    server = await peer.transport.serve(service, "127.0.0.1:0")
    endpoint = Endpoint(peer.identity.peer_id, server.address, peer.transport.certificate_der)
    yield Served(host, service, endpoint, trainer, stranger)
    await world.close()
    assert await asyncio.to_thread(host.close, timeout_s=5.0)


def call_of(**changes) -> Call:
    fields = {
        "call_id": b"i" * 16,
        "run_id": RUN.run_id,
        "mode": Mode.TRAIN,
        "layer": 0,
        "experts": (ExpertRows(0, len(X_ND)),),
        "reply_codec": Codec.RAW,
        "timeout_s": 5.0,
        "tensors": {Role.ROWS: encode(X_ND, Role.ROWS, Codec.RAW)},
    }
    return Call(**(fields | changes))


class Busy:
    """Keeps the compute thread of a host at work until it is left."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host
        self._entered, self._go_on = threading.Event(), threading.Event()

    def _work(self) -> None:
        self._entered.set()
        self._go_on.wait(10.0)

    async def __aenter__(self) -> None:
        self._working = asyncio.ensure_future(self._host._control(self._work))
        await asyncio.to_thread(self._entered.wait, 10.0)

    async def __aexit__(self, *_: object) -> None:
        self._go_on.set()
        await self._working


@contextlib.asynccontextmanager
async def half_sent(
    member: Member, endpoint: Endpoint, call: Call, *, method: Method = Method.FORWARD
) -> AsyncIterator[int]:
    """Twenty calls of which the peer gets no more than it asks for, and not the end; gives how many it lets begin."""
    num_begun = 0

    async def begin(number: int) -> None:
        async def frames() -> AsyncIterator[Frame]:
            nonlocal num_begun
            header, *_ = [frame async for frame in write_call(replace(call, call_id=bytes([number]) * 16))]
            yield header
            num_begun += 1
            await asyncio.Event().wait()

        await anext(member.transport.call(endpoint, method, frames(), timeout_s=600.0))

    begun = [asyncio.ensure_future(begin(number)) for number in range(20)]
    await turns(100)
    try:
        yield num_begun
    finally:
        for beginning in begun:
            beginning.cancel()
        await asyncio.gather(*begun, return_exceptions=True)


async def turns(number: int = 20) -> None:
    """So many turns of the loop: what can happen without waiting for anybody has happened."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_good_call_is_answered(served: Served) -> None:
    (group,) = await served.ask(call_of())

    assert [(expert.index, expert.outcome) for expert in group.experts] == [(0, Outcome.OK)]


async def test_whoever_asks_is_introduced(served: Served) -> None:
    reply, certificate = await served.trainer.transport.info(
        served.endpoint.address, InfoRequest(nonce=b"n" * 16), timeout_s=1.0
    )

    assert reply.signature == b"n" * 16
    assert certificate == served.endpoint.certificate_der


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run_id": "another"}, "this peer trains run"),
        ({"layer": 2}, "layer 2 does not exist"),
        ({"experts": (ExpertRows(6, 6),)}, "expert 0.6 does not exist"),
        ({"experts": (ExpertRows(0, 5),)}, "the experts' counts add up to 5"),
        ({"tensors": {Role.ROWS: encode(X_ND * torch.nan, Role.ROWS, Codec.RAW)}}, "ROWS holds NaN"),
    ],
)
async def test_a_bad_call_is_refused_with_a_sentence_and_the_next_good_one_is_answered(
    served: Served, changes: dict, sentence: str
) -> None:
    with pytest.raises(RequestRejected, match=sentence):
        await served.ask(call_of(**changes))

    assert (await served.ask(call_of()))[0].experts[0].outcome is Outcome.OK
    assert await served.service.leave(timeout_s=0.1)  # the bad one is not taken for a running one


async def test_whoever_never_ends_its_call_is_let_go_at_its_deadline_and_holds_up_nobody(served: Served) -> None:
    async def never_ending() -> AsyncIterator[Frame]:
        async for frame in write_call(call_of()):
            yield frame
            await asyncio.Event().wait()

    silent = served.trainer.transport.call(served.endpoint, Method.FORWARD, never_ending(), timeout_s=0.2)
    waiting = asyncio.ensure_future(anext(silent))
    await turns()

    assert (await served.ask(call_of()))[0].experts[0].outcome is Outcome.OK
    with pytest.raises(DeadlineExceeded):
        await waiting
    assert await served.service.leave(timeout_s=1.0)


async def test_a_full_queue_says_not_now(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.host._thread._queue, "_max_rows", 5)
    async with Busy(served.host):
        queued = asyncio.ensure_future(served.ask(call_of()))
        while served.host.queued_rows == 0:
            await turns(1)

        with pytest.raises(PeerOverloaded, match=r"6 rows of .* are waiting already"):
            await served.ask(call_of(call_id=b"j" * 16))

    assert (await queued)[0].experts[0].outcome is Outcome.OK


async def test_calls_whose_bytes_have_no_room_are_told_not_now_before_they_send_them(served: Served) -> None:
    asked_for_more = 0

    async def header_only(number: int) -> AsyncIterator[Frame]:
        nonlocal asked_for_more
        async for frame in write_call(call_of(call_id=bytes([number]) * 16)):
            yield frame
            asked_for_more += 1
            await asyncio.Event().wait()

    def begin(number: int) -> AsyncIterator[Frame]:
        return served.trainer.transport.call(served.endpoint, Method.FORWARD, header_only(number), timeout_s=5.0)

    silent = [asyncio.ensure_future(anext(begin(number))) for number in range(8)]
    while asked_for_more < 8:
        await turns(1)

    with pytest.raises(PeerOverloaded, match=f"{ROOM_BYTES} bytes"):
        await anext(begin(8))
    assert asked_for_more == 8
    for waiting in silent:
        waiting.cancel()
    await asyncio.gather(*silent, return_exceptions=True)
    assert await served.service.leave(timeout_s=1.0)


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.BF16])
async def test_a_call_takes_the_room_that_it_needs_once_it_is_decoded(served: Served, codec: Codec) -> None:
    tensors = {Role.ROWS: encode(X_ND, Role.ROWS, codec)}
    async with half_sent(served.trainer, served.endpoint, call_of(tensors=tensors, reply_codec=codec)) as num_begun:
        assert num_begun == 8


@pytest.mark.hostile
@pytest.mark.parametrize("method", [Method.FORWARD, Method.BACKWARD])
async def test_a_stranger_that_ends_none_of_its_calls_keeps_nobody_else_out(served: Served, method: Method) -> None:
    gradients = {Role.GRADIENTS: encode(X_ND, Role.GRADIENTS, Codec.RAW)}
    changes = {"tensors": gradients, "loss_tokens": 1.0} if method is Method.BACKWARD else {}
    call = call_of(timeout_s=600.0, **changes)

    async with half_sent(served.stranger, served.endpoint, call, method=method):
        for number in range(3):
            answer = await served.ask(call_of(call_id=bytes([number]) * 16))

            assert answer[0].experts[0].outcome is Outcome.OK


@pytest.mark.hostile
async def test_a_call_whose_bytes_stop_coming_is_ended_long_before_its_deadline(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.arrival.MAX_PAUSE_S", 0.02)

    async def silent() -> AsyncIterator[Frame]:
        async for frame in write_call(call_of(timeout_s=600.0)):
            yield frame
            await asyncio.Event().wait()

    with pytest.raises(PeerOverloaded, match="its bytes come too slowly"):
        await anext(served.stranger.transport.call(served.endpoint, Method.FORWARD, silent(), timeout_s=600.0))

    assert served.service._room.taken_bytes == 0


async def test_a_backward_waits_for_room_no_longer_than_it_has_time(served: Served) -> None:
    gradients = {Role.GRADIENTS: encode(X_ND, Role.GRADIENTS, Codec.RAW)}
    backward = call_of(timeout_s=0.05, tensors=gradients, loss_tokens=1.0)
    async with half_sent(served.trainer, served.endpoint, call_of()):
        asked = served.trainer.transport.call(served.endpoint, Method.BACKWARD, write_call(backward), timeout_s=5.0)

        with pytest.raises(PeerOverloaded, match="there was no room for it in its time"):
            await anext(asked)


@pytest.mark.parametrize("changes", [{}, {"tensors": {Role.ROWS: encode(X_ND * torch.nan, Role.ROWS, Codec.RAW)}}])
async def test_room_is_given_back_when_a_call_is_over(served: Served, changes: dict) -> None:
    for _ in range(9):
        with contextlib.suppress(RequestRejected):
            await served.ask(call_of(**changes))

    assert (await served.ask(call_of()))[0].experts[0].outcome is Outcome.OK


async def test_a_call_that_waits_for_the_device_takes_room(served: Served) -> None:
    async with Busy(served.host):
        queued = [asyncio.ensure_future(served.ask(call_of(call_id=bytes([number]) * 16))) for number in range(8)]
        while served.host.queued_rows < 8 * len(X_ND):
            await turns(1)

        with pytest.raises(PeerOverloaded, match=f"{ROOM_BYTES} bytes"):
            await served.ask(call_of(call_id=b"j" * 16))

    assert [(await answer)[0].experts[0].outcome for answer in queued] == [Outcome.OK] * 8


async def test_leaving_refuses_the_new_and_waits_for_the_running(served: Served) -> None:
    async with Busy(served.host):
        running = asyncio.ensure_future(served.ask(call_of()))
        while served.host.queued_rows == 0:
            await turns(1)
        leaving = asyncio.ensure_future(served.service.leave(timeout_s=5.0))
        await turns()

        with pytest.raises(PeerOverloaded, match="leaving"):
            await served.ask(call_of(call_id=b"j" * 16))
        assert not leaving.done()

    assert (await running)[0].experts[0].outcome is Outcome.OK
    assert await leaving


async def test_leaving_does_not_wait_for_ever(served: Served) -> None:
    async with Busy(served.host):
        running = asyncio.ensure_future(served.ask(call_of()))
        while served.host.queued_rows == 0:
            await turns(1)

        assert not await served.service.leave(timeout_s=0.01)

    assert (await running)[0].experts[0].outcome is Outcome.OK


async def test_a_stopped_host_sends_callers_to_another_peer(served: Served) -> None:
    assert await asyncio.to_thread(served.host.close, timeout_s=5.0)

    with pytest.raises(PeerOverloaded, match="leaving"):
        await served.ask(call_of())


async def test_a_failure_on_the_compute_thread_ends_one_call(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("the device is full")

    monkeypatch.setattr(served.host._compute.bank, "forward_in_parts", fail)
    with pytest.raises(PeerUnreachable, match="failed on the call"):
        await served.ask(call_of())
    monkeypatch.undo()

    assert (await served.ask(call_of()))[0].experts[0].outcome is Outcome.OK


async def test_many_callers_share_the_device_and_get_their_own(served: Served) -> None:
    calls = [
        call_of(call_id=bytes([number]) * 16, tensors={Role.ROWS: encode(X_ND * number, Role.ROWS, Codec.RAW)})
        for number in range(1, 9)
    ]
    async with Busy(served.host):
        asked = [asyncio.ensure_future(served.ask(call)) for call in calls]
        while served.host.queued_rows < 8 * len(X_ND):
            await turns(1)

    answers = [decode((await answer)[0].tensor) for answer in asked]

    alone = [decode((await served.ask(call))[0].tensor) for call in calls]
    torch.testing.assert_close(answers, alone)
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == 8
