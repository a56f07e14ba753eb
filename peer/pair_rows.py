"""The rows of a call spread to its pairs, how pairs' gradients add up per row again, and calls merged. Tensors only."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from experts.sequences import lengths_of_each
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
    lengths: tuple[int, ...] | None = None
    """How the pairs, in order, fall into sequences; None for experts that see tokens one by one."""

    @property
    def num_pairs(self) -> int:
        """N"""
        return self.x_ND.shape[0]

    def spans(self) -> dict[ExpertUid, slice]:
        """Where each expert's pairs are."""
        ends = list(accumulate(self.counts))
        return {uid: slice(end - count, end) for uid, count, end in zip(self.uids, self.counts, ends, strict=True)}

    def only(self, uids: Collection[ExpertUid]) -> "PairRows":
        """The pairs of some of the experts; the distinct rows stay numbered as they were."""
        if all(uid in uids for uid in self.uids):
            return self
        pairs_N = pairs_of(self.uids, self.counts, uids).to(self.x_ND.device)
        kept = [position for position, uid in enumerate(self.uids) if uid in uids]
        return PairRows(
            tuple(self.uids[position] for position in kept),
            tuple(self.counts[position] for position in kept),
            self.num_distinct,
            self.x_ND[pairs_N],
            pairs_N if self.row_index_N is None else self.row_index_N[pairs_N],
            self._lengths_at(kept),
        )

    def piece(self, start: int, max_pairs: int) -> "PairRows":
        """At most so many pairs from `start` on, at least one; whole sequences, so at least one of these."""
        stop = min(start + max_pairs, self.num_pairs)
        lengths = None
        if self.lengths is not None:
            ends = [0, *accumulate(self.lengths)]
            first = ends.index(start)
            last = max(first + 1, sum(end <= stop for end in ends) - 1)
            stop, lengths = ends[last], self.lengths[first:last]
        overlaps = [
            (uid, min(stop, span.stop) - max(start, span.start))
            for uid, span in self.spans().items()
            if span.start < stop and span.stop > start
        ]
        return PairRows(
            tuple(uid for uid, _ in overlaps),
            tuple(count for _, count in overlaps),
            stop - start,
            self.x_ND[start:stop],
            None,
            lengths,
        )

    def sum_by_row(self, grad_ND: Tensor) -> Tensor:
        """(U, D): input gradients of the pairs added up per distinct row; zero for rows no pair reads."""
        if self.row_index_N is None:
            return grad_ND
        grad_UD = grad_ND.new_zeros(self.num_distinct, grad_ND.shape[1])
        return grad_UD.index_add_(0, self.row_index_N, grad_ND)

    def _lengths_at(self, positions: Sequence[int]) -> tuple[int, ...] | None:
        if self.lengths is None:
            return None
        each = lengths_of_each(self.counts, self.lengths)
        return tuple(length for position in positions for length in each[position])


@dataclass(frozen=True)
class Merged:
    """The pairs of several calls as one, consecutive per expert."""

    rows: PairRows
    spans: tuple[dict[ExpertUid, slice], ...]
    """Of each call, where its experts' pairs are, in the call's order."""

    @classmethod
    def of(cls, calls: Sequence[PairRows]) -> "Merged":
        """Copies the pairs once, unless there is one call only."""
        if len(calls) == 1:
            return cls(calls[0], (calls[0].spans(),))
        spans: list[dict[ExpertUid, slice]] = [{} for _ in calls]
        sources = [call.spans() for call in calls]
        parts: list[Tensor] = []
        counts: dict[ExpertUid, int] = {}
        num_pairs = 0
        for uid in dict.fromkeys(uid for call in calls for uid in call.uids):
            for call, source, span in zip(calls, sources, spans, strict=True):
                if uid in source:
                    parts.append(call.x_ND[source[uid]])
                    span[uid] = slice(num_pairs, num_pairs + parts[-1].shape[0])
                    num_pairs = span[uid].stop
                    counts[uid] = counts.get(uid, 0) + parts[-1].shape[0]
        lengths = _merged_lengths(calls, tuple(counts))
        rows = PairRows(tuple(counts), tuple(counts.values()), num_pairs, torch.cat(parts), None, lengths)
        in_order = ({uid: span[uid] for uid in call.uids} for call, span in zip(calls, spans, strict=True))
        return cls(rows, tuple(in_order))

    def merge(self, values: Sequence[Tensor]) -> Tensor:
        """One tensor per call, a row per pair, in the order of the merged pairs."""
        if len(values) == 1:
            return values[0]
        out_ND = values[0].new_empty(self.rows.num_pairs, *values[0].shape[1:])
        for value_ND, span in zip(values, self.spans, strict=True):
            start = 0
            for pairs in span.values():
                out_ND[pairs] = value_ND[start : start + pairs.stop - pairs.start]
                start += pairs.stop - pairs.start
        return out_ND

    def split(self, out_ND: Tensor) -> Iterator[Tensor]:
        """The rows of each call, in its own order."""
        if len(self.spans) == 1:
            yield out_ND
            return
        for span in self.spans:
            parts = [out_ND[pairs] for pairs in span.values()]
            yield torch.cat(parts) if len(parts) != 1 else parts[0]


def pairs_of(uids: Sequence[ExpertUid], counts: Sequence[int], wanted: Collection[ExpertUid]) -> Tensor:
    """Positions of the wanted experts' pairs among pairs that are consecutive per expert."""
    mask_N = torch.repeat_interleave(torch.tensor([uid in wanted for uid in uids]), torch.tensor(counts))
    return mask_N.nonzero().squeeze(1)


def _merged_lengths(calls: Sequence[PairRows], uids: Sequence[ExpertUid]) -> tuple[int, ...] | None:
    each = [
        dict(zip(call.uids, lengths_of_each(call.counts, call.lengths), strict=True))
        for call in calls
        if call.lengths is not None
    ]
    return tuple(length for uid in uids for call in each for length in call.get(uid, ())) if each else None
