"""Which pairs of a layer travel to which peer, and in which order. Tensors of indices only; knows no network.

A row wanted by several experts of one peer travels once: the pairs then say which row they read. A plan is sorted by
expert, so an expert's pairs are a slice of it: what is adjacent is never gathered, and a peer with every expert gets
views. T tokens, N pairs, U distinct tokens of a peer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from trainer.routing.plan import Plan

P = TypeVar("P")


@dataclass(frozen=True)
class ExpertSlice:
    """An expert's consecutive pairs: in the plan, and inside a peer's group."""

    slot: int
    """Index of the expert in its layer."""
    pairs: slice
    """Positions in the plan."""
    start: int
    """Where they begin in the group."""

    @property
    def num_rows(self) -> int:
        return self.pairs.stop - self.pairs.start

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True)
class PeerGroup(Generic[P]):
    """The pairs of one layer and micro-batch that one peer gets in one call."""

    destination: P
    experts: tuple[ExpertSlice, ...]
    num_rows: int
    """U"""
    rows_U: Tensor | None
    """(U,) distinct tokens whose activations travel; None: all T, in order."""
    row_index_N: Tensor | None
    """(N,) int32: pair n reads row row_index[n]; None when every pair has its own row, in order."""

    @property
    def num_pairs(self) -> int:
        """N"""
        return sum(expert.num_rows for expert in self.experts)

    def take_rows(self, x_TD: Tensor) -> Tensor:
        """(U, D): what travels of the tokens' values. Not copied when all do."""
        return x_TD if self.rows_U is None else x_TD.index_select(0, self.rows_U)

    def take_pairs(self, values_N: Tensor) -> Tensor:
        """Its pairs' part of something there is per pair of the plan. Not copied when they are adjacent."""
        parts = [values_N[pairs] for pairs, _ in self._runs(self.experts)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def place(self, rows_ND: Tensor, slots: Sequence[int], out_ND: Tensor) -> None:
        """Write rows of these experts, in this order, to their pairs of the plan."""
        expert_of = {expert.slot: expert for expert in self.experts}
        for pairs, rows in self._runs(expert_of[slot] for slot in slots):
            out_ND[pairs] = rows_ND[rows]

    def add_rows(self, grad_UD: Tensor, grad_TD: Tensor | None, *, num_tokens: int) -> Tensor:
        """(T, D): what came back per distinct row, added to the tokens'; none: to nothing."""
        if grad_TD is None and self.rows_U is None:
            return grad_UD
        if grad_TD is None:
            grad_TD = grad_UD.new_zeros(num_tokens, grad_UD.shape[1])
        return grad_TD.add_(grad_UD) if self.rows_U is None else grad_TD.index_add_(0, self.rows_U, grad_UD)

    def only(self, slots: Sequence[int]) -> "PeerGroup[P]":
        """The same rows with the pairs of some experts: what a backward sends when others were lost."""
        if len(slots) == len(self.experts):
            return self
        kept = [expert for expert in self.experts if expert.slot in set(slots)]
        row_index_N = self.row_index_N
        if row_index_N is None:
            row_index_N = torch.arange(self.num_pairs, dtype=torch.int32)
        return PeerGroup(
            self.destination,
            _in_order([(expert.slot, expert.pairs) for expert in kept]),
            self.num_rows,
            self.rows_U,
            torch.cat([row_index_N[expert.start : expert.stop] for expert in kept]),
        )

    @staticmethod
    def _runs(experts: Iterable[ExpertSlice]) -> Iterator[tuple[slice, slice]]:
        """These experts' pairs in the plan and as they follow each other; experts that are adjacent in both as one."""
        begin, end, at = 0, 0, 0
        for expert in experts:
            if expert.pairs.start != end and end > begin:
                yield slice(begin, end), slice(at, at + end - begin)
                at += end - begin
            if expert.pairs.start != end:
                begin = expert.pairs.start
            end = expert.pairs.stop
        if end > begin:
            yield slice(begin, end), slice(at, at + end - begin)


def group_by_destination(plan: Plan, destinations: Mapping[int, P]) -> list[PeerGroup[P]]:
    """One group per destination, over the experts (slots) that have one; the others' pairs are in no group."""
    chosen: dict[P, list[tuple[int, slice]]] = {}
    for slot, pairs in plan.groups():
        if slot in destinations:
            chosen.setdefault(destinations[slot], []).append((slot, pairs))
    token_N = plan.token_N.to("cpu")
    return [
        _group(token_N, plan.num_tokens, destination, _in_order(experts)) for destination, experts in chosen.items()
    ]


def _group(token_N: Tensor, num_tokens: int, destination: P, experts: tuple[ExpertSlice, ...]) -> PeerGroup[P]:
    mine_N = PeerGroup(destination, experts, 0, None, None).take_pairs(token_N)
    is_wanted_T = torch.zeros(num_tokens, dtype=torch.bool)
    is_wanted_T[mine_N] = True
    num_rows = int(is_wanted_T.sum())
    if num_rows == mine_N.numel():
        is_every_token = num_rows == num_tokens and torch.equal(mine_N, torch.arange(num_tokens))
        return PeerGroup(destination, experts, num_rows, None if is_every_token else mine_N, None)
    if num_rows == num_tokens:
        return PeerGroup(destination, experts, num_rows, None, mine_N.to(torch.int32))
    position_T = is_wanted_T.cumsum(0, dtype=torch.int32) - 1
    return PeerGroup(destination, experts, num_rows, is_wanted_T.nonzero().squeeze(1), position_T[mine_N])


def _in_order(pairs_of: Sequence[tuple[int, slice]]) -> tuple[ExpertSlice, ...]:
    slices: list[ExpertSlice] = []
    start = 0
    for slot, pairs in pairs_of:
        slices.append(ExpertSlice(slot, pairs, start))
        start = slices[-1].stop
    return tuple(slices)
