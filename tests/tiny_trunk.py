"""A trunk small enough for unit tests, whose mixtures add nothing."""

import torch
from torch import Tensor, nn

from peer.manifest import ModelSettings
from trainer.model import TransformerLM


class NoExperts(nn.Module):
    """A swarm in which nobody answers."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return torch.zeros_like(x_BSD)


def tiny_trunk(*, context: int = 8, seed: int = 0) -> TransformerLM:
    settings = ModelSettings(dim=8, layers=1, heads=2, kv_heads=1, context=context, shared_hidden=8)
    return TransformerLM(settings, moe_layers=1, make_moe=lambda _: NoExperts(), seed=seed)
