"""hivemind's own experts as kinds of ours, so that both contestants run the same code on the same rows.

`python -m benchmarks.versus.kinds peer --join ...` is `swarmoe peer` that knows them. Nothing of hivemind's network is
used here, only two modules.
"""

from collections.abc import Callable

import torch
from hivemind.moe.server.layers.common import FeedforwardBlock
from torch import Tensor, nn

from swarmoe import register_expert
from swarmoe.cli import main

EXPANSION = 4
"""Hidden width over model width in hivemind's `ffn`."""

_feed_forward: Callable[[int], nn.Module] = FeedforwardBlock


@register_expert("hivemind_ffn")
class HivemindFeedForward(nn.Module):
    """hivemind's `ffn`, itself: two linear maps with biases, tanh GELU, residual, LayerNorm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        if hidden != EXPANSION * dim:
            raise ValueError(f"hivemind's ffn of width {dim} has the inner width {EXPANSION * dim}, not {hidden}")
        self.block = _feed_forward(dim)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.block(x_ND)


@register_expert("hivemind_nop")
class HivemindNop(nn.Module):
    """hivemind's `nop`: a copy of the rows, and a weight that takes no part in it. Theirs has no elements, ours one."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND.clone()


if __name__ == "__main__":
    main()
