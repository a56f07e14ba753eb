"""The update rule against torch.optim, one expert at a time."""

import math

import pytest
import torch
from torch import Tensor

from experts.optimizer import Update, gradient_norms, learning_rate, moment_names, take_steps
from experts.settings import ExpertOptimizerSettings
from experts.state import Clock

SHAPES = ((6, 4), (4, 6))
NUM_EXPERTS = 3


def tensors() -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in SHAPES)


def update(settings: ExpertOptimizerSettings, *, loss_tokens: float = 1.0, rows: int = 1) -> Update:
    moments = tuple(tuple(torch.zeros(shape) for shape in SHAPES) for _ in moment_names(settings))
    return Update(tensors(), moments, tensors(), loss_tokens=loss_tokens, rows=rows, clock=Clock())


def torch_optimizer(settings: ExpertOptimizerSettings, weights: list[Tensor]) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        weights, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_it_equals_torch_optim_for_every_expert(name: str, weight_decay: float, clip_norm: float | None) -> None:
    torch.manual_seed(0)
    settings = ExpertOptimizerSettings.model_validate(
        {"name": name, "learning_rate": 0.01, "weight_decay": weight_decay, "clip_norm": clip_norm}
    )
    updates = [update(settings) for _ in range(NUM_EXPERTS)]
    theirs = [[weight.clone().requires_grad_() for weight in one.weights] for one in updates]
    optimizers = [torch_optimizer(settings, weights) for weights in theirs]

    for step in range(5):
        gradients, loss_tokens = [tensors() for _ in updates], 7.0 + step
        clocks = take_steps(
            [
                Update(one.weights, one.moments, tuple(g.clone() for g in grads), loss_tokens, 1, Clock(step, step))
                for one, grads in zip(updates, gradients, strict=True)
            ],
            settings,
        )
        for weights, grads, optimizer in zip(theirs, gradients, optimizers, strict=True):
            for weight, gradient in zip(weights, grads, strict=True):
                weight.grad = gradient / loss_tokens
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(weights, clip_norm)
            optimizer.step()

        assert clocks == [Clock(step + 1, step + 1)] * NUM_EXPERTS
    for one, weights in zip(updates, theirs, strict=True):
        for ours, their in zip(one.weights, weights, strict=True):
            torch.testing.assert_close(ours, their.detach(), rtol=1e-6, atol=1e-6)


def test_experts_with_different_clocks_step_together_as_they_would_alone() -> None:
    torch.manual_seed(0)
    settings = ExpertOptimizerSettings(warmup_tokens=100)
    young, old = update(settings, rows=10), update(settings, rows=50)
    old = Update(old.weights, old.moments, old.gradients, 2.0, 50, Clock(40, 400))
    alone = [
        Update(*(_clones(one)), loss_tokens=one.loss_tokens, rows=one.rows, clock=one.clock) for one in (young, old)
    ]

    together = take_steps([young, old], settings)
    for one in alone:
        take_steps([one], settings)

    assert together == [Clock(1, 10), Clock(41, 450)]
    for one, other in zip((young, old), alone, strict=True):
        torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_expert_whose_gradient_is_not_finite_is_untouched_and_the_others_step(name: str, poison: float) -> None:
    torch.manual_seed(0)
    settings = ExpertOptimizerSettings.model_validate({"name": name})
    poisoned, sound = update(settings), update(settings)
    poisoned.gradients[0][1, 2] = poison
    before, sound_before = _clones(poisoned), _clones(sound)

    clocks = take_steps([poisoned, sound], settings)

    assert clocks == [None, Clock(1, 1)]
    for moment_or_weight, was in zip((poisoned.weights, *poisoned.moments), (before[0], *before[1]), strict=True):
        torch.testing.assert_close(moment_or_weight, was, rtol=0, atol=0)
    assert not torch.equal(sound.weights[0], sound_before[0][0])


def test_the_norm_is_over_all_parameters_of_an_expert() -> None:
    norms = gradient_norms([(torch.tensor([3.0]), torch.tensor([[4.0]])), (torch.zeros(2), torch.zeros(1))])

    assert norms == [5.0, 0.0]
    assert gradient_norms([]) == []


def test_the_rate_warms_up_then_falls_along_a_cosine_to_its_floor() -> None:
    settings = ExpertOptimizerSettings(learning_rate=1.0, warmup_tokens=100, decay_tokens=300, final_rate_share=0.1)

    rates = [learning_rate(settings, rows) for rows in (0, 50, 100, 200, 300, 10_000)]

    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])


def test_the_rate_is_constant_without_a_schedule() -> None:
    settings = ExpertOptimizerSettings(learning_rate=0.3)

    assert {learning_rate(settings, rows) for rows in (0, 1, 10**9)} == {0.3}


def test_a_decay_that_ends_before_the_warm_up_still_gives_finite_rates() -> None:
    settings = ExpertOptimizerSettings(learning_rate=1.0, warmup_tokens=100, decay_tokens=10)

    assert all(math.isfinite(learning_rate(settings, rows)) for rows in range(0, 200, 10))


def _clones(one: Update) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...], tuple[Tensor, ...]]:
    def clones(some: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in some)

    return clones(one.weights), tuple(clones(moment) for moment in one.moments), clones(one.gradients)
