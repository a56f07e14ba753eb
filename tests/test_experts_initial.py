"""Fresh experts: the same on every host."""

import pytest
import torch
from torch import Tensor, nn

from experts.initial import initial_weights
from experts.registry import ExpertKind, expert_kind
from experts.settings import ExpertShape
from experts.uid import ExpertUid, initial_seed


class ManyDraws(nn.Module):
    """Draws in most of the ways modules do."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, hidden)
        self.embedding = nn.Embedding(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        self.drawn = nn.Parameter(torch.randn(dim))
        self.uniform = nn.Parameter(torch.empty(dim).uniform_(-1, 1))
        self.xavier = nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, dim)))
        self.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim)))
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(dim, dim)))


KINDS = [expert_kind("ffn"), expert_kind("swiglu"), ExpertKind("many_draws", "token", ManyDraws, None)]
SHAPE = ExpertShape(dim=4, hidden=8)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_follow_from_the_seed_alone(kind: ExpertKind) -> None:
    torch.manual_seed(1)
    first = initial_weights(kind, SHAPE, 7)
    torch.manual_seed(2)
    second = initial_weights(kind, SHAPE, 7)
    other = initial_weights(kind, SHAPE, 8)

    assert equal(first, second)
    assert not equal(first, other)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_fresh_expert_leaves_the_global_generator_alone(kind: ExpertKind) -> None:
    before = torch.get_rng_state()

    initial_weights(kind, SHAPE, 7)

    assert torch.equal(torch.get_rng_state(), before)


def test_linear_weights_have_the_spread_of_nn_linear() -> None:
    weights = initial_weights(expert_kind("ffn"), ExpertShape(dim=64, hidden=256), 0)

    assert weights["up_proj.weight"].std() == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.05)
    assert weights["down_proj.weight"].abs().max() <= (1 / 256) ** 0.5


def test_seeds_differ_between_experts_layers_and_runs() -> None:
    seeds = {initial_seed(run, ExpertUid(layer, index)) for run in (0, 1) for layer in (0, 1) for index in (0, 1)}

    assert len(seeds) == 8
