"""Logits: how well each expert suits each token. It knows nothing of who is alive."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_SCALE = 0.1
"""Switch Transformer section 2.4: a tenth of the usual variance keeps early routing from collapsing."""


class Score(Protocol):
    """(T, D) tokens to (T, E) logits, in at least float32 whatever the tokens come in."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class LinearScore(nn.Module):
    """One row per expert: logits = x @ weight_ED.T, no bias."""

    def __init__(self, dim: int, num_experts: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.weight_ED = _initial_weight(num_experts, dim, generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        return _linear_at_least_float32(x_TD, self.weight_ED)


class GridScore(nn.Module):
    """Product keys (Learning@home section 3.1): expert i sits at row i // columns, column i % columns of a grid.

    Its logit is its row's plus its column's, so the parameters grow with the square root of the number of experts
    and an expert that joins an empty cell needs no new ones.
    """

    def __init__(self, dim: int, num_experts: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.columns = math.isqrt(num_experts - 1) + 1
        self.rows = -(-num_experts // self.columns)
        self.weight_PD = _initial_weight(self.rows + self.columns, dim, generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        axes_TP = _linear_at_least_float32(x_TD, self.weight_PD)
        row_logits, column_logits = axes_TP.split([self.rows, self.columns], dim=-1)
        return (row_logits[:, :, None] + column_logits[:, None, :]).flatten(1)[:, : self.num_experts]


def _initial_weight(rows: int, dim: int, generator: torch.Generator) -> nn.Parameter:
    std = math.sqrt(INIT_SCALE / dim)
    return nn.Parameter(torch.empty(rows, dim).normal_(0.0, std, generator=generator))


def _linear_at_least_float32(x_TD: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, weight.dtype), torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight.to(dtype))
