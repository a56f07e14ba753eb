"""hivemind's experts as kinds of ours: the same functions of the same weights (tests/test_versus.py compares them).

`python -m benchmarks.versus.kinds peer --join ...` is `swarmoe peer` that knows them. One kernel differs: hivemind
scripts GELU's tanh form as eight operations, here it is torch's own, as anybody would write it today. Of 2048 rows,
D 256, forward and backward, that takes a third off on one CPU core: 59 ms instead of 86.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swarmoe import register_expert
from swarmoe.cli import main

EXPANSION = 4
"""Hidden width over model width in hivemind's `ffn`."""


@register_expert("hivemind_ffn")
class HivemindFeedForward(nn.Module):
    """hivemind.moe's `ffn`: two linear maps with biases and a GELU between them, the residual added, a LayerNorm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.ffn = nn.Linear(dim, hidden)
        self.ffn_output = nn.Linear(hidden, dim)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x_ND: Tensor) -> Tensor:
        hidden_NH = F.gelu(self.ffn(x_ND), approximate="tanh")
        return self.layer_norm(x_ND + self.ffn_output(hidden_NH))


@register_expert("hivemind_nop")
class HivemindNop(nn.Module):
    """hivemind.moe's `nop`: a copy of the rows. Its weight takes no part; theirs has no elements, ours has one."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND.clone()


if __name__ == "__main__":
    main()
