"""Sequences on their way to other people's experts and back: whole, also when sent again, lost or cut out of a call."""

from collections.abc import Iterator
from contextlib import aclosing

import pytest
import torch
from torch import Tensor

from experts.settings import ExpertShape
from peer.faults import Fault
from peer.manifest import RunManifest
from peer.messages import Call, ExpertRows, GroupReply, Mode
from peer.tensors import Role, encode
from peer.transport import CallRefused, Method, Refusal
from peer.wire_codecs import Codec
from tests.swarm import DIM, PER_LAYER, MemorySwarm, SwarmPeer, local_experts, seeded, step_of, tiny_run
from trainer.remote_experts import Experts
from trainer.routing.plan import Plan
from trainer.routing.view import View
from trainer.swarm import router_for

pytestmark = pytest.mark.swarm

NUM_SEQUENCES, SEQ_LEN = 6, 5
X_TD = torch.randn(NUM_SEQUENCES * SEQ_LEN, DIM, generator=seeded(1))
PULL_ND = torch.randn(2 * NUM_SEQUENCES * SEQ_LEN, DIM, generator=seeded(2))


def block_run() -> RunManifest:
    return tiny_run(expert=ExpertShape(kind="block", dim=DIM, hidden=24))


@pytest.fixture
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm(block_run(), virtual=True) as swarm:
        swarm.spread_over(2)
        yield swarm


def plan_of_sequences() -> Plan:
    routed = router_for(block_run(), 0)(X_TD[::SEQ_LEN], View.all_alive(0, PER_LAYER))
    return routed.spread(SEQ_LEN)


def forget_inputs(peer: SwarmPeer) -> None:
    kept = peer.host._compute._kept
    for key in list(kept._kept):
        kept.discard(key)


def forward(experts: Experts, x_TD: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return experts.run(x_TD, plan, 0, step_of())


@pytest.mark.parametrize("is_forgotten", [False, True], ids=["kept", "sent again"])
def test_outputs_and_gradients_are_those_of_the_same_experts_in_this_process(
    swarm: MemorySwarm, is_forgotten: bool
) -> None:
    plan, here = plan_of_sequences(), local_experts(swarm.manifest)
    x_TD, x_here_TD = X_TD.clone().requires_grad_(), X_TD.clone().requires_grad_()

    out_ND, ok_N = forward(swarm.experts, x_TD, plan)
    if is_forgotten:
        for peer in swarm.peers:
            forget_inputs(peer)
    out_ND.backward(PULL_ND)

    out_here_ND, _ = forward(here, x_here_TD, plan)
    out_here_ND.backward(PULL_ND)
    assert ok_N.all()
    assert [swarm.num_calls(peer, Method.BACKWARD) for peer in swarm.peers] == [1 + is_forgotten] * 2
    torch.testing.assert_close(out_ND, out_here_ND)
    torch.testing.assert_close(x_TD.grad, x_here_TD.grad)


def test_a_lost_call_loses_whole_sequences_and_no_others(swarm: MemorySwarm) -> None:
    lost, answering = swarm.peers
    swarm.faults.fail_at(lost.peer_id, Method.FORWARD, 0, Fault.UNREACHABLE)
    x_TD, plan = X_TD.clone().requires_grad_(), plan_of_sequences()

    out_ND, ok_N = forward(swarm.experts, x_TD, plan)
    plan.combine(out_ND, ok_N).square().sum().backward()

    slots = torch.tensor([uid.index for uid in answering.bank.uids if uid.layer == 0])
    assert torch.equal(ok_N, torch.isin(plan.expert_N, slots))
    ok_LS = ok_N.view(-1, SEQ_LEN)
    assert bool((ok_LS.all(1) == ok_LS.any(1)).all())
    assert not ok_N.all()
    assert x_TD.grad is not None
    assert bool(x_TD.grad.isfinite().all())


def test_experts_that_are_not_here_take_their_own_sequences_out_of_a_call(swarm: MemorySwarm) -> None:
    plan, here = plan_of_sequences(), local_experts(swarm.manifest)
    (gone,) = (uid for uid in swarm.peers[0].bank.uids if str(uid) == "0.2")
    swarm.run(swarm.peers[0].host.drop(gone))
    x_TD, x_here_TD = X_TD.clone().requires_grad_(), X_TD.clone().requires_grad_()

    out_ND, ok_N = forward(swarm.experts, x_TD, plan)
    out_ND.backward(PULL_ND)

    out_here_ND, _ = forward(here, x_here_TD, plan)
    out_here_ND.backward(PULL_ND * ok_N[:, None])
    assert not ok_N.all()
    assert torch.equal(ok_N, plan.expert_N != gone.index)
    torch.testing.assert_close(out_ND[ok_N], out_here_ND[ok_N])
    torch.testing.assert_close(x_TD.grad, x_here_TD.grad)


@pytest.mark.hostile
@pytest.mark.parametrize("lengths", [[4, 6], [17, 3], [10, 11], [5, 0, 5, 10]], ids=str)
def test_lengths_that_cannot_be_are_refused_and_teach_nobody(swarm: MemorySwarm, lengths: list[int]) -> None:
    peer = swarm.peers[0]
    call = Call(
        call_id=b"c" * 16,
        run_id=swarm.manifest.run_id,
        mode=Mode.TRAIN,
        layer=0,
        experts=(ExpertRows(0, 10), ExpertRows(2, 10)),
        reply_codec=Codec.RAW,
        timeout_s=5.0,
        tensors={
            Role.ROWS: encode(X_TD[:20], Role.ROWS, Codec.RAW),
            Role.LENGTHS: encode(torch.tensor(lengths, dtype=torch.int32), Role.LENGTHS, Codec.RAW),
        },
    )

    async def answer() -> list[GroupReply]:
        async with aclosing(peer.host.answer(Method.FORWARD, swarm.trainer.peer_id, call)) as groups:
            return [group async for group in groups]

    with pytest.raises(CallRefused, match="LENGTHS") as refused:
        swarm.run(answer())

    assert refused.value.refusal is Refusal.INVALID
    assert peer.host.kept_bytes == 0
