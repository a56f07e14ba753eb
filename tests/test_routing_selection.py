import itertools

import pytest
import torch

from tests.routing_layers import linear_router, seeded
from trainer.routing.gate import sigmoid, softmax
from trainer.routing.presets import build_router
from trainer.routing.score import GridScore, LinearScore
from trainer.routing.selection import Capacity, Fate, SampledSecond, Scores, TopK, best, position_within
from trainer.routing.view import View


def scores_of(probs: list[list[float]], *, training: bool = True, view: View | None = None, seed: int = 0) -> Scores:
    probs_TE = torch.tensor(probs)
    view = view or View.all_alive(0, probs_TE.shape[1])
    return Scores(
        logits_TE=probs_TE.log(),
        probs_TE=probs_TE,
        prior_E=view.prior_E,
        alive_E=view.alive_E,
        share_E=view.share_E,
        num_live=view.num_live,
        training=training,
        draw_seed=torch.tensor(seed),
    )


@pytest.mark.parametrize("gate", [softmax, sigmoid])
def test_a_dead_expert_has_probability_exactly_zero(gate) -> None:
    logits_TE = torch.tensor([[0.0, 1e30, -3.0], [-1e30, 3e38, 1.0]])

    probs_TE = gate(logits_TE, torch.tensor([True, False, True]))

    assert probs_TE[:, 1].tolist() == [0.0, 0.0]
    assert probs_TE.isfinite().all()
    torch.testing.assert_close(probs_TE[:, [0, 2]], gate(logits_TE[:, [0, 2]], torch.tensor([True, True])))


@pytest.mark.parametrize("gate", [softmax, sigmoid])
def test_with_nobody_alive_every_probability_and_gradient_is_zero(gate) -> None:
    logits_TE = torch.randn(3, 4, generator=seeded(0), requires_grad=True)

    probs_TE = gate(logits_TE, torch.zeros(4, dtype=torch.bool))
    probs_TE.sum().backward()

    assert not probs_TE.any()
    assert logits_TE.grad is not None
    assert not logits_TE.grad.any()


def test_a_score_is_float32_for_bfloat16_tokens_under_autocast() -> None:
    score = LinearScore(8, 4, generator=seeded(0))
    x_TD = torch.randn(5, 8, generator=seeded(1)).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE = score(x_TD)

    torch.testing.assert_close(logits_TE, x_TD.float() @ score.weight_ED.T, rtol=0, atol=0)


def test_the_best_are_chosen_by_probability_plus_prior() -> None:
    view = View.of(0, [True] * 3, bias=[-0.5, 0.1, 0.4])

    pairs = TopK(2)(scores_of([[0.6, 0.3, 0.1]], view=view))

    assert pairs.expert_M.tolist() == [2, 1]
    assert pairs.rank_M.tolist() == [0, 1]


@pytest.mark.parametrize("k", [1, 2, 8, 64])
@pytest.mark.parametrize("num_experts", [1000, 1024, 2048])
def test_among_many_experts_the_best_are_those_torch_finds(num_experts: int, k: int) -> None:
    choice_TE = torch.randn(5, num_experts, generator=seeded(k))
    choice_TE[:, ::3] = -torch.inf
    choice_TE[0, : num_experts - k - 1] = -torch.inf

    value_TK, expert_TK = best(choice_TE, k)

    assert torch.equal(value_TK, choice_TE.topk(k, dim=-1).values)
    assert torch.equal(choice_TE.gather(1, expert_TK), value_TK)
    assert all(len(set(row)) == k for row in expert_TK.tolist())


def test_fewer_living_experts_than_k_make_fewer_pairs() -> None:
    view = View.of(0, [False, True, False])

    pairs = TopK(2)(scores_of([[0.0, 1.0, 0.0]] * 2, view=view))

    assert pairs.token_M.tolist() == [0, 1]
    assert pairs.expert_M.tolist() == [1, 1]


def test_groups_bound_where_a_token_reaches() -> None:
    # Expert 4 is the best of all, but its group's two best sum to less than the others'.
    probs = [[0.5, 0.4, 0.45, 0.4, 0.6, 0.1]]

    pairs = TopK(3, groups=3, groups_kept=2)(scores_of(probs))

    assert pairs.expert_M.tolist() == [0, 2, 1]


def test_a_group_with_one_survivor_can_still_be_chosen_and_a_dead_one_never() -> None:
    view = View.of(0, [False, False, False, True, True, True])

    pairs = TopK(3, groups=3, groups_kept=2)(scores_of([[0, 0, 0, 0.5, 0.2, 0.1]], view=view))

    assert pairs.expert_M.tolist() == [3, 4, 5]


def test_groups_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="equal groups"):
        TopK(1, groups=2)(scores_of([[0.2, 0.3, 0.5]]))


def test_positions_count_earlier_entries_of_the_same_expert() -> None:
    assert position_within(torch.tensor([2, 0, 2, 2, 0]), 3).tolist() == [0, 0, 1, 2, 1]


def test_a_full_expert_drops_the_latest_tokens() -> None:
    probs = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]]

    pairs = Capacity(TopK(1), 1.0, 2.0)(scores_of(probs))

    assert pairs.fate_M.tolist() == [Fate.SENT, Fate.SENT, Fate.CAPACITY, Fate.SENT]


