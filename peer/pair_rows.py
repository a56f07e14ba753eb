"""The rows of a call spread to its pairs, and how pairs' gradients add up per row again. Tensors only."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.uid import ExpertUid


@dataclass(frozen=True)
class PairRows:
    """N pairs, consecutive per expert, that read U distinct rows."""

    uids: tuple[ExpertUid, ...]
    counts: tuple[int, ...]
    """Pairs per expert."""
    num_distinct: int
    """U"""
    x_ND: Tensor
    row_index_N: Tensor | None
    """(N,) int64 on the rows' device; None when pair n reads row n."""

    def only(self, uids: Collection[ExpertUid]) -> "PairRows":
        """The pairs of some of the experts; the distinct rows stay numbered as they were."""
        if all(uid in uids for uid in self.uids):
            return self
        pairs_N = pairs_of(self.uids, self.counts, uids).to(self.x_ND.device)
        kept = [(uid, count) for uid, count in zip(self.uids, self.counts, strict=True) if uid in uids]
        row_index_N = pairs_N if self.row_index_N is None else self.row_index_N[pairs_N]
        return PairRows(
            tuple(uid for uid, _ in kept),
            tuple(count for _, count in kept),
            self.num_distinct,
            self.x_ND[pairs_N],
            row_index_N,
        )

    def sum_by_row(self, grad_ND: Tensor) -> Tensor:
        """(U, D): input gradients of the pairs added up per distinct row; zero for rows no pair reads."""
        if self.row_index_N is None:
            return grad_ND
        grad_UD = grad_ND.new_zeros(self.num_distinct, grad_ND.shape[1])
        return grad_UD.index_add_(0, self.row_index_N, grad_ND)


def pairs_of(uids: Sequence[ExpertUid], counts: Sequence[int], wanted: Collection[ExpertUid]) -> Tensor:
    """Positions of the wanted experts' pairs among pairs that are consecutive per expert."""
    mask_N = torch.repeat_interleave(torch.tensor([uid in wanted for uid in uids]), torch.tensor(counts))
    return mask_N.nonzero().squeeze(1)
