"""One layer's pairs through other people's machines and back, under autograd."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from peer.event_loop import Talk
from peer.messages import ExpertOutcome, GroupReply, Outcome
from peer.tensors import Role, encode
from peer.transport import Method
from peer.wire_codecs import Codec
from tests.swarm import DIM, MemorySwarm, VirtualBridge, local_experts, local_states, seeded, step_of, tiny_run, uids
from trainer.ledger import LossReason
from trainer.remote_experts import RemoteExperts
from trainer.routing.plan import Plan
from trainer.routing.view import View
from trainer.scope import MicroBatch
from trainer.swarm import router_for

X_TD = torch.randn(20, DIM, generator=seeded(1))
PULL_ND = torch.randn(40, DIM, generator=seeded(2))
"""The gradient that comes back to each pair's output."""


@pytest.fixture
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm(virtual=True) as swarm:
        swarm.add_peers("0.0 0.3 1.0", "0.1 0.4", "0.5 0.2")
        yield swarm


def plan_of(swarm: MemorySwarm, *, layer: int = 0, x_TD: Tensor = X_TD) -> Plan:
    with torch.no_grad():
        return router_for(swarm.manifest, layer)(x_TD, View.all_alive(layer, swarm.manifest.experts_per_layer))


def there_and_back(experts, plan: Plan, micro_batch: MicroBatch | None = None) -> tuple[Tensor, Tensor]:
    x_TD = X_TD.clone().requires_grad_()
    out_ND, ok_N = experts.run(x_TD, plan, 0, micro_batch or step_of())
    assert ok_N.all()
    out_ND.backward(PULL_ND)
    return out_ND.detach(), x_TD.grad


def forget_inputs(swarm: MemorySwarm) -> None:
    for peer in swarm.peers:
        kept = peer.host._compute._kept
        for key in list(kept._kept):
            kept.discard(key)
        assert peer.host._compute.kept_bytes == 0


def test_outputs_gradients_and_steps_are_those_of_the_same_experts_in_this_process(swarm: MemorySwarm) -> None:
    here, plan = local_experts(swarm.manifest), plan_of(swarm)

    out_ND, grad_TD = there_and_back(swarm.experts, plan)
    out_here_ND, grad_here_TD = there_and_back(here, plan)

    torch.testing.assert_close(out_ND, out_here_ND)
    torch.testing.assert_close(grad_TD, grad_here_TD)
    local = local_states(here)
    for uid, state in swarm.states().items():
        assert state.clock == local[uid].clock
        for name, weight in state.weights.items():
            torch.testing.assert_close(weight, local[uid].weights[name])


def test_each_peer_gets_one_call_and_each_of_its_rows_once(swarm: MemorySwarm) -> None:
    micro_batch, plan = step_of(), plan_of(swarm)
    slots_of = [[0, 3], [1, 4], [2, 5]]
    rows = sum(len(set(plan.token_N[torch.isin(plan.expert_N, torch.tensor(slots))].tolist())) for slots in slots_of)

    out_ND, _ = swarm.experts.run(X_TD.clone().requires_grad_(), plan, 0, micro_batch)

    assert [swarm.num_calls(peer, Method.FORWARD) for peer in swarm.peers] == [1, 1, 1]
    bytes_up = micro_batch.scope.ledger.read().bytes_up
    assert rows < plan.num_pairs
    assert rows * DIM * 4 + plan.num_pairs * 4 < bytes_up < rows * DIM * 4 + plan.num_pairs * 4 + 3 * 200
    before_backward = bytes_up
    out_ND.backward(PULL_ND)
    backward_bytes = micro_batch.scope.ledger.read().bytes_up - before_backward
    assert backward_bytes < plan.num_pairs * DIM * 4 + 3 * 200  # gradients only: no row travels twice


def test_everything_that_came_back_is_counted(swarm: MemorySwarm) -> None:
    micro_batch, plan = step_of(), plan_of(swarm)

    there_and_back(swarm.experts, plan, micro_batch)

    counts = micro_batch.scope.ledger.read()
    assert counts.calls == {"sent": 3, "answered": 3, "lost": 0, "retried": 0, "hedged": 0}
    assert counts.pairs == {"sent": 40, "answered": 40, "lost": 0, "declined": 0}
    assert counts.backwards == {"sent": 3, "applied": 3, "lost": 0, "stale": 0, "duplicate": 0}
    assert counts.bytes_up > 0
    assert counts.bytes_down > 0
    assert micro_batch.scope.worst_layer()[1].share == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tokens_of_another_precision_travel_as_float32_and_come_back_as_they_were(
    swarm: MemorySwarm, dtype: torch.dtype
) -> None:
    x_TD = X_TD.to(dtype).requires_grad_()

    out_ND, ok_N = swarm.experts.run(x_TD, plan_of(swarm), 0, step_of())
    out_ND.sum().backward()

    assert ok_N.all()
    assert out_ND.dtype is x_TD.grad.dtype is dtype
    assert x_TD.grad.any()


