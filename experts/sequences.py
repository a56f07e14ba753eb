"""How consecutive rows fall into sequences, and how these are padded into one tensor and cut out again.

Knows nothing of experts. N rows; L sequences, S tokens of the longest; D model width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Lengths = tuple[int, ...]
"""Tokens of each sequence, in the order of the rows."""

_INDEX_BYTES = 4 * 8
"""Per row: its sequence, its place there, its number before and after."""


def lengths_of_each(counts: Sequence[int], lengths: Sequence[int]) -> tuple[Lengths, ...]:
    """The sequences of each of several experts that have `counts` consecutive rows.

    ValueError when one is empty, straddles two experts, or not all rows are in one.
    """
    if min(lengths, default=1) < 1:
        raise ValueError("a sequence has at least one token")
    ends = [0, *accumulate(lengths)]
    sequence_at = {end: index for index, end in enumerate(ends)}
    borders = [0, *accumulate(counts)]
    if borders[-1] != ends[-1] or any(border not in sequence_at for border in borders):
        raise ValueError(f"sequences of {ends[-1]} rows do not fit the {borders[-1]} rows of the experts one by one")
    cuts = [sequence_at[border] for border in borders]
    return tuple(tuple(lengths[first:last]) for first, last in pairwise(cuts))


def saved_bytes(lengths: Sequence[int], bytes_per_row: int) -> int:
    """What autograd keeps of `run_padded` when it keeps that much of a row that is computed on.

    Those are fewer than twice the rows that there are.
    """
    padded_rows = sum(len(together) * max(together) for together in _alike(lengths).values())
    return padded_rows * bytes_per_row + sum(lengths) * _INDEX_BYTES


def run_padded(run: Callable[[Tensor, Tensor], Tensor], x_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """`run(x_LSD, lengths_L)` on the rows of these sequences, and its outputs as rows again. Differentiable.

    Sequences are padded to the longest of those between the same two powers of two: never to more than twice their
    length, however much longer another one is.
    """
    if len(set(lengths)) == 1:
        x_LSD = x_ND.unflatten(0, (len(lengths), lengths[0]))
        return run(x_LSD, torch.tensor(lengths, device=x_ND.device)).flatten(0, 1)
    lengths_L = torch.tensor(lengths)
    starts_L = lengths_L.cumsum(0) - lengths_L
    size_L = torch.tensor([_size(length) for length in lengths])
    rows: list[Tensor] = []
    outs: list[Tensor] = []
    for size in _alike(lengths):
        mask_L = size_L == size
        which_N, place_N = _places(lengths_L[mask_L])
        rows.append((starts_L[mask_L][which_N] + place_N).to(x_ND.device))
        where = which_N.to(x_ND.device), place_N.to(x_ND.device)
        empty_LSD = x_ND.new_zeros(int(mask_L.sum()), int(lengths_L[mask_L].max()), x_ND.shape[1])
        out_LSD = run(empty_LSD.index_put(where, x_ND[rows[-1]]), lengths_L[mask_L].to(x_ND.device))
        outs.append(out_LSD[where])
    return torch.cat(outs)[torch.cat(rows).argsort()]


def _alike(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Lengths between the same two powers of two."""
    alike: defaultdict[int, list[int]] = defaultdict(list)
    for length in lengths:
        alike[_size(length)].append(length)
    return alike


def _size(length: int) -> int:
    return (length - 1).bit_length()


def _places(lengths_L: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row: its sequence, and its place in it."""
    which_N = torch.repeat_interleave(lengths_L)
    starts_L = lengths_L.cumsum(0) - lengths_L
    return which_N, torch.arange(len(which_N)) - starts_L[which_N]
