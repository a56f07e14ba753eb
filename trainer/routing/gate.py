"""Logits to probabilities. A dead expert gets exactly 0, and so does everybody when nobody lives: never NaN."""

from typing import Protocol

import torch
from torch import Tensor


class Gate(Protocol):
    """(T, E) logits and the living to (T, E) probabilities, differentiable, in the dtype of the logits."""

    def __call__(self, logits_TE: Tensor, alive_E: Tensor) -> Tensor: ...


def softmax(logits_TE: Tensor, alive_E: Tensor) -> Tensor:
    """Experts compete; the living sum to 1."""
    # Where nobody lives nobody is shut out either: no 0 / 0, not even in between; the product makes it zero. Added and
    # multiplied rather than filled in: over thousands of experts a broadcast masked_fill takes five times as long.
    is_out_E = ~alive_E & alive_E.any()
    shut_out_E = torch.zeros_like(alive_E, dtype=logits_TE.dtype).masked_fill_(is_out_E, -torch.inf)
    return (logits_TE + shut_out_E).softmax(dim=-1) * alive_E.to(logits_TE.dtype)


def sigmoid(logits_TE: Tensor, alive_E: Tensor) -> Tensor:
    """Each expert on its own: who else is alive does not change its probability."""
    return logits_TE.sigmoid() * alive_E.to(logits_TE.dtype)
