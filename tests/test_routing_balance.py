import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.routing_layers import linear_router, seeded
from trainer.routing.balance import BiasBalance, SeqLoss, SwitchLoss, ZLoss
from trainer.routing.gate import sigmoid
from trainer.routing.metrics import measure
from trainer.routing.plan import Plan
from trainer.routing.selection import Capacity, Fate, Pairs, Scores, TopK
from trainer.routing.view import View

DIM = 6


def plan_of(
    expert_TK: Tensor, probs_TE: Tensor, *, view: View | None = None, seq_len: int | None = None, logits=None
) -> Plan:
    """A plan that sends each token where it is told."""
    num_tokens, k = expert_TK.shape
    view = view or View.all_alive(0, probs_TE.shape[1])
    scores = Scores(
        logits_TE=probs_TE.log() if logits is None else logits,
        probs_TE=probs_TE,
        prior_E=view.prior_E,
        alive_E=view.alive_E,
        share_E=view.share_E,
        num_live=view.num_live,
        training=True,
        draw_seed=torch.tensor(0),
    )
    token_M = torch.arange(num_tokens).repeat_interleave(k)
    expert_M, rank_M = expert_TK.flatten(), torch.arange(k).repeat(num_tokens)
    pairs = Pairs(token_M, expert_M, rank_M, torch.full_like(token_M, Fate.SENT))
    return Plan.of(pairs, scores, norm="none", scale=1.0, seq_len=seq_len or num_tokens)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 3))
def test_the_switch_loss_is_one_when_use_and_probability_are_the_share_whatever_it_is(parts, dead) -> None:
    total, num_experts = sum(parts), len(parts) + dead
    view = View.of(0, [True] * len(parts) + [False] * dead, capacity=[*map(float, parts), *[7.0] * dead])
    expert_TK = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))[:, None]

    plan = plan_of(expert_TK, view.share_E.expand(total, num_experts), view=view)

    assert float(SwitchLoss(0.5).loss(plan)) == pytest.approx(0.5, abs=1e-6)
    assert float(SeqLoss(1.0).loss(plan)) == pytest.approx(1.0, abs=1e-6)


def test_the_switch_loss_moves_probability_away_from_the_busy() -> None:
    logits_TE = torch.zeros(8, 4, requires_grad=True)
    plan = plan_of(torch.zeros(8, 1, dtype=torch.long), logits_TE.softmax(-1))

    SwitchLoss(1.0).loss(plan).backward()

    assert logits_TE.grad is not None
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_dropped_pairs_still_count_as_wanted() -> None:
    x_TD, view = torch.randn(32, DIM, generator=seeded(0)), View.all_alive(0, 4)
    tight = linear_router(DIM, 4, Capacity(TopK(1), 0.5, 0.5), norm="none", balance=[SwitchLoss(1.0)])
    roomy = linear_router(DIM, 4, 1, norm="none", balance=[SwitchLoss(1.0)])

    tight_plan, roomy_plan = tight(x_TD, view), roomy(x_TD, view)

    assert tight_plan.num_pairs < roomy_plan.num_pairs
    torch.testing.assert_close(tight.loss(tight_plan), roomy.loss(roomy_plan))


def test_the_sequence_loss_sees_what_is_even_only_over_the_batch() -> None:
    # The first sequence uses expert 0 alone, the second expert 1 alone.
    expert_TK = torch.tensor([[0], [0], [1], [1]])
    probs_TE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    plan = plan_of(expert_TK, probs_TE, seq_len=2)

    assert float(SwitchLoss(1.0).loss(plan)) == pytest.approx(1.0)
    assert float(SeqLoss(1.0).loss(plan)) == pytest.approx(2.0)


def test_the_sequence_loss_does_not_depend_on_how_large_sigmoids_are() -> None:
    expert_TK = torch.tensor([[0], [1], [1]])
    probs_TE = torch.tensor([[0.9, 0.3], [0.2, 0.6], [0.1, 0.8]])

    losses = [float(SeqLoss(1.0).loss(plan_of(expert_TK, probs_TE * scale))) for scale in (1.0, 0.01)]

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_z_loss_is_over_the_living() -> None:
    view = View.of(0, [True, True, False])
    logits_TE = torch.tensor([[0.0, 0.0, 50.0], [1.0, 1.0, -50.0]], requires_grad=True)
    plan = plan_of(torch.tensor([[0], [1]]), logits_TE.softmax(-1), view=view, logits=logits_TE)

    loss = ZLoss(1.0).loss(plan)
    loss.backward()

    assert loss.item() == pytest.approx((math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2, rel=1e-6)
    assert logits_TE.grad is not None
    assert not logits_TE.grad[:, 2].any()


def test_a_bias_moves_by_exactly_the_rate_towards_the_share() -> None:
    balance = BiasBalance(5, rate=1e-3)
    view = View.of(0, [True, True, True, True, False], capacity=[1.0, 1.0, 1.0, 5.0, 1.0])
    expert_TK = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3])[:, None]

    balance.observe(plan_of(expert_TK, torch.full((8, 5), 0.2), view=view))

    assert torch.equal(balance.bias_E, 1e-3 * torch.tensor([-1.0, 0.0, 1.0, 1.0, 0.0]))