def test_tokens_without_a_gradient_of_their_own_still_teach_the_experts(swarm: MemorySwarm) -> None:
    out_ND, _ = swarm.experts.run(X_TD, plan_of(swarm), 0, step_of())

    out_ND.backward(PULL_ND)

    assert {uid: v for uid, v in swarm.versions().items() if uid.startswith("0.")} == dict.fromkeys(
        ["0.0", "0.3", "0.1", "0.4", "0.5", "0.2"], 1
    )


def test_an_empty_plan_asks_nobody(swarm: MemorySwarm) -> None:
    nobody = View.of(0, [False] * 6)
    with torch.no_grad():
        plan = router_for(swarm.manifest, 0)(X_TD, nobody)
    micro_batch = step_of()

    out_ND, ok_N = swarm.experts.run(X_TD.clone().requires_grad_(), plan, 0, micro_batch)
    plan.combine(out_ND, ok_N).sum().backward()

    assert out_ND.shape == (0, DIM)
    assert ok_N.shape == (0,)
    assert micro_batch.scope.worst_layer()[1].share == 0.0


# ---- backward happens once, and only after training


def test_inputs_a_peer_has_forgotten_are_sent_again_and_nothing_else_differs(swarm: MemorySwarm) -> None:
    here, plan, micro_batch = local_experts(swarm.manifest), plan_of(swarm), step_of()
    x_TD = X_TD.clone().requires_grad_()
    out_ND, _ = swarm.experts.run(x_TD, plan, 0, micro_batch)
    forget_inputs(swarm)

    out_ND.backward(PULL_ND)

    _, grad_here_TD = there_and_back(here, plan)
    torch.testing.assert_close(x_TD.grad, grad_here_TD)
    assert [swarm.num_calls(peer, Method.BACKWARD) for peer in swarm.peers] == [2, 2, 2]
    assert micro_batch.scope.ledger.read().backwards == {
        "sent": 3,
        "applied": 3,
        "lost": 0,
        "stale": 0,
        "duplicate": 0,
    }
    assert set(swarm.versions().values()) == {0, 1}
    assert micro_batch.scope.ledger.read().calls == {"sent": 3, "answered": 3, "lost": 0, "retried": 3, "hedged": 0}


def test_a_backward_that_was_applied_and_whose_answer_is_gone_is_lost_and_said(swarm: MemorySwarm) -> None:
    plan, micro_batch = plan_of(swarm), step_of()
    x_TD = X_TD.clone().requires_grad_()
    out_ND, _ = swarm.experts.run(x_TD, plan, 0, micro_batch)
    for peer in swarm.peers:
        compute = peer.host._compute
        (key,) = compute._kept._kept
        compute._applied.record(key, None, size_bytes=0, now_s=float("-inf"))

    out_ND.backward(PULL_ND)

    assert not x_TD.grad.any()
    assert set(swarm.versions().values()) == {0}
    assert micro_batch.scope.ledger.read().backwards == {
        "sent": 3,
        "applied": 0,
        "lost": 3,
        "stale": 0,
        "duplicate": 3,
    }


def test_inputs_sent_again_are_of_the_pairs_that_came_back_only(swarm: MemorySwarm) -> None:
    plan, micro_batch = plan_of(swarm), step_of()
    swarm.bridge.run(swarm.peers[0].host.drop(uids("0.3")[0]), timeout_s=1.0)
    x_TD = X_TD.clone().requires_grad_()
    out_ND, ok_N = swarm.experts.run(x_TD, plan, 0, micro_batch)
    forget_inputs(swarm)

    out_ND.backward(PULL_ND)

    assert torch.equal(ok_N, plan.expert_N != 3)
    here = local_experts(swarm.manifest)
    x_here_TD = X_TD.clone().requires_grad_()
    out_here_ND, _ = here.run(x_here_TD, plan, 0, step_of())
    out_here_ND.backward(PULL_ND * ok_N[:, None])
    torch.testing.assert_close(x_TD.grad, x_here_TD.grad)
    counts = micro_batch.scope.ledger.read()
    assert counts.backwards["applied"] == 3
    assert counts.lost_by_reason[LossReason.NO_PRIMARY] == int((~ok_N).sum())


