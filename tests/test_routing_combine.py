"""Dispatch and combine, with calls lost: the invariants a router must keep whatever the network does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.routing_layers import LocalExperts, linear_router, seeded
from trainer.routing.gate import sigmoid
from trainer.routing.plan import Norm, Plan
from trainer.routing.presets import build_router, presets
from trainer.routing.selection import Capacity, Fate, TopK
from trainer.routing.view import View

DIM = 6
seeds = st.integers(0, 2**31)
properties = settings(max_examples=20, deadline=None, derandomize=True)


def tokens(seed: int, num_tokens: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, DIM, generator=seeded(seed), dtype=dtype)


def losses(plan: Plan, seed: int, share: float = 0.4) -> Tensor:
    return torch.rand(plan.num_pairs, generator=seeded(seed)) >= share


def dense_sum(plan: Plan, out_ND: Tensor, weights_N: Tensor) -> Tensor:
    """The oracle: one pair after the other."""
    y_TD = torch.zeros(plan.num_tokens, DIM, dtype=out_ND.dtype)
    for row, token in enumerate(plan.token_N.tolist()):
        y_TD[token] += weights_N[row] * out_ND[row]
    return y_TD


def test_pairs_are_sorted_by_expert_then_token_and_grouped() -> None:
    plan = linear_router(DIM, 4, 2)(tokens(0), View.all_alive(0, 4))

    keys = list(zip(plan.expert_N.tolist(), plan.token_N.tolist(), strict=True))
    assert keys == sorted(keys)
    assert plan.num_pairs == 20
    rows = [(slot, row) for slot, group in plan.groups() for row in range(plan.num_pairs)[group]]
    assert rows == list(zip(plan.expert_N.tolist(), range(20), strict=True))


def test_dispatch_gives_each_pair_its_tokens_row() -> None:
    x_TD = tokens(0)
    plan = linear_router(DIM, 4, 2)(x_TD, View.all_alive(0, 4))

    assert torch.equal(plan.dispatch(x_TD), x_TD[plan.token_N])


@pytest.mark.parametrize("norm", ["none", "planned", "responded"])
def test_combine_is_the_weighted_sum_of_what_came_back(norm: Norm) -> None:
    plan = linear_router(DIM, 4, 3, norm=norm, scale=2.5)(tokens(0), View.all_alive(0, 4))
    out_ND, ok_N = torch.randn(plan.num_pairs, DIM, generator=seeded(1)), losses(plan, 2)

    y_TD = plan.combine(out_ND, ok_N)

    probs_N = plan.scores.probs_TE[plan.token_N, plan.expert_N]
    counted_N = ok_N if norm == "responded" else torch.ones_like(ok_N)
    total_T = torch.zeros(10).index_add(0, plan.token_N, probs_N * counted_N)
    weights_N = probs_N if norm == "none" else probs_N / total_T[plan.token_N]
    torch.testing.assert_close(y_TD, dense_sum(plan, out_ND, torch.where(ok_N, 2.5 * weights_N, 0.0)))


@pytest.mark.parametrize("norm", ["planned", "responded"])
def test_planned_weights_of_a_token_sum_to_the_scale(norm: Norm) -> None:
    plan = linear_router(DIM, 4, 2, gate=sigmoid, norm=norm, scale=2.5)(tokens(0), View.all_alive(0, 4))

    sum_T = torch.zeros(10).index_add(0, plan.token_N, plan.weights_N)

    torch.testing.assert_close(sum_T, torch.full((10,), 2.5))


@properties
@given(seeds)
def test_all_experts_equal_is_the_dense_network_whatever_is_lost_if_each_token_has_one_answer(seed: int) -> None:
    experts = LocalExperts(5, DIM, 8, generator=seeded(seed)).double()
    experts.make_equal()
    x_TD = tokens(seed, dtype=torch.float64)
    plan = linear_router(DIM, 5, 5, norm="responded", seed=seed)(x_TD, View.all_alive(0, 5))
    ok_N = losses(plan, seed, share=0.6)
    ok_N |= plan.expert_N == seed % 5

    y_TD = plan.combine(experts(plan, plan.dispatch(x_TD)), ok_N)

    torch.testing.assert_close(y_TD, experts.expert(0, x_TD), rtol=0, atol=1e-12)


def test_one_expert_is_the_plain_network() -> None:
    experts, x_TD = LocalExperts(1, DIM, 8, generator=seeded(0)), tokens(1)
    plan = linear_router(DIM, 1, 1, norm="none")(x_TD, View.all_alive(0, 1))

    assert torch.equal(plan.combine(experts(plan, plan.dispatch(x_TD))), experts.expert(0, x_TD))


@properties
@given(seeds)
def test_renaming_experts_changes_no_output(seed: int) -> None:
    x_TD, order_E = tokens(seed), torch.randperm(6, generator=seeded(seed))
    router, experts = linear_router(DIM, 6, 2, seed=seed), LocalExperts(6, DIM, 8, generator=seeded(seed))
    before = _layer(router, experts, x_TD)
    with torch.no_grad():
        router.score.weight_ED.copy_(router.score.weight_ED[order_E].clone())
        for stacked in experts.parameters():
            stacked.copy_(stacked[order_E].clone())

    after = _layer(router, experts, x_TD)

    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@properties
@given(seeds)
def test_without_a_capacity_the_order_of_tokens_does_not_matter(seed: int) -> None:
    x_TD, order_T = tokens(seed), torch.randperm(10, generator=seeded(seed))
    router, experts = linear_router(DIM, 4, 2, seed=seed), LocalExperts(4, DIM, 8, generator=seeded(seed))

    shuffled = _layer(router, experts, x_TD[order_T])

    torch.testing.assert_close(shuffled, _layer(router, experts, x_TD)[order_T], rtol=1e-5, atol=1e-6)


def _layer(router, experts: LocalExperts, x_TD: Tensor) -> Tensor:
    plan = router(x_TD, View.all_alive(0, experts.a_EDH.shape[0]))
    return plan.combine(experts(plan, plan.dispatch(x_TD)))


@properties
@given(seeds)
def test_losing_an_expert_under_responded_is_having_known_it_dead_with_one_choice_less(seed: int) -> None:
    x_TD, lost = tokens(seed), seed % 4
    experts = LocalExperts(4, DIM, 8, generator=seeded(seed))
    router = linear_router(DIM, 4, 4, norm="responded", seed=seed)
    one_less = linear_router(DIM, 4, 3, norm="responded", seed=seed)

    plan = router(x_TD, View.all_alive(0, 4))
    y_lost = plan.combine(experts(plan, plan.dispatch(x_TD)), plan.expert_N != lost)
    known = one_less(x_TD, View.of(0, [slot != lost for slot in range(4)]))
    y_known = known.combine(experts(known, known.dispatch(x_TD)))

    torch.testing.assert_close(y_lost, y_known, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", presets())
def test_a_token_with_no_survivors_is_zero_and_has_finite_gradients(preset: str) -> None:
    router = build_router(preset, dim=DIM, num_experts=16)
    x_TD = tokens(0).requires_grad_()
    plan = router(x_TD, View.all_alive(0, 16))
    out_ND = torch.randn(plan.num_pairs, DIM, generator=seeded(1), requires_grad=True)
    ok_N = losses(plan, 2) & (plan.token_N != 3)

    y_TD = plan.combine(out_ND, ok_N)
    (y_TD.square().sum() + router.loss(plan)).backward()

    assert not y_TD[3].any()
    assert y_TD.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x_TD, out_ND, *router.parameters()])


@pytest.mark.parametrize("norm", ["none", "planned", "responded"])
def test_losing_everything_gives_zeros_and_zero_gradients_in_float32(norm: Norm) -> None:
    router = linear_router(DIM, 4, 2, norm=norm, gate=sigmoid)
    plan = router(tokens(0), View.all_alive(0, 4))
    out_ND = torch.full((plan.num_pairs, DIM), torch.nan, requires_grad=True)

    y_TD = plan.combine(out_ND, torch.zeros(plan.num_pairs, dtype=torch.bool))
    y_TD.sum().backward()

    assert not y_TD.any()
    assert out_ND.grad is not None
    assert not out_ND.grad.any()
    assert router.score.weight_ED.grad is not None
    assert not router.score.weight_ED.grad.any()


@properties
@given(seeds, st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.sampled_from(["none", "planned", "responded"]))
def test_rubbish_in_a_lost_row_reaches_neither_output_nor_gradient(seed: int, rubbish: float, norm: Norm) -> None:
    router = linear_router(DIM, 4, 2, norm=norm, seed=seed)
    x_TD = tokens(seed)

    def outcome(fill: float) -> list[Tensor]:
        leaf_TD = x_TD.clone().requires_grad_()
        plan = router(leaf_TD, View.all_alive(0, 4))
        ok_N = losses(plan, seed)
        answers = torch.randn(plan.num_pairs, DIM, generator=seeded(seed))
        out_ND = torch.where(ok_N[:, None], answers, fill).requires_grad_()
        y_TD = plan.combine(out_ND, ok_N)
        return [y_TD, *torch.autograd.grad(y_TD.square().sum(), [leaf_TD, out_ND, router.score.weight_ED])]

    for got, expected in zip(outcome(rubbish), outcome(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_with_nobody_alive_the_plan_is_empty_and_everything_is_zero(preset: str, num_tokens: int) -> None:
    router = build_router(preset, dim=DIM, num_experts=16)
    x_TD = tokens(0, num_tokens).requires_grad_()

    plan = router(x_TD, View.of(0, [False] * 16))
    y_TD = plan.combine(plan.dispatch(x_TD), torch.zeros(0, dtype=torch.bool))
    (y_TD.sum() + router.loss(plan)).backward()
    metrics = router.observe(plan)

    assert plan.num_pairs == 0
    assert plan.groups() == ()
    assert y_TD.shape == (num_tokens, DIM)
    assert not y_TD.any()
    assert all(p.grad is None or not p.grad.any() for p in [x_TD, *router.parameters()])
    assert metrics.unanswered_share == (1.0 if num_tokens else 0.0)


@pytest.mark.parametrize("preset", presets())
def test_no_tokens_make_an_empty_plan(preset: str) -> None:
    router = build_router(preset, dim=DIM, num_experts=16)

    plan = router(tokens(0, 0), View.all_alive(0, 16))

    assert plan.combine(torch.zeros(0, DIM)).shape == (0, DIM)
    assert float(router.loss(plan)) == 0.0
    assert router.observe(plan).drop_share == 0.0


def test_a_lost_row_counts_as_its_experts_fill() -> None:
    plan = linear_router(DIM, 4, 2)(tokens(0), View.all_alive(0, 4))
    out_ND, ok_N = torch.randn(plan.num_pairs, DIM, generator=seeded(1)), losses(plan, 2)
    fill_ED = torch.randn(4, DIM, generator=seeded(3))

    y_TD = plan.combine(out_ND, ok_N, fill_ED)

    filled_ND = torch.where(ok_N[:, None], out_ND, fill_ED[plan.expert_N])
    torch.testing.assert_close(y_TD, plan.combine(filled_ND))


def test_a_dropped_pair_is_a_lost_call_and_counts_as_its_fill_too() -> None:
    router = linear_router(DIM, 2, Capacity(TopK(1), 0.5, 0.5), norm="none")
    roomy = linear_router(DIM, 2, 1, norm="none")
    x_TD, view = tokens(0), View.all_alive(0, 2)
    fill_ED = torch.randn(2, DIM, generator=seeded(3))

    plan, everything = router(x_TD, view), roomy(x_TD, view)
    y_TD = plan.combine(fill_ED[plan.expert_N], None, fill_ED)

    assert plan.dropped()[Fate.CAPACITY] == everything.num_pairs - plan.num_pairs > 0
    torch.testing.assert_close(y_TD, everything.combine(fill_ED[everything.expert_N]))


def test_weights_are_planned_before_a_drop_unless_they_wait_for_responses() -> None:
    # Expert 0 has places for all ten tokens, expert 1 for the first four.
    view, x_TD = View.of(0, [True, True], capacity=[3.0, 1.0]), tokens(0)
    ones = {}
    for norm in ("planned", "responded"):
        plan = linear_router(DIM, 2, Capacity(TopK(2), 0.75, 0.75), norm=norm)(x_TD, view)
        ones[norm] = plan.combine(torch.ones(plan.num_pairs, DIM))[:, 0]

    torch.testing.assert_close(ones["planned"][:4], torch.ones(4))
    assert (ones["planned"][4:] < 1).all()
    torch.testing.assert_close(ones["responded"], torch.ones(10))


def test_a_fill_under_responded_is_refused() -> None:
    plan = linear_router(DIM, 4, 2, norm="responded")(tokens(0), View.all_alive(0, 4))

    with pytest.raises(ValueError, match="leave none for a fill"):
        plan.combine(torch.zeros(plan.num_pairs, DIM), None, torch.zeros(4, DIM))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "planned", "responded"])
def test_gradients_through_combine_with_losses_pass_gradcheck(norm: Norm) -> None:
    router = linear_router(DIM, 4, 3, norm=norm, scale=1.5).double()
    view, x_TD = View.all_alive(0, 4), tokens(0, 4, torch.float64).requires_grad_()
    ok_N = losses(router(x_TD, view), 5)

    def run(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        plan = torch.func.functional_call(router, {"score.weight_ED": weight_ED}, (x_TD, view))
        return plan.combine(plan.dispatch(x_TD).sin(), ok_N)

    weight_ED = router.score.weight_ED.detach().clone().requires_grad_()
    assert run(x_TD, weight_ED).dtype == torch.float64
    assert torch.autograd.gradcheck(run, (x_TD, weight_ED))


@pytest.mark.parametrize(("norm", "learns"), [("planned", True), ("none", True), ("responded", False)])
def test_a_lone_survivor_teaches_the_router_only_if_its_weight_may_vary(norm: Norm, learns: bool) -> None:
    router = linear_router(DIM, 4, 2, norm=norm)
    plan = router(tokens(0), View.all_alive(0, 4))
    first_choice_N = torch.zeros(plan.num_pairs, dtype=torch.bool)
    for token in range(10):
        first_choice_N[(plan.token_N == token).nonzero()[0]] = True
    out_ND = torch.randn(plan.num_pairs, DIM, generator=seeded(1))

    plan.combine(out_ND, first_choice_N).sum().backward()

    gradient = router.score.weight_ED.grad
    assert gradient is not None
    assert (float(gradient.abs().max()) > 1e-3) is learns
    assert learns or float(gradient.abs().max()) < 1e-6


def test_bfloat16_answers_are_added_up_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = linear_router(DIM, 8, 8)(tokens(0).bfloat16(), View.all_alive(0, 8))
        out_ND = torch.randn(plan.num_pairs, DIM, generator=seeded(1)).bfloat16()
        y_TD = plan.combine(out_ND)

    assert plan.weights_N.dtype == torch.float32
    assert torch.equal(y_TD, plan.combine(out_ND.float()).bfloat16())


def test_the_same_plan_combines_to_the_same_bits() -> None:
    router = linear_router(DIM, 8, 3)
    x_TD, view = tokens(0, 200), View.all_alive(0, 8)
    out_ND = torch.randn(600, DIM, generator=seeded(1))

    once, again = router(x_TD, view).combine(out_ND), router(x_TD, view).combine(out_ND)

    assert torch.equal(once, again)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_probabilities_that_under_or_overflow_stay_finite_in_value_and_gradient(scale: float) -> None:
    router = linear_router(DIM, 4, 2, norm="responded")
    x_TD = (tokens(0) * scale).requires_grad_()
    plan = router(x_TD, View.all_alive(0, 4))
    out_ND = torch.randn(plan.num_pairs, DIM, generator=seeded(1))

    y_TD = plan.combine(out_ND, plan.expert_N != plan.expert_N[0])
    y_TD.sum().backward()

    assert y_TD.isfinite().all()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()
