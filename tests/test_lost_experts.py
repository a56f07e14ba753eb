"""A lost expert is a Tuesday: whatever a peer does, its own pairs are lost, in time, with a reason; no others are."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experts.uid import ExpertUid
from peer.faults import Fault
from peer.messages import GroupReply
from peer.tensors import encode
from peer.transport import Method
from tests.swarm import (
    DIM,
    MemorySwarm,
    SwarmPeer,
    local_experts,
    seeded,
    step_of,
    tiny_run,
    training_loop,
)
from trainer.ledger import Counts, LossReason
from trainer.routing.plan import Plan
from trainer.routing.view import View
from trainer.scope import MicroBatch
from trainer.swarm import router_for

pytestmark = pytest.mark.swarm

X_TD = torch.randn(20, DIM, generator=seeded(1))
PULL_ND = torch.randn(40, DIM, generator=seeded(2))
LAYOUT = ("0.0 0.3 1.0 1.3", "0.1 0.4 1.1 1.4", "0.2 0.5 1.2 1.5")
FAULTS = {
    "hangs": (Fault.TIMEOUT, LossReason.TIMEOUT),
    "answers nobody": (Fault.ANSWER_LOST, LossReason.TIMEOUT),
    "is late": (Fault.delay(11.0), LossReason.TIMEOUT),
    "has vanished": (Fault.UNREACHABLE, LossReason.UNREACHABLE),
    "breaks before its answer": (Fault.cut(0), LossReason.UNREACHABLE),
    "breaks in the middle of its answer": (Fault.cut(1), LossReason.UNREACHABLE),
}
in_every_way = pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS.keys())


@pytest.fixture
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm(virtual=True) as swarm:
        swarm.add_peers(*LAYOUT)
        yield swarm


def plan_of(swarm: MemorySwarm, layer: int = 0) -> Plan:
    return router_for(swarm.manifest, layer)(X_TD, View.all_alive(layer, swarm.manifest.experts_per_layer))


def pairs_at(peer: SwarmPeer, plan: Plan) -> Tensor:
    return torch.isin(plan.expert_N, torch.tensor([uid.index for uid in peer.bank.uids if uid.layer == 0]))


def local_gradient(swarm: MemorySwarm, plan: Plan, pull_ND: Tensor) -> Tensor:
    """(T, D) gradient of the rows when experts in this process are pulled so."""
    x_TD = X_TD.clone().requires_grad_()
    out_ND, _ = local_experts(swarm.manifest).run(x_TD, plan, 0, step_of())
    out_ND.backward(pull_ND)
    return x_TD.grad


def assert_adds_up(counts: Counts) -> None:
    for what in (counts.calls, counts.pairs):
        assert what["sent"] == what["answered"] + what["lost"]
    assert counts.pairs["lost"] == sum(counts.lost_by_reason.values())
    backwards = counts.backwards
    assert backwards["sent"] == backwards["applied"] + backwards["lost"] + backwards["stale"]


# ---- forward


@in_every_way
def test_a_peer_that_fails_in_the_forward_loses_its_pairs_in_time_and_nobody_elses(
    swarm: MemorySwarm, fault: Fault, reason: LossReason
) -> None:
    plan, micro_batch, peer = plan_of(swarm), step_of(), swarm.peers[1]
    whole_ND, _ = swarm.experts.run(X_TD, plan, 0, step_of(train=False))
    swarm.faults.fail_at(peer.peer_id, Method.FORWARD, 1, fault)
    started_s, x_TD = swarm.bridge.now_s, X_TD.clone().requires_grad_()

    out_ND, ok_N = swarm.experts.run(x_TD, plan, 0, micro_batch)

    assert swarm.bridge.now_s - started_s <= swarm.manifest.wire.call_timeout_s + 0.5
    assert torch.equal(ok_N, ~pairs_at(peer, plan))
    assert torch.equal(out_ND[ok_N], whole_ND[ok_N])
    assert not out_ND[~ok_N].any()
    counts = micro_batch.scope.ledger.read()
    assert counts.lost_by_reason == {r: int((~ok_N).sum()) if r is reason else 0 for r in LossReason}
    assert (counts.calls["answered"], counts.calls["lost"]) == (2, 1)
    out_ND.backward(PULL_ND)
    torch.testing.assert_close(x_TD.grad, local_gradient(swarm, plan, PULL_ND * ok_N[:, None]))
    assert set(peer.versions().values()) == {0}
    assert swarm.num_calls(peer, Method.BACKWARD) == 0
    assert_adds_up(micro_batch.scope.ledger.read())
    assert micro_batch.scope.ledger.read().backwards["applied"] == 2


def test_an_answer_that_came_whole_counts_even_if_the_line_breaks_after_it(swarm: MemorySwarm) -> None:
    plan, micro_batch, peer = plan_of(swarm), step_of(), swarm.peers[1]
    swarm.faults.fail_at(peer.peer_id, Method.FORWARD, 0, Fault.cut(2))
    x_TD = X_TD.clone().requires_grad_()

    out_ND, ok_N = swarm.experts.run(x_TD, plan, 0, micro_batch)
    out_ND.backward(PULL_ND)

    assert ok_N.all()
    assert micro_batch.scope.is_suspect(peer.peer_id)
    assert swarm.num_calls(peer, Method.BACKWARD) == 0  # it failed us once in this step
    torch.testing.assert_close(x_TD.grad, local_gradient(swarm, plan, PULL_ND * ~pairs_at(peer, plan)[:, None]))
    counts = micro_batch.scope.ledger.read()
    assert counts.backwards == {"sent": 3, "applied": 2, "lost": 1, "stale": 0, "duplicate": 0}
    assert counts.calls["answered"] == 3
    assert_adds_up(counts)


@in_every_way
def test_everybodys_failure_leaves_zero_and_finite_gradients(
    swarm: MemorySwarm, fault: Fault, reason: LossReason
) -> None:
    moe, x_BSD = swarm.moe(), X_TD.view(2, 10, DIM).clone().requires_grad_()
    for peer in swarm.peers:
        swarm.faults.fail_at(peer.peer_id, Method.FORWARD, 0, fault)
    started_s = swarm.bridge.now_s

    y_BSD = moe(x_BSD)
    (y_BSD.square().sum() + moe.loss).backward()

    assert swarm.bridge.now_s - started_s <= swarm.manifest.wire.call_timeout_s + 0.5
    assert not y_BSD.any()
    for parameter in (x_BSD, *moe.parameters()):
        assert parameter.grad.isfinite().all()
    counts = moe.ledger.read()
    assert counts.lost_by_reason[reason] == counts.pairs["sent"] == 40
    assert_adds_up(counts)
    assert set(swarm.versions().values()) == {0}


def test_a_suspected_peer_gets_no_more_calls_in_its_step_and_is_asked_again_in_the_next(swarm: MemorySwarm) -> None:
    micro_batch, peer = step_of(), swarm.peers[1]
    swarm.faults.fail_at(peer.peer_id, Method.FORWARD, 0, Fault.cut(0))
    swarm.experts.run(X_TD, plan_of(swarm), 0, micro_batch)

    out_ND, ok_N = swarm.experts.run(X_TD.clone().requires_grad_(), plan_of(swarm, 1), 1, micro_batch)
    out_ND.sum().backward()

    lost = int((~ok_N).sum())
    assert swarm.num_calls(peer, Method.FORWARD) == 1
    assert swarm.num_calls(peer, Method.BACKWARD) == 0
    counts = micro_batch.scope.ledger.read()
    assert counts.lost_by_reason[LossReason.UNREACHABLE] == counts.pairs["lost"] > lost > 0
    assert counts.calls["sent"] == 5  # the pairs that were not sent are no call
    assert_adds_up(counts)
    swarm.announce(peer)
    _, ok_N = swarm.experts.run(X_TD, plan_of(swarm), 0, step_of())
    assert ok_N.all()


# ---- backward


@in_every_way
def test_a_lost_backward_is_a_zero_gradient_for_its_rows_and_nothing_else(
    swarm: MemorySwarm, fault: Fault, reason: LossReason
) -> None:
    plan, micro_batch, peer = plan_of(swarm), step_of(), swarm.peers[1]
    swarm.faults.fail_at(peer.peer_id, Method.BACKWARD, 0, fault)
    x_TD = X_TD.clone().requires_grad_()
    out_ND, ok_N = swarm.experts.run(x_TD, plan, 0, micro_batch)
    started_s = swarm.bridge.now_s

    out_ND.backward(PULL_ND)

    assert ok_N.all()
    assert swarm.bridge.now_s - started_s <= swarm.manifest.wire.call_timeout_s + 0.5
    torch.testing.assert_close(x_TD.grad, local_gradient(swarm, plan, PULL_ND * ~pairs_at(peer, plan)[:, None]))
    counts = micro_batch.scope.ledger.read()
    assert counts.backwards == {"sent": 3, "applied": 2, "lost": 1, "stale": 0, "duplicate": 0}
    assert counts.pairs["lost"] == 0
    assert_adds_up(counts)
    assert all(version == 1 for uid, version in swarm.peers[0].versions().items() if uid.startswith("0."))


def test_a_backward_whose_answer_is_not_ended_is_lost_as_a_whole(swarm: MemorySwarm) -> None:
    plan, micro_batch, peer = plan_of(swarm), step_of(), swarm.peers[1]
    swarm.faults.fail_at(peer.peer_id, Method.BACKWARD, 0, Fault.cut(2))  # after its gradients, before its end
    x_TD = X_TD.clone().requires_grad_()

    out_ND, _ = swarm.experts.run(x_TD, plan, 0, micro_batch)
    out_ND.backward(PULL_ND)

    assert micro_batch.scope.ledger.read().backwards["lost"] == 1
    torch.testing.assert_close(x_TD.grad, local_gradient(swarm, plan, PULL_ND * ~pairs_at(peer, plan)[:, None]))


def test_a_lost_backward_may_have_been_applied_but_never_twice(swarm: MemorySwarm) -> None:
    peer = swarm.peers[1]
    swarm.faults.fail_at(peer.peer_id, Method.BACKWARD, 0, Fault.ANSWER_LOST)

    out_ND, _ = swarm.experts.run(X_TD.clone().requires_grad_(), plan_of(swarm), 0, step_of())
    out_ND.backward(PULL_ND)

    assert peer.versions() == {"0.1": 1, "0.4": 1, "1.1": 0, "1.4": 0}


def test_a_lost_backward_leaves_the_routers_gradient_as_it_was(swarm: MemorySwarm) -> None:
    with MemorySwarm(virtual=True) as unharmed:
        unharmed.add_peers(*LAYOUT)
        whole = unharmed.moe()
        whole(X_TD).square().sum().backward()
    moe = swarm.moe()
    for peer in swarm.peers:
        swarm.faults.fail_at(peer.peer_id, Method.BACKWARD, 0, Fault.UNREACHABLE)

    moe(X_TD).square().sum().backward()

    gradients = [parameter.grad for parameter in moe.parameters()]
    assert all(gradient.any() for gradient in gradients)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, whole.parameters(), strict=True))
    assert moe.ledger.read().backwards["lost"] == 3


def test_whoever_fails_in_one_layers_backward_is_not_asked_for_the_next(swarm: MemorySwarm) -> None:
    micro_batch, peer = step_of(), swarm.peers[1]
    x_TD = X_TD.clone().requires_grad_()
    first_ND, _ = swarm.experts.run(x_TD, plan_of(swarm), 0, micro_batch)
    second_ND, _ = swarm.experts.run(first_ND[:20], plan_of(swarm, 1), 1, micro_batch)
    swarm.faults.fail_at(peer.peer_id, Method.BACKWARD, 0, Fault.UNREACHABLE)

    second_ND.sum().backward()

    assert swarm.num_calls(peer, Method.BACKWARD) == 1
    assert micro_batch.scope.ledger.read().backwards == {
        "sent": 6,
        "applied": 4,
        "lost": 2,
        "stale": 0,
        "duplicate": 0,
    }


def test_a_stale_backward_is_refused_counted_and_zero() -> None:
    with MemorySwarm(tiny_run(max_staleness=0), virtual=True) as swarm:
        swarm.add_peers(*LAYOUT)
        plan, micro_batch = plan_of(swarm), step_of()
        x_TD = X_TD.clone().requires_grad_()
        out_ND, _ = swarm.experts.run(x_TD, plan, 0, micro_batch)
        in_between_ND, _ = swarm.experts.run(X_TD.clone().requires_grad_(), plan, 0, step_of())
        in_between_ND.sum().backward()
        versions = swarm.versions()

        out_ND.backward(PULL_ND)

        assert not x_TD.grad.any()
        assert swarm.versions() == versions
        counts = micro_batch.scope.ledger.read()
        assert counts.backwards == {"sent": 3, "applied": 0, "lost": 0, "stale": 3, "duplicate": 0}
        assert not any(micro_batch.scope.is_suspect(peer.peer_id) for peer in swarm.peers)


# ---- peers that say something else than the truth


def tell_lies(peer: SwarmPeer, method: Method, poison: float) -> None:
    """Have the peer work, and answer this instead."""
    honest = peer.host.answer

    async def lie(asked: Method, caller, call) -> AsyncIterator[GroupReply]:
        async for reply in honest(asked, caller, call):
            if asked is not method or reply.tensor is None:
                yield reply
            else:
                spec = reply.tensor.spec
                yield replace(reply, tensor=encode(torch.full(spec.shape, poison), spec.role, spec.codec))

    peer.host.answer = lie


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_never_reaches_the_model(swarm: MemorySwarm, poison: float) -> None:
    peer = swarm.peers[1]
    tell_lies(peer, Method.FORWARD, poison)
    moe, x_TD = swarm.moe(), X_TD.clone().requires_grad_()

    y_TD = moe(x_TD)
    y_TD.square().sum().backward()

    assert y_TD.isfinite().all()
    assert x_TD.grad.isfinite().all()
    counts = moe.ledger.read()
    assert counts.lost_by_reason[LossReason.NON_FINITE] == counts.pairs["lost"] > 0
    assert swarm.num_calls(peer, Method.BACKWARD) == 0
    assert_adds_up(counts)


def test_whoever_sends_what_is_not_finite_is_suspected_and_not_asked_again_in_that_step(swarm: MemorySwarm) -> None:
    peer, micro_batch = swarm.peers[1], step_of()
    tell_lies(peer, Method.FORWARD, float("nan"))

    swarm.experts.run(X_TD, plan_of(swarm), 0, micro_batch)
    swarm.experts.run(X_TD, plan_of(swarm, 1), 1, micro_batch)

    assert swarm.num_calls(peer, Method.FORWARD) == 1


def test_a_gradient_that_is_not_finite_is_a_lost_backward(swarm: MemorySwarm) -> None:
    plan, micro_batch, peer = plan_of(swarm), step_of(), swarm.peers[1]
    tell_lies(peer, Method.BACKWARD, float("nan"))
    x_TD = X_TD.clone().requires_grad_()

    out_ND, _ = swarm.experts.run(x_TD, plan, 0, micro_batch)
    out_ND.backward(PULL_ND)

    torch.testing.assert_close(x_TD.grad, local_gradient(swarm, plan, PULL_ND * ~pairs_at(peer, plan)[:, None]))
    assert micro_batch.scope.ledger.read().backwards["lost"] == 1
    assert micro_batch.scope.is_suspect(peer.peer_id)


def test_an_expert_that_has_gone_is_lost_without_blaming_its_peer(swarm: MemorySwarm) -> None:
    peer, micro_batch, plan = swarm.peers[1], step_of(), plan_of(swarm)
    swarm.run(peer.host.drop(ExpertUid(0, 4)))

    _, ok_N = swarm.experts.run(X_TD, plan, 0, micro_batch)

    assert torch.equal(ok_N, plan.expert_N != 4)
    assert micro_batch.scope.ledger.read().lost_by_reason[LossReason.NO_PRIMARY] == int((~ok_N).sum())
    assert not micro_batch.scope.is_suspect(peer.peer_id)


# ---- whole steps


def losses_of(loop, steps: range) -> list[float]:
    outcomes = [loop.step(step) for step in steps]
    assert all(outcome.skipped is None for outcome in outcomes)
    return [outcome.bits_per_byte for outcome in outcomes]


def test_a_step_that_lost_too_much_is_skipped_before_any_backward_is_sent(swarm: MemorySwarm) -> None:
    with training_loop(swarm) as loop:
        losses_of(loop, range(2))
        versions, trunk = swarm.versions(), {k: v.clone() for k, v in loop.model.state_dict().items()}
        backwards = [swarm.num_calls(peer, Method.BACKWARD) for peer in swarm.peers]
        for peer in swarm.peers[:2]:
            swarm.faults.take_down(peer.peer_id)

        outcome = loop.step(2)

        assert outcome.tokens == 0
        assert "pairs came back" in outcome.skipped
        assert swarm.versions() == versions
        assert [swarm.num_calls(peer, Method.BACKWARD) for peer in swarm.peers] == backwards
        assert all(torch.equal(value, trunk[name]) for name, value in loop.model.state_dict().items())
        assert_adds_up(loop.ledger.read())


def test_training_goes_on_without_a_peer_and_with_it_again_when_it_returns(swarm: MemorySwarm) -> None:
    with training_loop(swarm) as loop:
        gone = swarm.peers[1]
        losses_of(loop, range(2))
        swarm.faults.take_down(gone.peer_id)
        without = losses_of(loop, range(2, 6))
        learnt = gone.versions()
        asked = swarm.num_calls(gone, Method.FORWARD)
        swarm.faults.bring_up(gone.peer_id)
        swarm.announce(gone)

        losses_of(loop, range(6, 8))

        assert all(loss < 20 for loss in without)
        assert asked == 5  # twice per good step, and once to find out
        assert sum(gone.versions().values()) > sum(learnt.values())
        assert_adds_up(loop.ledger.read())


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_lost_on_the_way_everything_stays_finite_and_adds_up(seed: int) -> None:
    with MemorySwarm(virtual=True) as swarm, training_loop(swarm) as loop:
        swarm.network.faults = type(swarm.faults)(seed=seed)
        swarm.add_peers(*LAYOUT)
        swarm.faults.answer_loss, swarm.faults.latency_s, swarm.faults.jitter_s = 0.15, 2.0, 6.0
        skipped = 0

        for step in range(12):
            started_s = swarm.bridge.now_s
            skipped += loop.step(step).skipped is not None
            assert swarm.bridge.now_s - started_s <= swarm.manifest.wire.step_timeout_s + 0.5
            assert_adds_up(loop.ledger.read())
            for peer in swarm.peers:
                swarm.announce(peer)

        counts = loop.ledger.read()
        assert skipped < 12
        assert counts.calls["lost"] > 0
        assert counts.backwards["lost"] > 0
        assert all(value.isfinite().all() for value in loop.model.state_dict().values())
        weights = [weight for state in swarm.states().values() for weight in state.weights.values()]
        assert all(weight.isfinite().all() for weight in weights)


def test_micro_batches_in_flight_lose_their_own_and_add_up() -> None:
    with MemorySwarm(tiny_run(micro_batches=3)) as swarm, training_loop(swarm) as loop:
        swarm.add_peers(*LAYOUT)
        for nth in (3, 10):
            swarm.faults.fail_at(swarm.peers[0].peer_id, Method.FORWARD, nth, Fault.UNREACHABLE)
            swarm.faults.fail_at(swarm.peers[2].peer_id, Method.BACKWARD, nth, Fault.UNREACHABLE)

        for step in range(4):
            assert loop.step(step).skipped is None
            for peer in swarm.peers:
                swarm.announce(peer)

        counts = loop.ledger.read()
        assert_adds_up(counts)
        assert counts.calls["lost"] == 2
        assert counts.pairs["sent"] == 4 * 3 * 2 * 4 * 16 * 2  # steps, micro-batches, layers, B, S, K
        assert all(value.isfinite().all() for value in loop.model.state_dict().values())


def test_a_micro_batch_of_a_step_that_is_over_costs_nobody_anything(swarm: MemorySwarm) -> None:
    micro_batch: MicroBatch = step_of(deadline_in_s=-1.0)

    swarm.experts.run(X_TD, plan_of(swarm), 0, micro_batch)

    assert_adds_up(micro_batch.scope.ledger.read())
    assert micro_batch.scope.worst_layer()[1].share == 0.0
