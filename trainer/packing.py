"""Which pairs of a layer travel to which peer, and in which order. Tensors of indices only; knows no network.

A row wanted by several experts of one peer travels once: the pairs then say which row they read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from trainer.routing.plan import Plan

P = TypeVar("P")


@dataclass(frozen=True)
class ExpertSlice:
    """An expert's consecutive pairs inside a peer's group."""

    slot: int
    """Index of the expert in its layer."""
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PeerGroup(Generic[P]):
    """The pairs of one layer and micro-batch that one peer gets in one call."""

    destination: P
    experts: tuple[ExpertSlice, ...]
    pairs_N: Tensor
    """(N,) positions in the plan, consecutive per expert."""
    rows_U: Tensor
    """(U,) distinct tokens whose activations travel."""
    row_index_N: Tensor | None
    """(N,) int32: pair n reads row row_index[n]; None when every pair has its own row, in order."""

    @property
    def num_pairs(self) -> int:
        return self.pairs_N.numel()

    def only(self, slots: Sequence[int]) -> "PeerGroup[P]":
        """The same rows with the pairs of some experts: what a backward sends when others were lost."""
        if len(slots) == len(self.experts):
            return self
        kept = [expert for expert in self.experts if expert.slot in set(slots)]
        positions_N = torch.cat([torch.arange(expert.start, expert.stop) for expert in kept])
        row_index_N = self.row_index_N
        if row_index_N is None:
            row_index_N = torch.arange(self.num_pairs, dtype=torch.int32)
        return PeerGroup(
            self.destination,
            _slices([(expert.slot, expert.num_rows) for expert in kept]),
            self.pairs_N[positions_N],
            self.rows_U,
            row_index_N[positions_N],
        )


def group_by_destination(plan: Plan, destinations: Mapping[int, P]) -> list[PeerGroup[P]]:
    """One group per destination, over the experts (slots) that have one; the others' pairs are in no group."""
    chosen: dict[P, list[tuple[int, slice]]] = {}
    for slot, pairs in plan.groups():
        if slot in destinations:
            chosen.setdefault(destinations[slot], []).append((slot, pairs))
    return [_group(plan, destination, experts) for destination, experts in chosen.items()]


def _group(plan: Plan, destination: P, experts: list[tuple[int, slice]]) -> PeerGroup[P]:
    pairs_N = torch.cat([torch.arange(pairs.start, pairs.stop) for _, pairs in experts])
    token_N = plan.token_N.to("cpu")[pairs_N]
    rows_U, row_index_N = torch.unique(token_N, return_inverse=True)
    slices = _slices([(slot, pairs.stop - pairs.start) for slot, pairs in experts])
    if rows_U.numel() == token_N.numel():
        return PeerGroup(destination, slices, pairs_N, token_N, None)
    return PeerGroup(destination, slices, pairs_N, rows_U, row_index_N.to(torch.int32))


def _slices(counts: Sequence[tuple[int, int]]) -> tuple[ExpertSlice, ...]:
    slices: list[ExpertSlice] = []
    start = 0
    for slot, num_rows in counts:
        slices.append(ExpertSlice(slot, start, start + num_rows))
        start += num_rows
    return tuple(slices)
