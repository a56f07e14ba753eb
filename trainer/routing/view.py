"""What a step knows about the experts of one layer: a frozen snapshot. It knows no replica, address or clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Self

import torch
from torch import Tensor

from experts.uid import ExpertUid


@dataclass(frozen=True, eq=False)
class View:
    """Slot i is expert i of the layer, alive or not, so a slot means the same expert in every view of the run.

    Tensors live on the CPU. Build one with `of`, which makes the invariants true; the constructor only checks them.
    """

    uids: tuple[ExpertUid, ...]
    alive_E: Tensor
    """bool. A dead expert gets probability exactly 0."""
    share_E: Tensor
    """Wanted fraction of the load: positive where alive, 0 where dead, sums to 1 over the living."""
    prior_E: Tensor
    """Added to the probabilities for selection only; the published biases, zero mean over the living."""
    epoch: int = 0

    def __post_init__(self) -> None:
        shape = (len(self.uids),)
        if not self.alive_E.shape == self.share_E.shape == self.prior_E.shape == shape:
            raise ValueError(f"a view of {shape[0]} experts needs alive_E, share_E and prior_E of that length")
        if self.alive_E.dtype != torch.bool:
            raise ValueError(f"alive_E is bool, not {self.alive_E.dtype}")
        if self.uids and self.uids != _layer_uids(self.uids[0].layer, len(self.uids)):
            raise ValueError("a view lists all experts of one layer by index")
        if not self.prior_E.isfinite().all():
            raise ValueError("prior_E must be finite: a dead expert is said by alive_E")
        # Written so that NaN fails it too.
        if not torch.equal(self.share_E > 0, self.alive_E) or not bool((self.share_E >= 0).all()):
            raise ValueError("share_E must be positive where alive and zero where dead")
        if self.num_live and abs(float(self.share_E.sum()) - 1.0) > 1e-4:
            raise ValueError(f"share_E sums to {float(self.share_E.sum()):.6f} over the living, not to 1")

    @classmethod
    def of(
        cls,
        layer: int,
        alive: Sequence[bool] | Tensor,
        *,
        capacity: Sequence[float] | Tensor | None = None,
        bias: Sequence[float] | Tensor | None = None,
        epoch: int = 0,
    ) -> Self:
        """A view from what experts publish: any non-negative capacity, any finite bias. Missing: all the same.

        Capacities become shares; one that is zero, or tiny beside the largest, still gets a sliver: an expert that is
        alive may be chosen. Biases are recentred, since only their differences mean anything and each host
        drifts on its own.
        """
        alive_E = torch.as_tensor(alive, dtype=torch.bool)
        capacity_E = torch.ones(len(alive_E)) if capacity is None else torch.as_tensor(capacity, dtype=torch.float32)
        bias_E = torch.zeros(len(alive_E)) if bias is None else torch.as_tensor(bias, dtype=torch.float32)
        largest = torch.where(alive_E, capacity_E, 0.0).max().clamp(min=torch.finfo(torch.float32).tiny)
        relative_E = torch.where(alive_E, (capacity_E / largest).clamp(min=_LEAST_SHARE), 0.0)
        return cls(
            uids=_layer_uids(layer, len(alive_E)),
            alive_E=alive_E,
            share_E=relative_E / relative_E.sum().clamp(min=_LEAST_SHARE),
            prior_E=recentred(bias_E, alive_E),
            epoch=epoch,
        )

    @classmethod
    def all_alive(cls, layer: int, num_experts: int) -> Self:
        """Every expert lives and wants the same load: experts in process, and tests."""
        return cls.of(layer, [True] * num_experts)

    @property
    def num_experts(self) -> int:
        return len(self.uids)

    @cached_property
    def num_live(self) -> int:
        return int(self.alive_E.sum())


_LEAST_SHARE = 1e-3
"""Of the largest share. Balance losses divide by the share, so it must not vanish."""


@cache
def _layer_uids(layer: int, num_experts: int) -> tuple[ExpertUid, ...]:
    """One tuple for all views of a layer: a step makes several, and there may be thousands of experts."""
    return tuple(ExpertUid(layer, index) for index in range(num_experts))


def recentred(bias_E: Tensor, alive_E: Tensor) -> Tensor:
    """The biases less their mean over the living; zero where dead."""
    live_bias_E = torch.where(alive_E, bias_E, 0.0)
    mean = live_bias_E.sum() / alive_E.sum().clamp(min=1)
    return torch.where(alive_E, bias_E - mean, 0.0)
