"""The built-in expert kinds. Each formula is written once; the module declares the weights it reads.

N rows, D model width, H hidden width. Weights lie as `nn.Linear` keeps them, (out, in), without biases.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from experts.registry import Linear, register_expert


def ffn(linear: Linear, x_ND: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Two linear maps with a GELU between them (Vaswani et al. 2017, eq. 2; Hendrycks and Gimpel 2016)."""
    return linear(F.gelu(linear(x_ND, up_HD)), down_DH)


def swiglu(linear: Linear, x_ND: Tensor, gate_HD: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Shazeer 2020, eq. 6: `down(silu(gate x) * up x)`."""
    return linear(F.silu(linear(x_ND, gate_HD)) * linear(x_ND, up_HD), down_DH)


@register_expert("ffn", formula=ffn)
class FeedForward(nn.Module):
    """`up_proj`, GELU, `down_proj`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return ffn(F.linear, x_ND, self.up_proj.weight, self.down_proj.weight)


@register_expert("swiglu", formula=swiglu)
class SwiGLU(nn.Module):
    """Weights named and laid out like an expert of Qwen2-MoE, so that an export copies them as they are."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return swiglu(F.linear, x_ND, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
