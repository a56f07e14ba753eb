"""An expert that copies its rows, for benchmarks whose subject is everything around it.

`python -m benchmarks.copying_expert peer --join ...` is `swarmoe peer` that knows it.
"""

import torch
from torch import Tensor, nn

from swarmoe import register_expert
from swarmoe.cli import main

KIND = "copying"


@register_expert(KIND)
class Copying(nn.Module):
    """A copy of the rows, and a weight that takes no part in it: an expert without any has nothing to host."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND.clone()


if __name__ == "__main__":
    main()
