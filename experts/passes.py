"""One forward through experts of a bank, and the way back. Knows nothing of clocks or steps.

N rows, consecutive per expert; D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from experts.optimizer import Tensors
from experts.sequences import Lengths
from experts.uid import ExpertUid


@dataclass(frozen=True)
class Graph:
    """Rows that were computed together, and what autograd needs to go back once."""

    x_ND: Tensor
    weights: Tensors
    """Stacked leaves, (experts, *shape) each."""
    out_ND: Tensor


@dataclass
class Pass:
    """What `ExpertBank.forward` gives: the outputs, and what a backward needs. Its rows must not be written to."""

    x_ND: Tensor
    out_ND: Tensor
    """Detached."""
    uids: tuple[ExpertUid, ...]
    counts: tuple[int, ...]
    """Rows of each expert."""
    lengths: tuple[Lengths, ...] | None
    """Of each expert's sequences; None when its kind sees single rows."""
    versions: tuple[int, ...]
    """Of each expert, when it computed this."""
    revisions: tuple[int, ...] = field(repr=False)
    """As `versions`, but never repeated within a bank."""
    graphs: Mapping[tuple[int, ...], Graph] | None = field(repr=False)
    """By the positions computed together; None when not kept, or used."""
    graph_bytes: int
    """An upper bound of what the graphs hold besides the rows."""
    non_finite: set[ExpertUid] = field(default_factory=set[ExpertUid])
    """Whose gradient the backward threw away."""

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.counts))

    def span(self, positions: tuple[int, ...]) -> slice:
        """The rows from the first to the last of these experts; between them only experts without rows."""
        first, last = positions[0], positions[-1]
        return slice(self._ends[first] - self.counts[first], self._ends[last])

    def release_graph(self) -> None:
        """Keep the rows only; a backward then computes the outputs again."""
        self.graphs = None
        self.graph_bytes = 0


def load_autograd() -> None:
    """Let torch import what it needs for a process's first backward: a second or two that no call should wait for."""
    leaf = torch.zeros((), requires_grad=True)
    torch.autograd.grad(leaf.exp(), leaf, torch.ones(()))


def gradients(graph: Graph, grad_out_ND: Tensor) -> tuple[Tensor, list[Tensors]]:
    """The gradient of the rows, and per expert of its weights in float32, which nobody else refers to.

    Uses the graph up.
    """
    grad_x_ND, *stacked = torch.autograd.grad(
        graph.out_ND, (graph.x_ND, *graph.weights), grad_out_ND, materialize_grads=True
    )
    # An expert's maths may make autograd hand out one tensor twice, expanded, or the very gradient it was given.
    lent = {grad_out_ND.untyped_storage().data_ptr(), grad_x_ND.untyped_storage().data_ptr()}
    owned: list[Tensor] = []
    for gradient in stacked:
        storage = gradient.untyped_storage().data_ptr()
        precise = gradient.float()  # a copy already where the weights that compute are rounded
        is_lent = storage in lent and precise is gradient
        owned.append(precise.clone(memory_format=torch.contiguous_format) if is_lent else precise.contiguous())
        lent.add(storage)
    return grad_x_ND, list(zip(*owned, strict=True))
