import pytest
import torch

from experts.uid import ExpertUid
from trainer.routing.view import View


def test_a_slot_is_the_experts_index_whoever_is_alive() -> None:
    view = View.of(3, [True, False, True])

    assert view.uids == (ExpertUid(3, 0), ExpertUid(3, 1), ExpertUid(3, 2))
    assert view.num_live == 2


def test_shares_follow_capacity_and_sum_to_one_over_the_living() -> None:
    view = View.of(0, [True, False, True], capacity=[1.0, 5.0, 3.0])

    torch.testing.assert_close(view.share_E, torch.tensor([0.25, 0.0, 0.75]))


def test_a_living_expert_without_capacity_keeps_a_sliver_of_the_load() -> None:
    view = View.of(0, [True, True], capacity=[0.0, 1.0])

    assert 0 < float(view.share_E[0]) < 1e-3


def test_nobody_having_any_capacity_means_equal_shares() -> None:
    view = View.of(0, [True, True], capacity=[0.0, 0.0])

    torch.testing.assert_close(view.share_E, torch.tensor([0.5, 0.5]))


def test_published_biases_are_recentred_over_the_living() -> None:
    view = View.of(0, [True, False, True], bias=[5.0, 100.0, 7.0])

    assert view.prior_E.tolist() == [-1.0, 0.0, 1.0]


def test_a_view_of_only_dead_experts_is_a_view() -> None:
    view = View.of(0, [False, False])

    assert view.num_live == 0
    assert view.share_E.tolist() == [0.0, 0.0]


def test_all_alive_is_even() -> None:
    view = View.all_alive(1, 4)

    assert view.alive_E.all()
    assert view.share_E.tolist() == [0.25] * 4
    assert view.prior_E.tolist() == [0.0] * 4


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite_is_refused(bias: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        View.of(0, [True, True], bias=[0.0, bias])


@pytest.mark.parametrize(
    ("share", "complaint"),
    [
        ([0.5, 0.6], "sums to 1.1"),
        ([1.0, 0.0], "positive where alive"),
        ([1.5, -0.5], "positive where alive"),
        ([1.0, float("nan")], "positive where alive"),
    ],
)
def test_shares_that_cannot_be_are_refused(share: list[float], complaint: str) -> None:
    uids = (ExpertUid(0, 0), ExpertUid(0, 1))

    with pytest.raises(ValueError, match=complaint):
        View(uids, torch.tensor([True, True]), torch.tensor(share), torch.zeros(2))


def test_slots_out_of_order_are_refused() -> None:
    uids = (ExpertUid(0, 1), ExpertUid(0, 0))

    with pytest.raises(ValueError, match="by index"):
        View(uids, torch.tensor([True, True]), torch.tensor([0.5, 0.5]), torch.zeros(2))
