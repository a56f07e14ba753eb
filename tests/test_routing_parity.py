"""Our presets against the routers of `transformers`, built from their configs without weights: values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.routing_layers import LocalExperts, linear_router, seeded
from trainer.routing.balance import BiasBalance, SwitchLoss, ZLoss
from trainer.routing.gate import sigmoid
from trainer.routing.plan import Plan
from trainer.routing.router import Router
from trainer.routing.selection import Capacity, TopK
from trainer.routing.view import View

pytestmark = pytest.mark.slow

T, D, E = 96, 12, 16
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def answers_and_x() -> tuple[LocalExperts, Tensor]:
    return LocalExperts(E, D, 8, generator=seeded(1)), torch.randn(T, D, generator=seeded(2))


def our_layer(router: Router, experts: LocalExperts, x_TD: Tensor) -> tuple[Tensor, Plan]:
    plan = router(x_TD, View.all_alive(0, E), seq_len=T)
    return plan.combine(experts(plan, plan.dispatch(x_TD))), plan


def their_layer(experts: LocalExperts, x_TD: Tensor, weights_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """The textbook sum over all experts and choices; -1 is a choice that was dropped."""
    y_TD = torch.zeros_like(x_TD)
    for slot in range(E):
        weight_T = (weights_TK * (expert_TK == slot)).sum(-1)
        y_TD = y_TD + weight_T[:, None] * experts.expert(slot, x_TD)
    return y_TD


def assert_same_outputs_and_gradients(
    ours: Tensor, theirs: Tensor, x_TD: Tensor, experts: LocalExperts, our_weight: Tensor, their_weight: Tensor
) -> None:
    direction_TD = torch.randn(T, D, generator=seeded(3)) / T
    shared = [x_TD, *experts.parameters()]

    our_gradients = torch.autograd.grad((ours * direction_TD).sum(), [*shared, our_weight])
    their_gradients = torch.autograd.grad((theirs * direction_TD).sum(), [*shared, their_weight])

    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, **TOLERANCE)
    assert our_gradients[-1].abs().max() > 1e-4


def test_mixtral_is_transformers_mixtral() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

    experts, x_TD = answers_and_x()
    x_TD.requires_grad_()
    router = linear_router(D, E, 2, balance=[SwitchLoss(1.0)])
    reference = MixtralTopKRouter(SimpleNamespace(num_experts_per_tok=2, num_local_experts=E, hidden_size=D))
    reference.weight.data.copy_(router.score.weight_ED)

    ours, plan = our_layer(router, experts, x_TD)
    _, weights_TK, expert_TK = reference(x_TD)
    theirs = their_layer(experts, x_TD, weights_TK, expert_TK)

    assert_same_outputs_and_gradients(ours, theirs, x_TD, experts, router.score.weight_ED, reference.weight)
    # Theirs counts use per token, so it is k times ours.
    our_loss = router.loss(router(x_TD, View.all_alive(0, E)))
    their_loss = load_balancing_loss_func((reference(x_TD)[0],), E, 2)
    torch.testing.assert_close(2 * our_loss, their_loss, **TOLERANCE)
    torch.testing.assert_close(
        2 * torch.autograd.grad(our_loss, router.score.weight_ED)[0],
        torch.autograd.grad(their_loss, reference.weight)[0],
        **TOLERANCE,
    )
    assert plan.num_pairs == 2 * T


@pytest.mark.parametrize("capacity", [4, 6, T])
def test_switch_is_transformers_switch_drops_included(capacity: int) -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
        load_balancing_loss_func,
        router_z_loss_func,
    )

    experts, x_TD = answers_and_x()
    x_TD.requires_grad_()
    factor = capacity * E / T
    router = linear_router(D, E, Capacity(TopK(1), factor, factor), norm="none", balance=[SwitchLoss(1.0), ZLoss(1.0)])
    reference = SwitchTransformersTop1Router(
        SimpleNamespace(
            num_experts=E,
            expert_capacity=capacity,
            hidden_size=D,
            router_bias=False,
            router_jitter_noise=0.0,
            router_ignore_padding_tokens=False,
            router_dtype="float32",
        )
    )
    reference.classifier.weight.data.copy_(router.score.weight_ED)

    ours, plan = our_layer(router, experts, x_TD)
    mask_1TE, weights_1T1, logits_1TE = reference(x_TD[None])
    expert_T1 = torch.where(mask_1TE[0].any(-1), mask_1TE[0].argmax(-1), -1)[:, None]
    theirs = their_layer(experts, x_TD, weights_1T1[0], expert_T1)

    weight, reference_weight = router.score.weight_ED, reference.classifier.weight
    assert_same_outputs_and_gradients(ours, theirs, x_TD, experts, weight, reference_weight)
    assert plan.num_pairs == int(mask_1TE.sum())
    assert (plan.num_pairs < T) is (capacity < T)
    fresh, (_, _, logits_1TE) = router(x_TD, View.all_alive(0, E)), reference(x_TD[None])
    their_loss = load_balancing_loss_func(logits_1TE.softmax(-1), logits_1TE.argmax(-1)) + router_z_loss_func(
        logits_1TE
    )
    our_loss = router.loss(fresh)
    torch.testing.assert_close(our_loss, their_loss, **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(our_loss, weight)[0], torch.autograd.grad(their_loss, reference_weight)[0], **TOLERANCE
    )


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 4)])
def test_deepseek_v3_is_transformers_deepseek_v3_bias_and_groups_included(groups: int, kept: int) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    experts, x_TD = answers_and_x()
    x_TD.requires_grad_()
    balance = BiasBalance(E)
    router = linear_router(D, E, TopK(4, groups, kept), gate=sigmoid, scale=2.5, balance=[balance])
    balance.bias_E = torch.randn(E, generator=seeded(4)) * 0.1
    reference = DeepseekV3TopkRouter(
        SimpleNamespace(
            num_experts_per_tok=4,
            num_local_experts=E,
            hidden_size=D,
            routed_scaling_factor=2.5,
            n_group=groups,
            topk_group=kept,
            norm_topk_prob=True,
        )
    )
    reference.weight.data.copy_(router.score.weight_ED)
    # Recentred, as ours is: a constant in all biases is no preference.
    reference.e_score_correction_bias.copy_(balance.bias_E - balance.bias_E.mean())

    ours, plan = our_layer(router, experts, x_TD)
    _, weights_TK, expert_TK = reference(x_TD)
    theirs = their_layer(experts, x_TD, weights_TK, expert_TK)

    assert_same_outputs_and_gradients(ours, theirs, x_TD, experts, router.score.weight_ED, reference.weight)
    unsteered = linear_router(D, E, TopK(4), gate=sigmoid, scale=2.5)(x_TD, View.all_alive(0, E))
    assert not torch.equal(plan.expert_N, unsteered.expert_N)
