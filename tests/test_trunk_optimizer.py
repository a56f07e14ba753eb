"""The trunk's optimizer: what is decayed, what is clipped with what, and that it resumes exactly."""

import math

import pytest
import torch
from torch import Tensor, nn

from peer.manifest import TrunkOptimizerSettings
from trainer.trunk_optimizer import TrunkOptimizer, learning_rate

SETTINGS = TrunkOptimizerSettings(learning_rate=0.1, weight_decay=0.5, clip_norm=2.0, warmup_steps=0)


def fresh_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "vector": (4,), "router": (2, 4)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def build(parameters: dict[str, nn.Parameter]) -> TrunkOptimizer:
    return TrunkOptimizer(parameters, routers={"router": parameters["router"]}, settings=SETTINGS)


def random_gradients(optimizer: TrunkOptimizer, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in optimizer.parameters]


def test_decay_shrinks_matrices_but_neither_vectors_nor_routers() -> None:
    parameters = fresh_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = build(parameters)

    optimizer.update([torch.zeros_like(parameter) for parameter in optimizer.parameters], step=0)

    torch.testing.assert_close(parameters["matrix"], before["matrix"] * (1 - 0.1 * 0.5))
    assert torch.equal(parameters["vector"], before["vector"])
    assert torch.equal(parameters["router"], before["router"])


def test_a_router_in_panic_does_not_shrink_the_trunks_step() -> None:
    parameters = fresh_parameters()
    optimizer = build(parameters)
    matrix, vector, router = torch.full((3, 4), 0.1), torch.zeros(4), torch.full((2, 4), 1000.0)

    update = optimizer.update([matrix, vector, router], step=0)

    assert update.router_norm == pytest.approx(1000 * math.sqrt(8))
    assert update.trunk_norm == pytest.approx(0.1 * math.sqrt(12))
    torch.testing.assert_close(matrix, torch.full((3, 4), 0.1))
    assert router.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_a_trunk_gradient_is_clipped_to_its_norm() -> None:
    optimizer = build(fresh_parameters())
    matrix = torch.full((3, 4), 50.0)

    optimizer.update([matrix, torch.zeros(4), torch.zeros(2, 4)], step=0)

    assert matrix.norm().item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("poisoned", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(poisoned: int) -> None:
    parameters = fresh_parameters()
    optimizer = build(parameters)
    optimizer.update(random_gradients(optimizer, seed=1), step=0)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moments = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    gradients = random_gradients(optimizer, seed=2)
    gradients[poisoned][0, 0] = math.nan

    update = optimizer.update(gradients, step=1)

    assert not update.applied
    assert all(torch.equal(parameters[name], value) for name, value in weights.items())
    assert all(torch.equal(optimizer.state_tensors()[key], value) for key, value in moments.items())


def test_a_parameter_without_a_gradient_is_not_touched() -> None:
    parameters = fresh_parameters()
    before = parameters["matrix"].detach().clone()
    optimizer = build(parameters)

    optimizer.update([None, torch.ones(4), torch.ones(2, 4)], step=0)

    assert torch.equal(parameters["matrix"], before)


def test_it_goes_on_from_its_state_exactly() -> None:
    ours, theirs = fresh_parameters(), fresh_parameters()
    first = build(ours)
    first.update(random_gradients(first, seed=1), step=0)
    for name, parameter in theirs.items():
        parameter.data.copy_(ours[name].data)
    second = build(theirs)

    second.load_state_tensors(first.state_tensors())
    for optimizer in (first, second):
        optimizer.update(random_gradients(optimizer, seed=2), step=1)

    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert second.state_tensors().keys() == {
        f"{name}/{kind}" for name in ours for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def test_state_that_fits_no_parameter_is_refused() -> None:
    optimizer = build(fresh_parameters())

    for state in ({"stranger/exp_avg": torch.zeros(3, 4)}, {"matrix/exp_avg": torch.zeros(4, 3)}):
        with pytest.raises(ValueError, match="fits no parameter"):
            optimizer.load_state_tensors(state)


def test_a_parameter_outside_the_groups_is_a_bug() -> None:
    parameters = fresh_parameters()

    with pytest.raises(AssertionError):
        TrunkOptimizer(parameters, routers={"other": nn.Parameter(torch.zeros(5))}, settings=SETTINGS)


def test_the_rate_rises_linearly_then_falls_to_a_tenth_and_stays() -> None:
    settings = TrunkOptimizerSettings(learning_rate=1.0, warmup_steps=10, decay_steps=110)

    rates = [learning_rate(settings, step) for step in (0, 4, 9, 10, 60, 110, 1000)]

    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_without_decay_the_rate_is_constant_after_warmup() -> None:
    settings = TrunkOptimizerSettings(learning_rate=1.0, warmup_steps=2, decay_steps=None)

    assert [learning_rate(settings, step) for step in (0, 1, 2, 10_000)] == [0.5, 1.0, 1.0, 1.0]
