"""Logits to probabilities. A dead expert gets exactly 0, and so does everybody when nobody lives: never NaN."""

from typing import Protocol

import torch
from torch import Tensor


class Gate(Protocol):
    """(T, E) logits and the living to (T, E) probabilities, differentiable, in the dtype of the logits."""

    def __call__(self, logits_TE: Tensor, alive_E: Tensor) -> Tensor: ...


def softmax(logits_TE: Tensor, alive_E: Tensor) -> Tensor:
    """Experts compete; the living sum to 1."""
    # The lowest finite number, not -inf: a row in which nobody lives is no 0 / 0, not even in between.
    masked_TE = logits_TE.masked_fill(~alive_E, torch.finfo(logits_TE.dtype).min)
    return masked_TE.softmax(dim=-1).masked_fill(~alive_E, 0.0)


def sigmoid(logits_TE: Tensor, alive_E: Tensor) -> Tensor:
    """Each expert on its own: who else is alive does not change its probability."""
    return logits_TE.sigmoid().masked_fill(~alive_E, 0.0)
