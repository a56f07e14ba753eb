"""Layers of experts that see sequences: routed, sent, combined and lost as wholes, and blind to the future."""

import pytest
import torch
from torch import Tensor

from experts.registry import expert_kind
from experts.settings import ExpertShape
from experts.uid import ExpertUid
from peer.errors import BadConfiguration
from peer.manifest import RunManifest
from tests.swarm import DIM, PER_LAYER, local_experts, local_states, seeded, tiny_run
from trainer.local_experts import LocalExperts
from trainer.moe import MoELayer
from trainer.routing.view import View
from trainer.swarm import router_for, sees_sequences

BLOCK = ExpertShape(kind="block", dim=DIM, hidden=24)
X_BSD = torch.randn(3, 5, DIM, generator=seeded(0))


def block_run() -> RunManifest:
    return tiny_run(expert=BLOCK)


def layer_of(experts: LocalExperts) -> MoELayer:
    return MoELayer(
        0,
        router_for(block_run(), 0),
        experts,
        lambda layer: View.all_alive(layer, PER_LAYER),
        timeout_s=5.0,
        whole_sequences=True,
    )


def test_every_token_of_a_sequence_goes_where_its_first_token_points_with_its_weights() -> None:
    experts = local_experts(block_run())
    moe = layer_of(experts)
    plan = moe.router(X_BSD[:, 0], View.all_alive(0, PER_LAYER))
    states = local_states(experts)
    expected_BSD = torch.zeros_like(X_BSD)
    for sequence, slot, weight in zip(plan.token_N, plan.expert_N, plan.weights_N, strict=True):
        weights = states[ExpertUid(0, int(slot))].weights
        one_LSD = X_BSD[sequence][None]
        out_LSD = expert_kind("block").apply(BLOCK, one_LSD, weights, lengths_L=torch.tensor([5]))
        expected_BSD[sequence] += weight.detach() * out_LSD[0]

    out_BSD = moe(X_BSD)

    torch.testing.assert_close(out_BSD, expected_BSD, rtol=1e-5, atol=1e-6)
    assert moe.metrics.pairs_sent == 2 * 3 * 5
    assert moe.loss.requires_grad


def test_a_token_hears_nothing_of_those_after_it_not_even_through_the_router() -> None:
    moe = layer_of(local_experts(block_run())).eval()
    changed_BSD = X_BSD.clone()
    changed_BSD[:, 3:] *= -2.0

    before, after = moe(X_BSD), moe(changed_BSD)

    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])


def test_gradients_reach_every_token_and_the_router() -> None:
    moe = layer_of(local_experts(block_run()))
    x_BSD = X_BSD.clone().requires_grad_()

    moe(x_BSD).square().sum().backward()

    assert x_BSD.grad is not None
    assert bool((x_BSD.grad.norm(dim=-1) > 0).all())
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in moe.router.parameters())


def test_a_spread_plan_keeps_sequences_together_and_says_their_lengths() -> None:
    routed = router_for(block_run(), 0)(X_BSD[:, 0], View.all_alive(0, PER_LAYER))

    plan = routed.spread(5)

    assert (plan.num_tokens, plan.num_pairs) == (15, 5 * routed.num_pairs)
    assert plan.lengths(plan.num_pairs) == [5] * routed.num_pairs
    assert routed.lengths(routed.num_pairs) is None
    assert torch.equal(plan.token_N.view(-1, 5), routed.token_N[:, None] * 5 + torch.arange(5))
    assert torch.equal(plan.weights_N.view(-1, 5), routed.weights_N[:, None].expand(-1, 5))
    assert [slot for slot, _ in plan.groups()] == [slot for slot, _ in routed.groups()]


def test_a_kind_that_is_not_installed_here_is_said_to_be_so() -> None:
    with pytest.raises(BadConfiguration, match="lacks: expert kind 'of_others' is not known"):
        sees_sequences(tiny_run(expert=ExpertShape(kind="of_others", dim=DIM, hidden=24)))


@pytest.mark.parametrize("shape", [(DIM,), (7, DIM), (2, 5, DIM), (2, 3, 4, DIM), (0, 4, DIM)], ids=str)
def test_any_leading_shape_comes_back_as_it_went(shape: tuple[int, ...]) -> None:
    x: Tensor = torch.randn(shape, generator=seeded(1))

    assert layer_of(local_experts(block_run()))(x).shape == shape
