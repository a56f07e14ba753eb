"""Passes through a bank that fit into the device's memory: whole, or in pieces when it runs out. Knows no calls.

N pairs of a pass, consecutive per expert; D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import structlog
import torch
from torch import Tensor

from experts.bank import ExpertBank, Pass
from experts.uid import ExpertUid
from peer.pair_rows import PairRows
from peer.row_limit import RowLimit

log = structlog.get_logger(__name__)


class DoesNotFit(Exception):
    """Not even the smallest piece fits."""

    def __init__(self, num_rows: int, *, has_begun: bool) -> None:
        super().__init__(f"the device has no memory for {num_rows} rows; send fewer, or later")
        self.has_begun = has_begun
        """Whether pieces before it have been computed."""


@dataclass
class Gathered:
    """What became of a backward."""

    grad_x_ND: Tensor
    non_finite: set[ExpertUid] = field(default_factory=set[ExpertUid])
    """Experts that threw their gradient away."""
    used_graph: bool = False


@dataclass(frozen=True)
class Computed:
    """Outputs of some of a pass's experts."""

    uids: tuple[ExpertUid, ...]
    """Consecutive in the pass."""
    out_ND: Tensor
    run: Pass | None
    """Once the last outputs are there, and these are of it too: the whole pass."""


class FittingPasses:
    """Runs pairs through a bank. On its compute thread."""

    def __init__(self, bank: ExpertBank, *, device: torch.device) -> None:
        self._bank = bank
        self._device = device
        self._limit = RowLimit()

    def forward(self, rows: PairRows, *, keep_graph: bool, now_s: float) -> Iterator[Computed]:
        """Outputs expert by expert, where that is how they are computed. Raises DoesNotFit."""
        left = set(rows.uids)
        if left and rows.num_pairs <= self._limit.rows(now_s=now_s):
            try:
                run, done = self._bank.forward_in_parts(
                    rows.x_ND, rows.uids, rows.counts, keep_graph=keep_graph, lengths=rows.lengths
                )
                for positions in done:
                    uids = tuple(rows.uids[position] for position in positions)
                    left -= set(uids)
                    yield Computed(uids, run.out_ND[run.span(positions)], run)
            except RuntimeError as error:
                self._shrink_after(error, rows.num_pairs, now_s)
        if left:
            rest = rows.only(left)
            yield Computed(rest.uids, self.outputs(rest, now_s=now_s), None)

    def outputs(self, rows: PairRows, *, now_s: float) -> Tensor:
        """(N, D), without a graph. Raises DoesNotFit."""

        def run(piece: PairRows, _: slice) -> Tensor:
            return self._bank.forward(
                piece.x_ND, piece.uids, piece.counts, keep_graph=False, lengths=piece.lengths
            ).out_ND

        return self._in_pieces(rows, run, now_s)

    def backward(
        self, rows: PairRows, grad_ND: Tensor, loss_tokens: Mapping[ExpertUid, float], run: Pass | None, *, now_s: float
    ) -> Gathered:
        """Have the experts gather their gradients; through the graph of `run` if it still stands. Raises DoesNotFit."""
        non_finite: set[ExpertUid] = set()

        def back(run: Pass, grad_ND: Tensor) -> Tensor:
            counts = dict(zip(rows.uids, rows.counts, strict=True))
            shares = [loss_tokens[uid] * part / counts[uid] for uid, part in zip(run.uids, run.counts, strict=True)]
            grad_x_ND = self._bank.backward(run, grad_ND, loss_tokens=shares)
            non_finite.update(run.non_finite)
            return grad_x_ND

        if run is not None and self._bank.is_current(run):
            try:
                return Gathered(back(run, grad_ND), non_finite, used_graph=True)
            except RuntimeError as error:
                self._shrink_after(error, rows.num_pairs, now_s)

        def again(piece: PairRows, pairs: slice) -> Tensor:
            run = self._bank.forward(piece.x_ND, piece.uids, piece.counts, keep_graph=True, lengths=piece.lengths)
            return back(run, grad_ND[pairs])

        return Gathered(self._in_pieces(rows, again, now_s), non_finite)

    def _in_pieces(self, rows: PairRows, run: Callable[[PairRows, slice], Tensor], now_s: float) -> Tensor:
        outs: list[Tensor] = []
        start = 0
        while start < rows.num_pairs:
            limit = self._limit.rows(now_s=now_s)
            piece = rows if rows.num_pairs <= limit else rows.piece(start, limit)
            try:
                outs.append(run(piece, slice(start, start + piece.num_pairs)))
            except RuntimeError as error:
                self._shrink_after(error, piece.num_pairs, now_s)
                if rows.piece(start, self._limit.rows(now_s=now_s)).num_pairs >= piece.num_pairs:
                    raise DoesNotFit(piece.num_pairs, has_begun=start > 0) from None
            else:
                start += piece.num_pairs
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _shrink_after(self, error: RuntimeError, num_rows: int, now_s: float) -> None:
        """Next time fewer rows, if memory is what was missing; else raises the error again."""
        if not is_out_of_memory(error):
            raise error
        self._limit.shrink(num_rows, now_s=now_s)
        log.warning("compute.out_of_memory", rows=num_rows, next_rows=self._limit.rows(now_s=now_s))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Does the device lack memory? torch has a class of its own for that on CUDA only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
