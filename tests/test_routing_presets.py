import pytest
import torch

from tests.routing_layers import linear_router, seeded
from trainer.routing.presets import build_router, presets
from trainer.routing.selection import Capacity, TopK
from trainer.routing.view import View


def test_the_presets_that_are_built_are_listed() -> None:
    assert presets() == ("switch", "mixtral", "deepseek_v3", "gshard", "dmoe")


@pytest.mark.parametrize("preset", presets())
def test_the_same_seed_makes_the_same_router_and_leaves_global_state_alone(preset: str) -> None:
    global_state = torch.get_rng_state()

    one, same, other = (build_router(preset, dim=8, num_experts=16, seed=seed) for seed in (3, 3, 4))

    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("preset", presets())
def test_a_preset_plans_its_k_experts_per_token_and_can_be_trained(preset: str) -> None:
    router = build_router(preset, dim=8, num_experts=16).eval()
    x_TD = torch.randn(64, 8, generator=seeded(0))

    plan = router(x_TD, View.all_alive(0, 16), seq_len=16)
    (plan.combine(plan.dispatch(x_TD)).square().sum() + router.loss(plan)).backward()

    assert plan.num_chosen == 64 * router.select.k
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters())


def test_top_k_and_balance_replace_the_presets_own() -> None:
    x_TD, view = torch.randn(8, 8, generator=seeded(0)), View.all_alive(0, 16)
    plain, changed = (
        build_router("switch", dim=8, num_experts=16, top_k=k, balance=b) for k, b in ((1, 1e-2), (3, 2e-2))
    )

    plan = plain(x_TD, view)

    assert changed(x_TD, view).num_chosen == 24
    torch.testing.assert_close(changed.loss(plan), 2 * plain.loss(plan))


def test_a_balance_of_zero_leaves_the_loss_to_the_task() -> None:
    router = build_router("switch", dim=8, num_experts=4, balance=0.0)

    plan = router(torch.randn(8, 8, generator=seeded(0)), View.all_alive(0, 4))

    assert float(router.loss(plan)) == 0.0


def test_groups_are_left_out_where_there_are_too_few_experts_for_them() -> None:
    few, enough = (build_router("deepseek_v3", dim=8, num_experts=e) for e in (8, 16))

    assert few.select == TopK(8)
    assert enough.select == TopK(8, groups=8, groups_kept=4)


def test_more_living_experts_than_k_are_not_needed() -> None:
    router = build_router("dmoe", dim=8, num_experts=9)
    view = View.of(0, [slot < 3 for slot in range(9)])

    plan = router(torch.randn(5, 8, generator=seeded(0)), view)

    assert plan.num_pairs == 15
    assert set(plan.expert_N.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("preset", ["mixtral", "dmoe", "deepseek_v3"])
def test_one_expert_with_normalised_weights_is_refused_and_told_why(preset: str) -> None:
    with pytest.raises(ValueError, match="always 1, so the router would get no gradient"):
        build_router(preset, dim=8, num_experts=8, top_k=1)


def test_one_expert_is_refused_under_a_capacity_too() -> None:
    with pytest.raises(ValueError, match="always 1"):
        linear_router(8, 4, Capacity(TopK(1), 1.0, 1.0), norm="responded")


def test_gshard_takes_two_and_no_other_number() -> None:
    with pytest.raises(ValueError, match="k = 2, not 3"):
        build_router("gshard", dim=8, num_experts=8, top_k=3)


@pytest.mark.parametrize("top_k", [0, 9])
def test_a_top_k_the_layer_cannot_have_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the layer's 8 experts"):
        build_router("mixtral", dim=8, num_experts=8, top_k=top_k)


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"no router preset is called 'mixtrl'; there are switch, mixtral"):
        build_router("mixtrl", dim=8, num_experts=8)


def test_a_promised_preset_is_refused_as_not_built_yet() -> None:
    with pytest.raises(ValueError, match="'soft_moe' is not built yet"):
        build_router("soft_moe", dim=8, num_experts=8)


def test_a_view_of_another_layers_size_is_refused() -> None:
    router = build_router("mixtral", dim=8, num_experts=8)

    with pytest.raises(ValueError, match="knows 8 experts, the view lists 4"):
        router(torch.zeros(2, 8), View.all_alive(0, 4))


def test_a_batch_that_is_not_whole_sequences_is_refused() -> None:
    router = build_router("mixtral", dim=8, num_experts=8)

    with pytest.raises(ValueError, match="whole number of sequences"):
        router(torch.zeros(5, 8), View.all_alive(0, 8), seq_len=2)