def test_capacity_follows_the_share_and_widens_in_evaluation() -> None:
    view = View.of(0, [True, True], capacity=[3.0, 1.0])
    probs = [[0.9, 0.1]] * 4

    train = Capacity(TopK(1), 1.0, 4 / 3)(scores_of(probs, view=view))
    evaluation = Capacity(TopK(1), 1.0, 4 / 3)(scores_of(probs, view=view, training=False))

    assert (train.fate_M == Fate.SENT).sum() == 3
    assert (evaluation.fate_M == Fate.SENT).sum() == 4


def test_a_whole_number_of_places_is_not_rounded_up_by_float32_shares() -> None:
    # 21 pairs * float32(1 / 7) is a little over 3.
    probs = [[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]] * 21

    pairs = Capacity(TopK(1), 1.0, 1.0)(scores_of(probs))

    assert (pairs.fate_M == Fate.SENT).sum() == 3


def test_capacity_never_depends_on_later_tokens() -> None:
    router = linear_router(8, 4, Capacity(TopK(2), 1.0, 1.0))
    x_TD = torch.randn(24, 8, generator=seeded(0))
    others_TD = torch.cat([x_TD[:12], torch.randn(12, 8, generator=seeded(1))])

    one, other = router(x_TD, View.all_alive(0, 4)), router(others_TD, View.all_alive(0, 4))

    def sent_early(plan) -> set[tuple[int, int]]:
        return {(t, e) for t, e in zip(plan.token_N.tolist(), plan.expert_N.tolist(), strict=True) if t < 12}

    assert one.dropped()[Fate.CAPACITY] > 0
    assert sent_early(one) == sent_early(other)


def test_a_seconds_chance_is_twice_its_share_of_the_two() -> None:
    probs = [[0.85, 0.15]] * 4000

    pairs = SampledSecond(TopK(2))(scores_of(probs))

    used = (pairs.fate_M[pairs.rank_M == 1] == Fate.SENT).float().mean()
    assert (pairs.fate_M[pairs.rank_M == 0] == Fate.SENT).all()
    assert abs(float(used) - 0.30) < 0.03


def test_an_even_second_is_always_used_and_evaluation_rolls_no_dice() -> None:
    even = SampledSecond(TopK(2))(scores_of([[0.5, 0.5]] * 100))
    evaluation = SampledSecond(TopK(2))(scores_of([[0.99, 0.01]] * 100, training=False))

    assert (even.fate_M == Fate.SENT).all()
    assert (evaluation.fate_M == Fate.SENT).all()


def test_a_pair_left_out_by_the_dice_takes_no_place() -> None:
    # Both tokens want expert 0 second; at a factor of 0.5 there is one place, and the dice left out the first token's.
    seed = next(s for s in range(100) if _draws(s)[0] > 0.9 and _draws(s)[1] < 0.1)

    pairs = Capacity(SampledSecond(TopK(2)), 0.5, 1.0)(scores_of([[0.3, 0.7], [0.3, 0.7]], seed=seed))

    seconds = pairs.fate_M[pairs.rank_M == 1].tolist()
    assert seconds == [Fate.NOT_DRAWN, Fate.SENT]


def _draws(seed: int) -> list[float]:
    return torch.rand(2, generator=seeded(seed)).tolist()


def test_the_dice_fall_the_same_until_the_router_observes_and_touch_no_global_state() -> None:
    router = build_router("gshard", dim=8, num_experts=4, seed=1)
    view, x_TD = View.all_alive(0, 4), torch.randn(64, 8, generator=seeded(0))
    global_state = torch.get_rng_state()

    first, again = router(x_TD, view), router(x_TD, view)
    router.observe(first)
    later = router(x_TD, view)

    assert torch.equal(first.chosen.fate_M, again.chosen.fate_M)
    assert not torch.equal(first.token_N, later.token_N)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("num_experts", [1, 5, 12, 16])
def test_the_k_best_of_a_product_key_grid_are_found_axis_by_axis(num_experts: int) -> None:
    score = GridScore(8, num_experts, generator=seeded(2))
    x_TD = torch.randn(10, 8, generator=seeded(3))

    logits_TE = score(x_TD)
    axes_TP = x_TD @ score.weight_PD.T

    cells = list(itertools.product(range(score.rows), range(score.columns)))[:num_experts]
    by_cell_TE = torch.stack([axes_TP[:, r] + axes_TP[:, score.rows + c] for r, c in cells], dim=-1)
    torch.testing.assert_close(logits_TE, by_cell_TE)
    if num_experts != score.rows * score.columns:
        return
    # The k best cells lie in the k best rows and the k best columns: what a search that knows only the axes finds.
    k = min(4, score.columns)
    rows_TK = axes_TP[:, : score.rows].topk(min(k, score.rows)).indices
    columns_TK = axes_TP[:, score.rows :].topk(k).indices
    candidates = (rows_TK[:, :, None] * score.columns + columns_TK[:, None, :]).flatten(1)
    found_TK = candidates.gather(1, logits_TE.gather(1, candidates).topk(k).indices)
    assert torch.equal(found_TK, logits_TE.topk(k).indices)


def test_a_grid_needs_parameters_for_its_axes_only() -> None:
    score = GridScore(8, 1000, generator=seeded(0))

    assert score.weight_PD.shape == (32 + 32, 8)
