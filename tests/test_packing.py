"""Which pairs travel to which peer."""

from collections.abc import Sequence

import pytest
import torch

from trainer.packing import PeerGroup, group_by_destination
from trainer.routing.plan import Plan
from trainer.routing.presets import build_router
from trainer.routing.view import View

DIM, NUM_EXPERTS, NUM_TOKENS = 8, 6, 20


def make_plan() -> tuple[Plan, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    router = build_router("mixtral", dim=DIM, num_experts=NUM_EXPERTS, seed=0)
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=generator)
    return router(x_TD, View.all_alive(0, NUM_EXPERTS)), x_TD


def pairs_of(group: PeerGroup[str], plan: Plan) -> torch.Tensor:
    """(N,) the group's pairs, by their position in the plan."""
    return group.take_pairs(torch.arange(plan.num_pairs))


def read_back(group: PeerGroup[str], x_TD: torch.Tensor) -> torch.Tensor:
    """(N, D) what the peer makes of the rows that travel."""
    sent_UD = group.take_rows(x_TD)
    assert len(sent_UD) == group.num_rows
    return sent_UD if group.row_index_N is None else sent_UD[group.row_index_N.long()]


def test_every_placed_pair_is_in_exactly_one_group() -> None:
    plan, _ = make_plan()
    destinations = {0: "anne", 1: "beth", 2: "anne", 4: "beth", 5: "cleo"}

    groups = group_by_destination(plan, destinations)

    pairs = torch.cat([pairs_of(group, plan) for group in groups])
    placed = [n for n in range(plan.num_pairs) if int(plan.expert_N[n]) in destinations]
    assert sorted(pairs.tolist()) == placed
    for group in groups:
        for expert in group.experts:
            mine_N = pairs_of(group, plan)[expert.start : expert.stop]
            assert set(plan.expert_N[mine_N].tolist()) == {expert.slot}
            assert torch.equal(mine_N, torch.arange(plan.num_pairs)[expert.pairs])


def test_a_row_wanted_twice_by_one_peer_travels_once_and_reads_back_right() -> None:
    plan, x_TD = make_plan()
    destinations = {0: "anne", 2: "anne", 3: "anne", 5: "anne", 1: "beth", 4: "beth"}

    for group in group_by_destination(plan, destinations):
        assert group.row_index_N is not None
        assert group.num_rows < group.num_pairs
        torch.testing.assert_close(read_back(group, x_TD), x_TD[plan.token_N[pairs_of(group, plan)]])


def test_what_goes_to_one_peer_as_a_whole_is_not_copied() -> None:
    plan, x_TD = make_plan()
    grad_ND = torch.randn(plan.num_pairs, DIM)

    (group,) = group_by_destination(plan, dict.fromkeys(range(NUM_EXPERTS), "anne"))

    assert (group.num_rows, group.num_pairs) == (NUM_TOKENS, 2 * NUM_TOKENS)
    assert group.take_rows(x_TD) is x_TD
    assert group.take_pairs(grad_ND).data_ptr() == grad_ND.data_ptr()
    torch.testing.assert_close(read_back(group, x_TD), x_TD[plan.token_N])


def test_without_shared_rows_no_index_travels() -> None:
    plan, x_TD = make_plan()

    for group in group_by_destination(plan, {slot: f"peer {slot}" for slot in range(NUM_EXPERTS)}):
        assert group.row_index_N is None
        torch.testing.assert_close(read_back(group, x_TD), x_TD[plan.token_N[pairs_of(group, plan)]])


@pytest.mark.parametrize("slots", [[0, 1, 2, 4, 5], [2, 0], [5, 4, 1], [4]])
def test_rows_that_come_back_in_any_order_of_experts_go_to_their_pairs_and_nowhere_else(slots: list[int]) -> None:
    plan, _ = make_plan()
    (group,) = group_by_destination(plan, dict.fromkeys([0, 1, 2, 4, 5], "anne"))
    answers = {slot: torch.randn(int((plan.expert_N == slot).sum()), DIM) for slot in slots}
    out_ND = torch.zeros(plan.num_pairs, DIM)

    group.place(torch.cat(list(answers.values())), slots, out_ND)

    for slot in range(NUM_EXPERTS):
        mine_ND = out_ND[plan.expert_N == slot]
        torch.testing.assert_close(mine_ND, answers.get(slot, torch.zeros_like(mine_ND)))


@pytest.mark.parametrize("slots", [range(NUM_EXPERTS), [1, 4]])
@pytest.mark.parametrize("adds", [False, True])
def test_gradients_of_rows_go_to_their_tokens(slots: Sequence[int], adds: bool) -> None:
    plan, x_TD = make_plan()
    (group,) = group_by_destination(plan, dict.fromkeys(slots, "anne"))
    grad_TD = torch.ones(NUM_TOKENS, DIM) if adds else None

    grad_TD = group.add_rows(group.take_rows(x_TD), grad_TD, num_tokens=NUM_TOKENS)

    wanted = set(plan.token_N[pairs_of(group, plan)].tolist())
    for token in range(NUM_TOKENS):
        torch.testing.assert_close(grad_TD[token], adds + x_TD[token] * (token in wanted))


def test_the_answered_part_of_a_group_still_counts_rows_as_they_were_sent() -> None:
    plan, x_TD = make_plan()
    (group,) = group_by_destination(plan, dict.fromkeys(range(NUM_EXPERTS), "anne"))

    part = group.only([1, 4])

    assert [expert.slot for expert in part.experts] == [1, 4]
    assert part.num_rows == group.num_rows
    assert set(plan.expert_N[pairs_of(part, plan)].tolist()) == {1, 4}
    torch.testing.assert_close(read_back(part, x_TD), x_TD[plan.token_N[pairs_of(part, plan)]])


def test_a_group_of_which_everything_was_answered_is_itself() -> None:
    plan, _ = make_plan()
    (group,) = group_by_destination(plan, {3: "anne"})

    assert group.only([3]) is group
