"""Published routers by name, as data; `build_router` puts the parts together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.routing.balance import Balance, BiasBalance, SeqLoss, SwitchLoss, ZLoss
from trainer.routing.gate import sigmoid, softmax
from trainer.routing.plan import Norm
from trainer.routing.router import Router
from trainer.routing.score import GridScore, LinearScore
from trainer.routing.selection import Capacity, SampledSecond, Select, TopK


@dataclass(frozen=True)
class Preset:
    """One published router."""

    top_k: int
    norm: Norm
    score: type[LinearScore] | type[GridScore] = LinearScore
    gate: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    groups: tuple[int, int] = (1, 1)
    """Groups of experts, and how many of them a token reaches; ignored where there are too few experts for it."""
    sampled_second: bool = False
    capacity: tuple[float, float] | None = None
    """Capacity factors in training and evaluation; none: nothing is dropped."""
    balance_loss: type[SwitchLoss] | type[SeqLoss] = SwitchLoss
    balance: float = 0.0
    """Weight of the balance loss."""
    z_loss: float = 0.0
    bias_rate: float = 0.0


PRESETS: Mapping[str, Preset] = {
    # Fedus et al. 2021, section 2: the probability itself is the weight, else one expert teaches the router nothing.
    "switch": Preset(top_k=1, norm="none", capacity=(1.25, 2.0), balance=1e-2),
    # Jiang et al. 2024. The losses are ours: Switch's and ST-MoE's published weights.
    "mixtral": Preset(top_k=2, norm="planned", balance=1e-2, z_loss=1e-3),
    # DeepSeek-AI 2024, section 2.1.2.
    "deepseek_v3": Preset(
        top_k=8,
        norm="planned",
        gate="sigmoid",
        scale=2.5,
        groups=(8, 4),
        balance_loss=SeqLoss,
        balance=1e-4,
        bias_rate=1e-3,
    ),
    # Lepikhin et al. 2020, algorithm 1; capacity 2T/E is a factor of 1 at two choices per token.
    "gshard": Preset(top_k=2, norm="responded", sampled_second=True, capacity=(1.0, 1.0), balance=1e-2),
    # Ryabinin and Gusev 2020: product keys, softmax over the experts that answered.
    "dmoe": Preset(top_k=4, norm="responded", score=GridScore),
}

NOT_BUILT = (
    *("soft", "noisy_topk", "hierarchical", "olmoe", "deepseek_moe", "deepseek_v2", "remoe", "sparsemax", "entmax"),
    *("base", "sinkhorn", "hash", "product_key", "expert_choice", "soft_moe", "random", "reinforce", "two_sided"),
    "domain",
)
"""Names that are promised and refused by name until they exist."""


def presets() -> tuple[str, ...]:
    """The names `build_router` builds."""
    return tuple(PRESETS)


def build_router(
    preset: str,
    *,
    dim: int,
    num_experts: int,
    top_k: int | None = None,
    balance: float | None = None,
    seed: int = 0,
) -> Router:
    """A router of `preset` for one layer of `num_experts` experts on tokens of width `dim`.

    `top_k` and `balance` (weight of the balance loss) replace the preset's own. The same seed makes the same router.
    ValueError on an unknown preset, and on a top_k that the preset or the layer cannot have.
    """
    wanted = _find(preset)
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the layer's {num_experts} experts, not {top_k}")
    generator = torch.Generator().manual_seed(seed)
    return Router(
        wanted.score(dim, num_experts, generator=generator),
        softmax if wanted.gate == "softmax" else sigmoid,
        _selection(wanted, top_k or wanted.top_k, num_experts),
        norm=wanted.norm,
        scale=wanted.scale,
        balance=_balances(wanted, wanted.balance if balance is None else balance, num_experts),
        generator=generator,
    )


def _find(preset: str) -> Preset:
    if preset in NOT_BUILT:
        raise ValueError(f"router preset {preset!r} is not built yet; there are {', '.join(PRESETS)}")
    if preset not in PRESETS:
        raise ValueError(f"no router preset is called {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def _selection(preset: Preset, top_k: int, num_experts: int) -> Select:
    groups, kept = preset.groups
    per_group, ragged = divmod(num_experts, groups)
    fits = not ragged and per_group >= 2 and kept * per_group >= top_k
    select: Select = TopK(top_k, groups, kept) if fits else TopK(top_k)
    if preset.sampled_second:
        select = SampledSecond(select)
    if preset.capacity is not None:
        select = Capacity(select, *preset.capacity)
    return select


def _balances(preset: Preset, weight: float, num_experts: int) -> list[Balance]:
    terms: list[Balance] = []
    if weight:
        terms.append(preset.balance_loss(weight))
    if preset.z_loss:
        terms.append(ZLoss(preset.z_loss))
    if preset.bias_rate:
        terms.append(BiasBalance(num_experts, preset.bias_rate))
    return terms