def test_a_second_backward_through_one_forward_is_refused(swarm: MemorySwarm) -> None:
    out_ND, _ = swarm.experts.run(X_TD.clone().requires_grad_(), plan_of(swarm), 0, step_of())
    out_ND.sum().backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="once"):
        out_ND.sum().backward()

    assert set(swarm.versions().values()) == {0, 1}


def test_a_gradient_of_the_gradient_is_refused(swarm: MemorySwarm) -> None:
    x_TD = X_TD.clone().requires_grad_()
    out_ND, _ = swarm.experts.run(x_TD, plan_of(swarm), 0, step_of())
    (grad_TD,) = torch.autograd.grad(out_ND.square().sum(), x_TD, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_TD.sum().backward()


# ---- evaluation


@pytest.mark.parametrize("how", ["no_grad", "evaluating"])
def test_evaluation_teaches_nobody_keeps_nothing_and_is_in_no_counter(swarm: MemorySwarm, how: str) -> None:
    micro_batch, before = step_of(train=how == "no_grad"), swarm.states()

    with torch.set_grad_enabled(how != "no_grad"):
        out_ND, ok_N = swarm.experts.run(X_TD, plan_of(swarm), 0, micro_batch)

    assert ok_N.all()
    assert out_ND.any()
    counts = micro_batch.scope.ledger.read()
    assert (counts.calls["sent"], counts.pairs["sent"], counts.bytes_up, counts.bytes_down) == (0, 0, 0, 0)
    assert micro_batch.scope.worst_layer() is None
    assert all(peer.host._compute.kept_bytes == 0 for peer in swarm.peers)
    assert all(status.rows_served == 0 for peer in swarm.peers for status in peer.host.statuses)
    after = swarm.states()
    assert all(after[uid].clock == before[uid].clock for uid in before)


def test_a_backward_through_evaluation_is_refused_instead_of_silently_zero(swarm: MemorySwarm) -> None:
    out_ND, _ = swarm.experts.run(X_TD.clone().requires_grad_(), plan_of(swarm), 0, step_of(train=False))

    with pytest.raises(RuntimeError, match="evaluation"):
        out_ND.sum().backward()


# ---- whom to ask, and how long


def test_an_expert_that_two_peers_serve_is_asked_of_the_earlier_claim(swarm: MemorySwarm) -> None:
    later = swarm.add_peer(uids("0.0"))

    swarm.experts.run(X_TD, plan_of(swarm), 0, step_of())

    assert swarm.num_calls(later, Method.FORWARD) == 0


def test_when_the_first_is_suspected_or_absent_the_next_is_asked(swarm: MemorySwarm) -> None:
    first, later = swarm.peers[0], swarm.add_peer(uids("0.0 0.3"))
    swarm.faults.take_down(first.peer_id)
    plan, micro_batch = plan_of(swarm), step_of()
    swarm.experts.run(X_TD, plan, 0, micro_batch)

    _, ok_suspected_N = swarm.experts.run(X_TD, plan, 0, micro_batch)
    _, ok_absent_N = swarm.experts.run(X_TD, plan, 0, step_of())

    assert ok_suspected_N.all()
    assert ok_absent_N.all()
    assert swarm.num_calls(first, Method.FORWARD) == 1
    assert swarm.num_calls(later, Method.FORWARD) == 2


def test_an_absent_peer_is_asked_again_once_it_has_been_heard_of(swarm: MemorySwarm) -> None:
    peer, plan = swarm.peers[0], plan_of(swarm)
    swarm.faults.take_down(peer.peer_id)
    swarm.experts.run(X_TD, plan, 0, step_of())
    assert swarm.view(0).alive_E.tolist() == [False, True, True, False, True, True]
    swarm.faults.bring_up(peer.peer_id)

    swarm.announce(peer)

    assert swarm.view(0).alive_E.all()
    _, ok_N = swarm.experts.run(X_TD, plan, 0, step_of())
    assert ok_N.all()


def test_when_the_step_is_over_nobody_is_asked_and_nobody_blamed(swarm: MemorySwarm) -> None:
    micro_batch = step_of(deadline_in_s=-1.0)

    _, ok_N = swarm.experts.run(X_TD, plan_of(swarm), 0, micro_batch)

    assert not ok_N.any()
    assert micro_batch.scope.ledger.read().lost_by_reason[LossReason.TIMEOUT] == 40
    assert [swarm.num_calls(peer, Method.FORWARD) for peer in swarm.peers] == [0, 0, 0]
    assert not any(micro_batch.scope.is_suspect(peer.peer_id) for peer in swarm.peers)
    assert swarm.view(0).alive_E.all()


def test_calls_are_granted_what_is_left_of_the_step(swarm: MemorySwarm) -> None:
    for peer in swarm.peers:
        swarm.faults.take_down(peer.peer_id)
        swarm.faults.bring_up(peer.peer_id)
    swarm.faults.latency_s = 5.0
    started_s, micro_batch = swarm.bridge.now_s, step_of(deadline_in_s=2.0)

    _, ok_N = swarm.experts.run(X_TD, plan_of(swarm), 0, micro_batch)

    assert not ok_N.any()
    assert swarm.bridge.now_s - started_s <= 2.5


def test_rows_that_are_written_to_between_forward_and_backward_teach_nobody_anything_else(swarm: MemorySwarm) -> None:
    leaf_TD = X_TD.clone().requires_grad_()
    x_TD = leaf_TD * 1.0
    out_ND, _ = swarm.experts.run(x_TD, plan_of(swarm), 0, step_of())
    with torch.no_grad():
        x_TD.add_(1.0)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out_ND.sum().backward()

    assert all(version == 0 for peer in swarm.peers for version in peer.versions().values())


def test_a_call_says_how_much_the_router_wanted_its_pairs(swarm: MemorySwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, scores = plan_of(swarm), []
    for peer in swarm.peers:
        answer = peer.host.answer
        monkeypatch.setattr(
            peer.host, "answer", lambda *args, answer=answer: scores.append(args[2].score) or answer(*args)
        )

    swarm.experts.run(X_TD, plan, 0, step_of())

    by_peer = [{uid.index for uid in peer.bank.uids if uid.layer == 0} for peer in swarm.peers]
    wanted = [float(plan.weights_N[[int(slot) in slots for slot in plan.expert_N]].mean()) for slots in by_peer]
    assert sorted(scores) == pytest.approx(sorted(wanted))


class _LateLoop:
    """A loop that is too busy to say in time how a call ended."""

    def listen(self, talks: Iterable[object], *, timeout_s: float) -> Iterator[object]:
        yield from ()
        assert list(talks)
        raise TimeoutError


def test_a_loop_that_answers_too_late_loses_the_calls_and_not_the_training(swarm: MemorySwarm) -> None:
    experts = RemoteExperts(
        run_id=swarm.manifest.run_id,
        wire=tiny_run().wire,
        transport=swarm.transport,
        directory=swarm.directory,
        loop=_LateLoop(),
    )
    micro_batch = step_of()

    _, ok_N = experts.run(X_TD, plan_of(swarm), 0, micro_batch)

    assert not ok_N.any()
    assert micro_batch.scope.ledger.read().lost_by_reason[LossReason.TIMEOUT] == 40
    assert not any(micro_batch.scope.is_suspect(peer.peer_id) for peer in swarm.peers)


class _GarblingLoop:
    """Hears good answers, then without end a group whose rows fit nowhere."""

    def __init__(self, bridge: VirtualBridge, *, num_good: int) -> None:
        self._bridge = bridge
        self._num_good = num_good
        self.is_listening = False

    def listen(self, talks: Iterable[Talk[Any]], *, timeout_s: float) -> Iterator[Any]:
        if self._num_good > 0:
            self._num_good -= 1
            yield from self._bridge.listen(talks, timeout_s=timeout_s)
            return
        assert list(talks)
        self.is_listening = True
        try:
            for width in itertools.count(3):
                rows = encode(torch.zeros(1, width), Role.ROWS, Codec.RAW)
                yield 0, GroupReply((ExpertOutcome(0, Outcome.OK, 0),), rows)
        finally:
            self.is_listening = False


@pytest.mark.parametrize("num_good", [0, 1], ids=["forward", "backward"])
def test_an_answer_that_cannot_be_placed_ends_every_call_of_its_layer(swarm: MemorySwarm, num_good: int) -> None:
    loop = _GarblingLoop(swarm.bridge, num_good=num_good)
    experts = RemoteExperts(
        run_id=swarm.manifest.run_id,
        wire=tiny_run().wire,
        transport=swarm.transport,
        directory=swarm.directory,
        loop=loop,
    )

    with pytest.raises(RuntimeError) as raised:  # whose traceback keeps every frame it went through
        there_and_back(experts, plan_of(swarm))

    assert "size" in str(raised.value)
    assert not loop.is_listening


def test_over_a_real_loop_a_silent_swarm_costs_one_deadline() -> None:
    with MemorySwarm(tiny_run(call_timeout_s=0.05)) as swarm:
        swarm.add_peers("0.0 0.3", "0.1 0.4", "0.5 0.2")
        swarm.faults.answer_loss = 1.0
        started_s = time.monotonic()

        _, ok_N = swarm.experts.run(X_TD, plan_of(swarm), 0, step_of())

        assert not ok_N.any()
        assert 0.05 <= time.monotonic() - started_s <= 0.55
