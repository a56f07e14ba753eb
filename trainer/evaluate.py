"""How well a model predicts text it has never seen, in bits per byte. Leaves model and experts as they were."""

import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from trainer.model import TransformerLM

EvalCalls = Callable[[], AbstractContextManager[object]]
"""Makes the context in which one forward may ask experts without teaching them."""


def bits_per_byte(
    model: TransformerLM, windows: tuple[Tensor, Tensor], *, sequences: int, eval_calls: EvalCalls
) -> float:
    """Mean over all target bytes of `windows` (tokens and targets, (W, S)), `sequences` windows to a forward."""
    tokens_WS, targets_WS = windows
    total_nats, total_tokens = 0.0, 0
    for tokens_BS, targets_BS in zip(tokens_WS.split(sequences), targets_WS.split(sequences), strict=True):
        with without_learning(model), eval_calls():
            loss, num_tokens = model.loss_sum(_beside(model, tokens_BS), _beside(model, targets_BS))
        total_nats += loss.item()
        total_tokens += num_tokens
    return total_nats / math.log(2) / total_tokens


@contextmanager
def without_learning(model: nn.Module) -> Generator[None]:
    """Evaluation mode and no graph; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _beside(model: nn.Module, tokens: Tensor) -> Tensor:
    return tokens.to(next(model.parameters()).device)
