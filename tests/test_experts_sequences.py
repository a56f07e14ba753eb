"""Rows to padded sequences and back."""

import pytest
import torch
from torch import Tensor

from experts.sequences import lengths_of_each, run_padded, saved_bytes


def test_sequences_are_dealt_to_the_experts_whose_rows_they_are() -> None:
    assert lengths_of_each((5, 0, 4), (2, 3, 4)) == ((2, 3), (), (4,))
    assert lengths_of_each((0,), ()) == ((),)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("counts", "lengths", "reason"),
    [
        ((3, 3), (2, 2, 2), "do not fit"),
        ((3, 3), (3, 2), "do not fit"),
        ((3, 3), (3, 3, 3), "do not fit"),
        ((3,), (), "do not fit"),
        ((3,), (3, 0), "at least one token"),
        ((3,), (4, -1), "at least one token"),
    ],
    ids=["straddling", "too few", "too many", "none", "empty", "negative"],
)
def test_sequences_that_are_not_of_these_rows_are_refused(
    counts: tuple[int, ...], lengths: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        lengths_of_each(counts, lengths)


@pytest.mark.parametrize("lengths", [(3, 3), (4, 1, 2, 9, 3, 1), (1,), (7,)], ids=str)
def test_every_row_comes_back_in_its_place_with_its_gradient(lengths: tuple[int, ...]) -> None:
    seen: list[tuple[int, ...]] = []

    def run(x_LSD: Tensor, lengths_L: Tensor) -> Tensor:
        seen.append(tuple(x_LSD.shape[:2]))
        assert x_LSD.shape[1] == lengths_L.max()
        return x_LSD.cumsum(1)

    x_ND = torch.arange(2.0 * sum(lengths)).view(-1, 2).requires_grad_()

    out_ND = run_padded(run, x_ND, lengths)
    (grad_ND,) = torch.autograd.grad(out_ND, x_ND, torch.ones_like(out_ND))

    assert torch.equal(out_ND, torch.cat([part.cumsum(0) for part in x_ND.split(lengths)]))
    assert torch.equal(grad_ND[:, 0], torch.cat([torch.arange(n, 0, -1.0) for n in lengths]))
    assert sum(count * longest for count, longest in seen) < 2 * sum(lengths)


@pytest.mark.hostile
def test_one_long_sequence_among_thousands_of_short_ones_does_not_make_these_long() -> None:
    lengths = [1] * 4096 + [4096]

    assert saved_bytes(lengths, 100) < 2 * 100 * sum(lengths)
