"""Which pairs travel to which peer."""

import torch

from trainer.packing import group_by_destination
from trainer.routing.plan import Plan
from trainer.routing.presets import build_router
from trainer.routing.view import View

DIM, NUM_EXPERTS, NUM_TOKENS = 8, 6, 20


def make_plan() -> tuple[Plan, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    router = build_router("mixtral", dim=DIM, num_experts=NUM_EXPERTS, seed=0)
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=generator)
    return router(x_TD, View.all_alive(0, NUM_EXPERTS)), x_TD


def test_every_placed_pair_is_in_exactly_one_group() -> None:
    plan, _ = make_plan()
    destinations = {0: "anne", 1: "beth", 2: "anne", 4: "beth", 5: "cleo"}

    groups = group_by_destination(plan, destinations)

    pairs = torch.cat([group.pairs_N for group in groups])
    placed = [n for n in range(plan.num_pairs) if int(plan.expert_N[n]) in destinations]
    assert sorted(pairs.tolist()) == placed
    for group in groups:
        for expert in group.experts:
            assert set(plan.expert_N[group.pairs_N[expert.start : expert.stop]].tolist()) == {expert.slot}


def test_a_row_wanted_twice_by_one_peer_travels_once_and_reads_back_right() -> None:
    plan, x_TD = make_plan()

    (group,) = group_by_destination(plan, dict.fromkeys(range(NUM_EXPERTS), "anne"))

    assert group.row_index_N is not None
    assert group.rows_U.numel() == NUM_TOKENS
    assert plan.num_pairs == 2 * NUM_TOKENS
    sent_UD = x_TD[group.rows_U]
    torch.testing.assert_close(sent_UD[group.row_index_N.long()], x_TD[plan.token_N[group.pairs_N]])


def test_without_shared_rows_no_index_travels() -> None:
    plan, x_TD = make_plan()

    groups = group_by_destination(plan, {slot: f"peer {slot}" for slot in range(NUM_EXPERTS)})

    for group in groups:
        assert group.row_index_N is None
        torch.testing.assert_close(x_TD[group.rows_U], x_TD[plan.token_N[group.pairs_N]])


def test_the_answered_part_of_a_group_still_counts_rows_as_they_were_sent() -> None:
    plan, x_TD = make_plan()
    (group,) = group_by_destination(plan, dict.fromkeys(range(NUM_EXPERTS), "anne"))

    part = group.only([1, 4])

    assert [expert.slot for expert in part.experts] == [1, 4]
    assert torch.equal(part.rows_U, group.rows_U)
    assert set(plan.expert_N[part.pairs_N].tolist()) == {1, 4}
    assert part.row_index_N is not None
    torch.testing.assert_close(x_TD[part.rows_U][part.row_index_N.long()], x_TD[plan.token_N[part.pairs_N]])


def test_a_group_of_which_everything_was_answered_is_itself() -> None:
    plan, _ = make_plan()
    (group,) = group_by_destination(plan, {3: "anne"})

    assert group.only([3]) is group
