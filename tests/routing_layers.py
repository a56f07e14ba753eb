"""The other half of a mixture layer, in process, for tests of the router: experts, and routers from parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.routing.balance import Balance
from trainer.routing.gate import Gate, softmax
from trainer.routing.plan import Norm, Plan
from trainer.routing.router import Router
from trainer.routing.score import LinearScore
from trainer.routing.selection import Select, TopK


class LocalExperts(nn.Module):
    """E experts relu(x a) b; row N of the result is the answer to pair N of a plan."""

    def __init__(self, num_experts: int, dim: int, hidden: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.a_EDH = nn.Parameter(torch.randn(num_experts, dim, hidden, generator=generator) / dim**0.5)
        self.bias_EH = nn.Parameter(torch.zeros(num_experts, hidden))
        self.b_EHD = nn.Parameter(torch.randn(num_experts, hidden, dim, generator=generator) / hidden**0.5)

    def forward(self, plan: Plan, x_ND: Tensor) -> Tensor:
        answers = [self.expert(slot, x_ND[rows]) for slot, rows in plan.groups()]
        return torch.cat(answers) if answers else x_ND

    def expert(self, slot: int, x_ND: Tensor) -> Tensor:
        return torch.relu(x_ND @ self.a_EDH[slot] + self.bias_EH[slot]) @ self.b_EHD[slot]

    @torch.no_grad()
    def make_equal(self) -> None:
        for stacked in self.parameters():
            stacked.copy_(stacked[:1].expand_as(stacked))


def linear_router(
    dim: int,
    num_experts: int,
    select: Select | int,
    *,
    gate: Gate = softmax,
    norm: Norm = "planned",
    scale: float = 1.0,
    balance: Sequence[Balance] = (),
    seed: int = 0,
) -> Router:
    """A router over one row per expert; an int selects that many best."""
    generator = torch.Generator().manual_seed(seed)
    return Router(
        LinearScore(dim, num_experts, generator=generator),
        gate,
        TopK(select) if isinstance(select, int) else select,
        norm=norm,
        scale=scale,
        balance=balance,
        generator=generator,
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