def test_selection_sees_the_bias_with_zero_mean_over_the_living() -> None:
    balance = BiasBalance(3)
    balance.bias_E = torch.tensor([3.0, 5.0, 100.0])

    assert balance.bias(torch.tensor([True, True, False])).tolist() == [-1.0, 1.0, 0.0]


def test_the_bias_steers_the_choice_and_never_the_weight() -> None:
    x_TD, view = torch.randn(16, DIM, generator=seeded(0)), View.all_alive(0, 4)
    balance = BiasBalance(4)
    router = linear_router(DIM, 4, 2, gate=sigmoid, norm="none", balance=[balance])
    balance.bias_E = torch.tensor([9.0, 8.0, 0.0, 0.0])

    plan = router(x_TD, view)

    assert set(plan.expert_N.tolist()) == {0, 1}
    torch.testing.assert_close(plan.weights_N, (x_TD @ router.score.weight_ED.T).sigmoid()[plan.token_N, plan.expert_N])


def test_biases_even_out_a_router_that_prefers_one_expert() -> None:
    x_TD = torch.randn(256, DIM, generator=seeded(0)) + 2.0
    router = linear_router(DIM, 8, 2, gate=sigmoid, balance=[BiasBalance(8, rate=5e-3)])
    view = View.all_alive(0, 8)

    before = router.observe(router(x_TD, view))
    for _ in range(60):
        after = router.observe(router(x_TD, view))

    assert before.max_violation > 1.0
    assert after.max_violation < 0.5
    assert after.load_entropy > 0.95


def test_forward_changes_nothing_and_observe_does() -> None:
    x_TD, view = torch.randn(16, DIM, generator=seeded(0)), View.all_alive(0, 4)
    router = linear_router(DIM, 4, 2, gate=sigmoid, balance=[BiasBalance(4), SeqLoss(1e-4)])
    before = {name: value.clone() for name, value in router.state_dict().items()}

    plan = router(x_TD, view)
    router.loss(plan)
    unchanged = all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    router.observe(plan)

    assert unchanged
    assert not torch.equal(router.state_dict()["balance.0.bias_E"], before["balance.0.bias_E"])
    assert torch.equal(x_TD, torch.randn(16, DIM, generator=seeded(0)))


def test_balance_state_is_saved_and_restored_with_the_router() -> None:
    x_TD, view = torch.randn(64, DIM, generator=seeded(0)), View.all_alive(0, 4)
    router = linear_router(DIM, 4, 2, gate=sigmoid, balance=[BiasBalance(4, rate=0.1)])
    restored = linear_router(DIM, 4, 2, gate=sigmoid, balance=[BiasBalance(4, rate=0.1)], seed=1)
    router.observe(router(x_TD, view))

    restored.load_state_dict(router.state_dict())

    assert torch.equal(restored(x_TD, view).expert_N, router(x_TD, view).expert_N)


def test_metrics_say_how_even_and_how_much_was_lost() -> None:
    view = View.all_alive(0, 2)
    plan = plan_of(torch.tensor([[0], [0], [0], [1]]), torch.full((4, 2), 0.5), view=view)

    metrics = measure(plan, torch.tensor([True, False, True, True]))

    assert metrics.load_entropy == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert metrics.max_violation == pytest.approx(0.5)
    assert metrics.lost_share == 0.25
    assert metrics.unanswered_share == 0.25
    assert metrics.drop_share == 0.0


def test_metrics_count_drops_and_weigh_use_by_share() -> None:
    view = View.of(0, [True, True, False], capacity=[3.0, 1.0, 1.0])
    router = linear_router(DIM, 3, Capacity(TopK(2), 0.5, 0.5))
    plan = router(torch.randn(8, DIM, generator=seeded(0)), view)

    metrics = measure(plan)

    assert metrics.drop_share == pytest.approx(8 / 16)
    assert metrics.max_violation == pytest.approx(0.5 / 0.25 - 1)
    assert metrics.load_entropy == pytest.approx(1.0)
    assert all(isinstance(value, float) for value in dataclasses.astuple(metrics))
