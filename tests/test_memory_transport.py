"""Faults come as scripted and seeded, and every call ends by its deadline: minutes of it, on a virtual clock."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from peer.errors import DeadlineExceeded, PeerUnreachable
from peer.faults import Fault, Faults
from peer.identity import Identity
from peer.memory_transport import MemoryNetwork
from peer.transport import CallContext, Frame, Method, PeerId
from protos.swarm_pb2 import InfoRequest
from tests.transport_worlds import World, ask, before, echo, sending
from tests.virtual_clock import run_virtual

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def _network() -> tuple[MemoryNetwork, World]:
    network = MemoryNetwork(seed=7)
    return network, World(network.transport)


async def _forever(_: CallContext) -> None:
    await asyncio.Event().wait()


async def _deaf(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
    await asyncio.Event().wait()
    yield b"x"


async def _frames_for_ever() -> AsyncIterator[Frame]:
    while True:
        yield b"x"
        await asyncio.sleep(1.0)


@pytest.mark.parametrize("fault", [Fault.TIMEOUT, Fault.ANSWER_LOST, Fault.delay(1e6), Fault.NONE])
@pytest.mark.parametrize("answer", [_deaf, before(_forever), echo], ids=["deaf", "hanging", "echo"])
@pytest.mark.parametrize("timeout_s", [0.0, 0.25, 10.0, 400.0])
def test_every_call_ends_by_its_deadline(fault: Fault, answer: object, timeout_s: float) -> None:
    async def scenario() -> float:
        network, world = _network()
        peer, trainer = await world.serving(answer), world.member()  # pyright: ignore[reportArgumentType]
        network.faults.fail_at(peer.identity.peer_id, Method.FORWARD, 0, fault)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):
            await ask(trainer, peer.endpoint, _frames_for_ever(), timeout_s=timeout_s)
        await world.close()
        return asyncio.get_running_loop().time() - began_s

    assert run_virtual(scenario()) == pytest.approx(timeout_s, abs=0.5)


def test_an_answer_may_be_lost_after_the_peer_has_done_its_work() -> None:
    async def scenario() -> list[str]:
        network, world = _network()
        did: list[str] = []

        async def work(context: CallContext) -> None:
            did.append("work")

        peer, trainer = await world.serving(before(work)), world.member()
        network.faults.fail_at(peer.identity.peer_id, Method.FORWARD, 0, Fault.ANSWER_LOST)
        network.faults.fail_at(peer.identity.peer_id, Method.FORWARD, 1, Fault.TIMEOUT)
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                await ask(trainer, peer.endpoint)
            did.append("lost")
        assert await ask(trainer, peer.endpoint) == [b"hello"]
        return did

    assert run_virtual(scenario()) == ["work", "lost", "lost", "work"]


def test_only_the_call_that_is_named_fails() -> None:
    async def scenario() -> None:
        network, world = _network()
        peer, trainer = await world.serving(echo), world.member()
        network.faults.fail_at(peer.identity.peer_id, Method.BACKWARD, 1, Fault.UNREACHABLE)

        for method in (Method.FORWARD, Method.FORWARD, Method.BACKWARD):
            assert await ask(trainer, peer.endpoint, method=method) == [b"hello"]
        with pytest.raises(PeerUnreachable):
            await ask(trainer, peer.endpoint, method=Method.BACKWARD)
        assert await ask(trainer, peer.endpoint, method=Method.BACKWARD) == [b"hello"]
        assert network.faults.num_calls(peer.identity.peer_id, Method.BACKWARD) == 3

    run_virtual(scenario())


def test_a_cut_connection_gives_the_frames_before_the_cut() -> None:
    async def scenario() -> list[bytes]:
        network, world = _network()
        peer, trainer = await world.serving(echo), world.member()
        network.faults.fail_at(peer.identity.peer_id, Method.FORWARD, 0, Fault.cut(after_frames=2))
        answer = trainer.transport.call(peer.endpoint, Method.FORWARD, sending(b"1", b"2", b"3"), timeout_s=5)
        contents = [await anext(answer), await anext(answer)]
        with pytest.raises(PeerUnreachable, match="broke"):
            await anext(answer)
        return contents

    assert run_virtual(scenario()) == [b"1", b"2"]


def test_latency_is_waited_out_on_the_loops_clock() -> None:
    async def scenario() -> float:
        network, world = _network()
        network.faults.latency_s = 30.0
        peer, trainer = await world.serving(echo), world.member()
        began_s = asyncio.get_running_loop().time()
        assert await ask(trainer, peer.endpoint, timeout_s=100.0) == [b"hello"]
        return asyncio.get_running_loop().time() - began_s

    assert run_virtual(scenario()) == pytest.approx(30.0)


def test_a_peer_that_is_down_is_unreachable_until_it_is_up() -> None:
    async def scenario() -> None:
        network, world = _network()
        peer, trainer = await world.serving(echo), world.member()

        network.faults.take_down(peer.identity.peer_id)
        with pytest.raises(PeerUnreachable):
            await ask(trainer, peer.endpoint)
        with pytest.raises(PeerUnreachable):
            await trainer.transport.info(peer.endpoint.address, InfoRequest(), timeout_s=1)
        network.faults.bring_up(peer.identity.peer_id)

        assert await ask(trainer, peer.endpoint) == [b"hello"]

    run_virtual(scenario())


def test_a_partition_separates_its_sides_until_it_heals() -> None:
    faults = Faults()

    faults.partition({A}, {B})

    assert faults.are_apart(A, B)
    assert faults.are_apart(B, A)
    assert not faults.are_apart(A, A)
    assert not faults.are_apart(A, C)
    faults.heal()
    assert not faults.are_apart(A, B)


def _losses(faults: Faults, num_calls: int) -> list[bool]:
    return [faults.draw(A, B, Method.FORWARD).loses_answer for _ in range(num_calls)]


def test_losses_are_as_frequent_as_asked_and_the_same_for_the_same_seed() -> None:
    one, same, other = Faults(seed=1), Faults(seed=1), Faults(seed=2)
    for faults in (one, same, other):
        faults.answer_loss = 0.2

    losses = _losses(one, 2000)

    assert 0.17 < sum(losses) / 2000 < 0.23
    assert losses == _losses(same, 2000)
    assert losses != _losses(other, 2000)


def test_jitter_lies_between_the_latency_and_the_latency_plus_itself() -> None:
    faults = Faults(seed=3)
    faults.latency_s, faults.jitter_s = 1.0, 0.5

    delays = [faults.draw(A, B, Method.FORWARD).delay_s for _ in range(200)]

    assert 1.0 <= min(delays) < 1.05
    assert 1.45 < max(delays) <= 1.5


def test_two_daemons_of_one_identity_are_two_certificates() -> None:
    network, _ = _network()
    identity = Identity.generate()

    first, second = network.transport(identity), network.transport(identity)

    assert first.certificate_der != second.certificate_der


def test_the_virtual_clock_says_when_nothing_can_ever_happen() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run_virtual(wait_for_ever())


def test_a_day_on_the_virtual_clock_runs_its_timers_in_order() -> None:
    async def scenario() -> list[str]:
        order: list[str] = []

        async def note(name: str, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            order.append(name)

        await asyncio.gather(note("evening", 72_000), note("morning", 28_800), note("night", 86_400))
        return order

    assert run_virtual(scenario()) == ["morning", "evening", "night"]
