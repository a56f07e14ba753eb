"""The update rule: AdamW or SGD for the experts whose turn it is, each by its own clock. No other is touched.

Knows nothing of stacks, calls or thresholds: it gets each stepping expert's own tensors.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from experts.settings import ExpertOptimizerSettings
from experts.state import Clock

Tensors = tuple[Tensor, ...]
"""One tensor per parameter of an expert."""


@dataclass(frozen=True)
class Update:
    """One expert's step. `weights` and `moments` are written in place; `gradients` are used up."""

    weights: Tensors
    moments: tuple[Tensors, ...]
    """In the order of `moment_names`."""
    gradients: Tensors
    """Of the sum of the losses of `loss_tokens` tokens."""
    loss_tokens: float
    rows: int
    """Rows the gradient was gathered over."""
    clock: Clock


def moment_names(settings: ExpertOptimizerSettings) -> tuple[str, ...]:
    """What the optimiser remembers per parameter."""
    return ("exp_avg", "exp_avg_sq") if settings.name == "adamw" else ()


def learning_rate(settings: ExpertOptimizerSettings, rows_learned: int) -> float:
    """The rate of the step with which an expert will have learned `rows_learned` rows: warm-up, then cosine."""
    warmed_up = min(1.0, rows_learned / settings.warmup_tokens) if settings.warmup_tokens else 1.0
    if settings.decay_tokens is None:
        return settings.learning_rate * warmed_up
    decay_rows = max(1, settings.decay_tokens - settings.warmup_tokens)
    progress = min(1.0, max(0.0, (rows_learned - settings.warmup_tokens) / decay_rows))
    floor = settings.final_rate_share
    return settings.learning_rate * warmed_up * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def gradient_norms(gradients: Sequence[Tensors]) -> list[float]:
    """The 2-norm of each expert's gradient over all its parameters. One wait for the device, however many experts."""
    if not gradients:
        return []
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensors in gradients for tensor in tensors])
    return torch.linalg.vector_norm(norms.view(len(gradients), -1), dim=1).tolist()


@torch.no_grad()
def take_steps(updates: Sequence[Update], settings: ExpertOptimizerSettings) -> list[Clock | None]:
    """Divide by the loss tokens, clip, step. Returns each expert's clock after it; None: not finite, and untouched."""
    norms = gradient_norms([update.gradients for update in updates])
    by_rate: dict[float, list[tuple[Update, float]]] = defaultdict(list)
    clocks: list[Clock | None] = []
    for update, norm in zip(updates, norms, strict=True):
        scale = 1.0 / update.loss_tokens
        if not math.isfinite(norm * scale):
            clocks.append(None)
            continue
        if settings.clip_norm is not None:
            scale *= min(1.0, settings.clip_norm / (norm * scale + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        rows_learned = update.clock.rows_learned + update.rows
        by_rate[learning_rate(settings, rows_learned)].append((update, scale))
        clocks.append(Clock(update.clock.version + 1, rows_learned))
    apply = _adamw if settings.name == "adamw" else _sgd
    for rate, scaled in by_rate.items():
        apply(scaled, rate, settings)
    return clocks


def _adamw(scaled: Sequence[tuple[Update, float]], rate: float, settings: ExpertOptimizerSettings) -> None:
    """torch's fused kernel over all tensors of all these experts, each with its own step count.

    One pass over memory: 12 ms for 8.4 M parameters on one CPU core, against 29 ms for the same in seven operations.
    """
    for update, scale in scaled:
        for gradient in update.gradients:
            gradient.mul_(scale)
    updates = [update for update, _ in scaled]
    versions = [float(update.clock.version) for update in updates for _ in update.weights]
    first, second = ([tensor for update in updates for tensor in update.moments[moment]] for moment in (0, 1))
    adamw(
        [weight for update in updates for weight in update.weights],
        [gradient for update in updates for gradient in update.gradients],
        first,
        second,
        [],
        list(torch.tensor(versions, device=updates[0].weights[0].device).unbind()),
        fused=True,
        amsgrad=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=rate,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )


def _sgd(scaled: Sequence[tuple[Update, float]], rate: float, settings: ExpertOptimizerSettings) -> None:
    """Without momentum; weight decay as torch.optim.SGD has it."""
    for update, scale in scaled:
        for weight, gradient in zip(update.weights, update.gradients, strict=True):
            if settings.weight_decay:
                weight.mul_(1 - rate * settings.weight_decay)
            weight.add_(gradient, alpha=-rate * scale)
