"""What users hold after `join`: a swarm that can be asked, and a layer that puts it into a model."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import torch

from peer.event_loop import EventLoopThread
from peer.held import Held
from tests.swarm import DIM, MemorySwarm, seeded, uids
from trainer.routing.presets import build_router
from trainer.swarm import RemoteMoE, Swarm

X_TD = torch.randn(6, DIM, generator=seeded(0))


@pytest.fixture
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm() as swarm:
        swarm.spread_over(2)
        yield swarm


def joined(memory: MemorySwarm, *, leaving=None) -> Swarm:
    """As `join` makes it, over a network in memory."""
    member = SimpleNamespace(
        manifest=memory.manifest, transport=memory.transport, directory=memory.directory, identity=memory.trainer
    )

    @asynccontextmanager
    async def membership() -> AsyncGenerator[SimpleNamespace]:
        yield member
        if leaving is not None:
            leaving()

    held = Held(memory.bridge, membership(), leave_timeout_s=5.0)
    return Swarm(memory.bridge, held, held.open())


@pytest.mark.parametrize("router", [None, "switch", build_router("mixtral", dim=DIM, num_experts=6)])
def test_the_layer_answers_and_teaches_with_any_router(swarm: MemorySwarm, router) -> None:
    moe = RemoteMoE(joined(swarm), layer=1, router=router)

    y_TD = moe(X_TD)
    (y_TD.mean() + moe.loss).backward()

    assert y_TD.any()
    assert moe.metrics.pairs_answered == moe.metrics.pairs_sent > 0
    stepped = {uid for uid, version in swarm.versions().items() if version}
    assert stepped
    assert all(uid.startswith("1.") for uid in stepped)


def test_a_layer_the_run_does_not_have_is_refused_with_the_number_there_is(swarm: MemorySwarm) -> None:
    with pytest.raises(ValueError, match="2 mixture layers"):
        RemoteMoE(joined(swarm), layer=2)


def test_waiting_for_experts_tells_whether_all_are_served(swarm: MemorySwarm) -> None:
    member = joined(swarm)
    assert member.wait_for_experts(timeout_s=1.0)

    swarm.run(swarm.peers[0].host.drop(uids("0.0")[0]))
    swarm.announce(swarm.peers[0])

    assert not member.wait_for_experts(timeout_s=0.01)
    assert member.wait_for_experts(timeout_s=1.0, at_least=member.experts_alive())
    assert not member.wait_for_experts(timeout_s=0.01, at_least=member.experts_alive() + 1)
    assert member.view(0).alive_E.tolist() == [False, True, True, True, True, True]


def test_a_view_is_made_anew_only_when_it_would_differ(swarm: MemorySwarm) -> None:
    member = joined(swarm)
    before = member.view(0)
    swarm.announce(swarm.peers[1])

    assert member.view(0) is before, "the renewal says nothing new about hosting"
    assert member.view(1) is not before

    swarm.faults.take_down(swarm.peers[0].peer_id)
    RemoteMoE(member)(X_TD)
    without = member.view(0)
    swarm.announce(swarm.peers[0])

    assert without.num_live < before.num_live
    assert member.view(0).num_live == before.num_live


def test_experts_of_a_peer_that_failed_us_are_waited_for_until_it_is_heard_of_again(swarm: MemorySwarm) -> None:
    member = joined(swarm)
    swarm.faults.take_down(swarm.peers[0].peer_id)
    RemoteMoE(member)(X_TD)

    assert not member.wait_for_experts(timeout_s=0.01)
    swarm.announce(swarm.peers[0])
    assert member.wait_for_experts(timeout_s=1.0)


def test_a_loop_too_busy_to_say_is_as_good_as_not_in_time(swarm: MemorySwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    member = joined(swarm)

    def late(coroutine, *, timeout_s: float) -> None:
        coroutine.close()
        raise TimeoutError

    monkeypatch.setattr(swarm.bridge, "run", late)

    assert not member.wait_for_experts(timeout_s=1.0)
    monkeypatch.undo()


def test_closing_ends_the_loop_even_when_leaving_fails() -> None:
    def fail() -> None:
        raise ValueError("it broke")

    memory = MemorySwarm()
    loop: EventLoopThread = memory.bridge
    member = joined(memory, leaving=fail)

    with pytest.raises(ValueError, match="it broke"):
        member.close()

    assert not loop._thread.is_alive()
