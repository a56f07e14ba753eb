"""Emulated links in front of calls, on a virtual clock: what is late, by how much, what is lost, what piles up."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from peer.emulated_transport import EmulatedTransport, emulate
from peer.errors import DeadlineExceeded, PeerOverloaded
from peer.identity import Identity
from peer.links import Link, uniform
from peer.memory_transport import MemoryNetwork
from peer.settings import LinkSettings
from peer.transport import CallContext, CallRefused, Frame, Method, Refusal, Transport
from protos.swarm_pb2 import InfoRequest
from tests.transport_worlds import Answer, Member, World, ask, before, echo, sending
from tests.virtual_clock import run_virtual

MIB = 1 << 20
SLOW = LinkSettings(latency_ms=30.0)
NARROW = LinkSettings(bandwidth_mbit=8.0)  # a byte a microsecond


class _Place:
    """A peer and a trainer, each behind links of its own."""

    def __init__(self, peer: LinkSettings, trainer: LinkSettings, *, answer_loss: float = 0.0, seed: int = 0) -> None:
        network = MemoryNetwork()
        self._peer = World(lambda identity: emulate(network.transport(identity), peer, seed=seed))
        self._trainer = World(
            lambda identity: emulate(network.transport(identity), trainer, seed=seed, answer_loss=answer_loss)
        )

    async def open(self, answer: Answer = echo) -> tuple[Member, Member]:
        return await self._peer.serving(answer), self._trainer.member()


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _ten_seconds(_: CallContext) -> None:
    await asyncio.sleep(10.0)


async def _said(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
    """Takes everything in, then says one byte."""
    async for _ in frames:
        pass
    yield b"!"


def _seconds_of_a_call(place: _Place, frames: Sequence[Frame] = (b"hello",), answer: Answer = echo) -> float:
    async def scenario() -> float:
        peer, trainer = await place.open(answer)
        began_s = _now_s()
        await ask(trainer, peer.endpoint, sending(*frames), timeout_s=100.0)
        return _now_s() - began_s

    return run_virtual(scenario())


def test_nothing_to_emulate_is_the_transport_itself() -> None:
    inner: Transport = MemoryNetwork().transport(Identity.generate())

    assert emulate(inner, LinkSettings(), seed=1) is inner
    assert isinstance(emulate(inner, LinkSettings(), seed=1, answer_loss=0.1), EmulatedTransport)


@pytest.mark.parametrize(
    ("peer", "trainer", "expected_s"),
    [(SLOW, LinkSettings(), 0.03), (LinkSettings(), SLOW, 0.03), (SLOW, SLOW, 0.06)],
    ids=["the peer's", "the trainer's", "both"],
)
def test_a_round_trip_grows_by_the_latency_of_each_end(
    peer: LinkSettings, trainer: LinkSettings, expected_s: float
) -> None:
    assert _seconds_of_a_call(_Place(peer, trainer)) == pytest.approx(expected_s)


def test_latency_is_paid_once_for_many_frames() -> None:
    assert _seconds_of_a_call(_Place(SLOW, SLOW), [b"frame"] * 20) == pytest.approx(0.06)


def test_a_megabyte_takes_a_second_up_and_a_second_down() -> None:
    place = _Place(LinkSettings(), NARROW)

    assert _seconds_of_a_call(place, [bytes(1_000_000)], _said) == pytest.approx(1.0, rel=0.01)
    assert _seconds_of_a_call(place, [bytes(1_000_000)]) == pytest.approx(2.0, rel=0.01)


def test_both_directions_carry_at_once() -> None:
    place = _Place(LinkSettings(), NARROW)

    assert _seconds_of_a_call(place, [bytes(100_000)] * 20) == pytest.approx(2.1, rel=0.01)


def test_the_peers_own_limit_holds_for_all_its_callers_together() -> None:
    async def scenario() -> float:
        network = MemoryNetwork()
        narrow = World(lambda identity: emulate(network.transport(identity), NARROW, seed=0))
        peer = await narrow.serving(_said)
        trainers = [World(network.transport).member() for _ in range(4)]
        began_s = _now_s()
        await asyncio.gather(*(ask(t, peer.endpoint, sending(bytes(500_000)), timeout_s=60) for t in trainers))
        return _now_s() - began_s

    assert run_virtual(scenario()) == pytest.approx(2.0, rel=0.01)


def test_a_small_call_passes_between_large_ones() -> None:
    async def scenario() -> tuple[float, float]:
        peer, trainer = await _Place(LinkSettings(), NARROW).open(_said)
        began_s = _now_s()

        async def seconds(frame: Frame) -> float:
            await ask(trainer, peer.endpoint, sending(frame), timeout_s=60)
            return _now_s() - began_s

        large = [asyncio.ensure_future(seconds(bytes(MIB))) for _ in range(4)]
        small_s = await seconds(b"small")
        return small_s, max(await asyncio.gather(*large))

    small_s, large_s = run_virtual(scenario())

    assert small_s < 0.1
    assert large_s == pytest.approx(4 * MIB / 1e6, rel=0.01)


def test_a_sender_is_asked_for_no_more_than_has_gone() -> None:
    async def scenario() -> int:
        asked = 0

        async def frames() -> AsyncIterator[Frame]:
            nonlocal asked
            while True:
                asked += 1
                yield bytes(100_000)

        peer, trainer = await _Place(LinkSettings(), NARROW).open(_said)
        with pytest.raises(DeadlineExceeded):
            await ask(trainer, peer.endpoint, frames(), timeout_s=1.0)
        return asked

    assert run_virtual(scenario()) in (10, 11)


def test_what_nobody_takes_is_not_read_from_the_network() -> None:
    async def scenario() -> int:
        sent = 0

        async def pour() -> AsyncIterator[Frame]:
            nonlocal sent
            while True:
                sent += 1
                yield b"frame"
                await asyncio.sleep(0.001)

        async def take_one(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
            yield await anext(frames)
            await _ten_seconds(context)

        network = MemoryNetwork()
        slow = World(lambda identity: emulate(network.transport(identity), SLOW, seed=0))
        peer, trainer = await slow.serving(take_one), World(network.transport).member()
        with pytest.raises(DeadlineExceeded):
            await ask(trainer, peer.endpoint, pour(), timeout_s=8.0)
        return sent

    assert run_virtual(scenario()) == 1 + 32 + 1  # what was taken, the window, and one that waits for room in it


@pytest.mark.parametrize("timeout_s", [-1.0, 0.25, 10.0, 400.0])
@pytest.mark.parametrize("answer_loss", [0.0, 1.0])
def test_every_call_ends_by_its_deadline(timeout_s: float, answer_loss: float) -> None:
    far = LinkSettings(latency_ms=60_000, bandwidth_mbit=0.001)

    async def scenario() -> float:
        peer, trainer = await _Place(far, far, answer_loss=answer_loss).open()
        began_s = _now_s()
        with pytest.raises(DeadlineExceeded):
            await ask(trainer, peer.endpoint, sending(bytes(MIB)), timeout_s=timeout_s)
        return _now_s() - began_s

    assert run_virtual(scenario()) == pytest.approx(max(0.0, timeout_s))


def test_a_lost_answer_costs_the_caller_its_deadline_after_the_peer_has_done_its_work() -> None:
    async def scenario() -> tuple[float, list[str]]:
        did: list[str] = []

        async def work(context: CallContext) -> None:
            did.append("work")

        peer, trainer = await _Place(LinkSettings(), LinkSettings(), answer_loss=1.0).open(before(work))
        began_s = _now_s()
        for method in (Method.FORWARD, Method.BACKWARD):
            with pytest.raises(DeadlineExceeded):
                await ask(trainer, peer.endpoint, method=method)
        return _now_s() - began_s, did

    assert run_virtual(scenario()) == (pytest.approx(10.0), ["work", "work"])


def test_a_refusal_may_be_lost_like_any_answer() -> None:
    async def refuse(_: CallContext) -> None:
        raise CallRefused(Refusal.OVERLOADED, "not now")

    async def scenario(answer_loss: float) -> None:
        peer, trainer = await _Place(LinkSettings(), SLOW, answer_loss=answer_loss).open(before(refuse))
        await ask(trainer, peer.endpoint)

    with pytest.raises(PeerOverloaded):
        run_virtual(scenario(0.0))
    with pytest.raises(DeadlineExceeded):
        run_virtual(scenario(1.0))


def test_probes_and_first_contact_are_slow_and_never_lost() -> None:
    async def scenario() -> list[float]:
        both = LinkSettings(latency_ms=30.0, bandwidth_mbit=8.0)
        peer, trainer = await _Place(both, both, answer_loss=1.0).open(_said)
        began_s = _now_s()
        await ask(trainer, peer.endpoint, sending(bytes(100_000)), method=Method.PROBE)
        probed_s = _now_s()
        await trainer.transport.info(peer.endpoint.address, InfoRequest(nonce=bytes(100_000)), timeout_s=5.0)
        return [probed_s - began_s, _now_s() - probed_s]

    probe_s, info_s = run_virtual(scenario())

    assert probe_s == pytest.approx(0.06 + 0.2, rel=0.01)  # up through the trainer's link, and down through the peer's
    assert info_s == pytest.approx(0.06 + 0.4, rel=0.01)  # and the nonce comes back


def test_who_cannot_be_heard_in_time_is_late_for_first_contact_too() -> None:
    async def scenario() -> None:
        peer, trainer = await _Place(LinkSettings(latency_ms=2000), LinkSettings()).open()
        await trainer.transport.info(peer.endpoint.address, InfoRequest(), timeout_s=1.0)

    with pytest.raises(DeadlineExceeded):
        run_virtual(scenario())


def _which_of_200_are_lost(seed: int, *, latency_ms: float = 0.0) -> list[int]:
    async def scenario() -> list[int]:
        place = _Place(LinkSettings(), LinkSettings(latency_ms=latency_ms, jitter_ms=5), answer_loss=0.1, seed=seed)
        peer, trainer = await place.open()
        calls = [ask(trainer, peer.endpoint, timeout_s=50) for _ in range(200)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [number for number, answer in enumerate(answers) if isinstance(answer, DeadlineExceeded)]

    return run_virtual(scenario())


def test_losses_come_as_seeded_and_as_often_as_asked_for() -> None:
    lost = _which_of_200_are_lost(1)

    assert lost == _which_of_200_are_lost(1, latency_ms=50) != _which_of_200_are_lost(2)
    assert 10 <= len(lost) <= 32


def test_links_may_be_replaced_between_calls() -> None:
    async def scenario() -> list[float]:
        network = MemoryNetwork()
        peer = await World(network.transport).serving(echo)
        transport = EmulatedTransport(network.transport(Identity.generate()))
        trainer = Member(Identity.generate(), transport)
        took_s: list[float] = []
        for latency_s in (0.0, 0.2):
            transport.down = Link(delay=uniform(latency_s), rng=random.Random(0))
            began_s = _now_s()
            await ask(trainer, peer.endpoint)
            took_s.append(_now_s() - began_s)
        return took_s

    assert run_virtual(scenario()) == [pytest.approx(0.0), pytest.approx(0.2)]


def test_an_answer_that_nobody_waits_for_ends_at_the_peer() -> None:
    async def scenario() -> None:
        cancelled = asyncio.Event()

        async def hang(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
            try:
                yield b"begun"
                await _ten_seconds(context)
            finally:
                cancelled.set()

        peer, trainer = await _Place(SLOW, SLOW).open(hang)
        answer = trainer.transport.call(peer.endpoint, Method.FORWARD, sending(b"x"), timeout_s=50)
        assert await anext(answer) == b"begun"
        await answer.aclose()
        async with asyncio.timeout(1.0):
            await cancelled.wait()

    run_virtual(scenario())
