"""The built-in kinds that see whole sequences: a causal transformer block, and a stack of them.

A block is laid out and named like a layer of the trunk, which is Qwen2's: pre-norm RMSNorm, attention with rotary
positions, bias-free SwiGLU, a residual around each half.

L sequences, S tokens of the longest, D model width, A attention heads, C channels of one head, H hidden width.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experts.kinds import SwiGLU
from experts.registry import register_expert
from experts.settings import ExpertShape

_CHANNELS = 64
"""Of one head, about."""
_ROPE_THETA = 10_000.0
_NORM_EPS = 1e-6


def num_heads(dim: int) -> int:
    """The most heads of 64 channels or more that divide `dim`, each into an even number of them. ValueError if odd."""
    if dim % 2:
        raise ValueError(f"a transformer block needs an even expert.dim: rotary positions turn pairs; {dim} is odd")
    return next(heads for heads in range(max(1, dim // _CHANNELS), 0, -1) if dim % (2 * heads) == 0)


def attention_flops(shape: ExpertShape, context: int) -> int:
    """Scores and their weighted sum over the (context + 1) / 2 tokens that a token sees on average, of one block."""
    return 2 * shape.dim * (context + 1)


def stack_flops(shape: ExpertShape, context: int) -> int:
    """As `attention_flops`, of all blocks."""
    return shape.blocks * attention_flops(shape, context)


@register_expert("block", schema="sequence", mixing_flops=attention_flops)
class Block(nn.Module):
    """One transformer block. Padding lies behind a sequence's last token, where causal attention never looks."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = _Attention(dim)
        self.mlp = SwiGLU(dim, hidden)
        self.input_layernorm = nn.RMSNorm(dim, eps=_NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=_NORM_EPS)

    def forward(self, x_LSD: Tensor, lengths_L: Tensor) -> Tensor:
        return self.turned(x_LSD, *_rope(x_LSD))

    def turned(self, x_LSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """With the angles of `_rope`, which are the same for every block."""
        x_LSD = x_LSD + self.self_attn(self.input_layernorm(x_LSD), cos_SC, sin_SC)
        return x_LSD + self.mlp(self.post_attention_layernorm(x_LSD))


@register_expert("stack", schema="sequence", mixing_flops=stack_flops, has_blocks=True)
class Stack(nn.Module):
    """`blocks` transformer blocks, one after the other: as many times the work for the same bytes on the wire."""

    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim, hidden) for _ in range(blocks))

    def forward(self, x_LSD: Tensor, lengths_L: Tensor) -> Tensor:
        cos_SC, sin_SC = _rope(x_LSD)
        for block in self.layers:
            x_LSD = cast("Block", block).turned(x_LSD, cos_SC, sin_SC)
        return x_LSD


class _Attention(nn.Module):
    """Causal, every head with keys of its own; biases on q, k and v as in Qwen2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels = dim // num_heads(dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.zeros_(projection.bias)

    def forward(self, x_LSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        q_LASC, k_LASC, v_LASC = (
            projection(x_LSD).unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_LASC = F.scaled_dot_product_attention(
            _rotate(q_LASC, cos_SC, sin_SC), _rotate(k_LASC, cos_SC, sin_SC), v_LASC, is_causal=True
        )
        return self.o_proj(mixed_LASC.transpose(1, 2).flatten(2))


def _rope(x_LSD: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, C) of RoFormer's angles, each frequency in both halves of the channels."""
    channels = x_LSD.shape[2] // num_heads(x_LSD.shape[2])
    frequencies = _ROPE_THETA ** -(torch.arange(0, channels, 2, device=x_LSD.device, dtype=torch.float) / channels)
    positions_S = torch.arange(x_LSD.shape[1], device=x_LSD.device, dtype=torch.float)
    angles_SC = torch.outer(positions_S, frequencies).repeat(1, 2)
    return angles_SC.cos().to(x_LSD.dtype), angles_SC.sin().to(x_LSD.dtype)


def _rotate(x_LASC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    left, right = x_LASC.chunk(2, dim=-1)
    return x_LASC * cos_SC + torch.cat((-right, left), dim=-1) * sin_SC
