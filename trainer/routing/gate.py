"""Logits to probabilities. A dead expert gets exactly 0, and so does everybody when nobody lives: never NaN."""

from typing import Protocol

import torch
from torch import Tensor


class Gate(Protocol):
    """(T, E) logits and the living to (T, E) probabilities, differentiable, in the dtype of the logits."""

    def __call__(self, logits_TE: Tensor, alive_E: Tensor) -> Tensor: ...


def softmax(logits_TE: Tensor, alive_E: Tensor) -> Tensor:
    """Experts compete; the living sum to 1. Waits for the device."""
    # Over thousands of experts every pass over (T, E) counts, and a broadcast masked_fill for five of them.
    num_live = int(alive_E.sum())
    if num_live == 0:
        return logits_TE * 0.0  # no 0 / 0, and still a way back
    if num_live < len(alive_E):
        logits_TE = logits_TE + torch.zeros_like(alive_E, dtype=logits_TE.dtype).masked_fill_(~alive_E, -torch.inf)
    return logits_TE.softmax(dim=-1)


def sigmoid(logits_TE: Tensor, alive_E: Tensor) -> Tensor:
    """Each expert on its own: who else is alive does not change its probability."""
    return logits_TE.sigmoid() * alive_E.to(logits_TE.dtype)
