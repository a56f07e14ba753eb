"""The training step: micro-batches in flight, experts elsewhere, gradients added in one order. Fits on one screen.

Knows no swarm: the model's mixture layers do. What a step lost is counted by its scope; what it means is decided here.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from peer.manifest import RunManifest
from trainer.data import ByteDataset
from trainer.ledger import Ledger
from trainer.model import TransformerLM
from trainer.moe import MoELayer
from trainer.scope import MicroBatch, StepScope
from trainer.trunk_optimizer import TrunkOptimizer

R = TypeVar("R")


@dataclass(frozen=True)
class StepOutcome:
    """What one step did. Tokens are counted as trained only when the trunk stepped."""

    bits_per_byte: float | None
    """Mean over the step's tokens; None when it is not finite."""
    tokens: int
    skipped: str | None
    """Why the trunk did not step; None when it did."""


@dataclass(frozen=True)
class _Forward:
    """A micro-batch on its way: its graph is open until its backward."""

    micro_batch: MicroBatch
    total: Tensor
    """Sum of the token losses, and of the balance losses for as many tokens: what is differentiated."""
    nats: float
    num_tokens: int


class TrainingLoop:
    """Steps a model. Owned by one thread; its workers only run forwards and backwards. Use as a context manager."""

    def __init__(
        self, model: TransformerLM, optimizer: TrunkOptimizer, data: ByteDataset, manifest: RunManifest, *, shard: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.ledger = Ledger()
        self._manifest = manifest
        self._shard = shard
        self._moe_layers = [layer for layer in model.moe_modules() if isinstance(layer, MoELayer)]
        self._workers = ThreadPoolExecutor(manifest.batch.micro_batches, "swarmoe-train", initializer=_prepare_thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown()

    # ---- one training step --------------------------------------------------------------------------------------

    def step(self, step: int) -> StepOutcome:
        """Forward all micro-batches, refuse the step if too little came back, else backward all and step the trunk.

        No backward is sent before every forward is in, so a step skipped for its forwards has taught no expert
        anything. Trunk and routers are after any skipped step what they were before it.
        """
        scope = StepScope(deadline_s=time.monotonic() + self._manifest.wire.step_timeout_s, ledger=self.ledger)
        self.model.train()
        forwards = self._in_flight(lambda index: self._forward(step, index, scope))
        num_tokens = sum(forward.num_tokens for forward in forwards)
        nats = sum(forward.nats for forward in forwards) / num_tokens
        skipped = self._reason_to_skip(scope, nats)
        if skipped is None:
            gradients = self._in_flight(lambda index: self._backward(forwards[index]))
            update = self.optimizer.update(_mean(gradients, num_tokens), step=step)
            skipped = None if update.applied else "the trunk's gradient is not finite"
        if skipped is None:
            scope.apply_observations()
        bits_per_byte = nats / math.log(2) if math.isfinite(nats) else None
        return StepOutcome(bits_per_byte, num_tokens if skipped is None else 0, skipped)

    def _forward(self, step: int, index: int, scope: StepScope) -> _Forward:
        batch = self._manifest.batch
        tokens_BS, targets_BS = self.data.batch(
            step, index, trainer_shard=self._shard, sequences=batch.sequences, seed=self._manifest.seed
        )
        micro_batch = MicroBatch(scope, index, loss_tokens=float(targets_BS.numel()))
        with micro_batch.activate():
            loss, num_tokens = self.model.loss_sum(tokens_BS, targets_BS)
            balance = sum((layer.loss for layer in self._moe_layers), start=loss.new_zeros(()))
        return _Forward(micro_batch, loss + balance * num_tokens, loss.item(), num_tokens)

    def _backward(self, forward: _Forward) -> list[Tensor | None]:
        with forward.micro_batch.activate():
            return list(torch.autograd.grad(forward.total, self.optimizer.parameters, allow_unused=True))

    def _reason_to_skip(self, scope: StepScope, nats: float) -> str | None:
        worst = scope.worst_layer()
        if worst is not None and worst[1].share < self._manifest.min_answered_share:
            layer, answers = worst
            return f"layer {layer}: only {answers.answered} of {answers.sent} pairs came back"
        return None if math.isfinite(nats) else "the loss is not finite"

    def _in_flight(self, work: Callable[[int], R]) -> list[R]:
        """Run `work` for every micro-batch side by side; results in micro-batch order."""
        return list(self._workers.map(work, range(self._manifest.batch.micro_batches)))


def _mean(gradients: Sequence[Sequence[Tensor | None]], num_tokens: int) -> list[Tensor | None]:
    """Add up per parameter, always in micro-batch order: floating-point sums depend on it."""
    summed: list[Tensor | None] = []
    for parts in zip(*gradients, strict=True):
        present = [part for part in parts if part is not None]
        summed.append(torch.stack(present).sum(0).div_(num_tokens) if present else None)
    return summed


def _prepare_thread() -> None:
    # Thread-local in torch. With it, a remote call's backward runs on this thread, not on the device's single one.
    torch.autograd.set_multithreading_enabled(False)
