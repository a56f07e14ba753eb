"""One mixture-of-experts layer whose experts live elsewhere: route, send, combine. Drop-in for any PyTorch model.

Knows neither peers nor the wire: experts are behind `Experts`, what exists behind a function that gives a `View`.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.ledger import Ledger
from trainer.remote_experts import Experts
from trainer.routing.router import Router
from trainer.routing.view import View
from trainer.scope import MicroBatch, StepScope, current_micro_batch


@dataclass(frozen=True)
class LayerMetrics:
    """What became of the last forward's pairs."""

    pairs_sent: int
    pairs_answered: int
    experts_alive: int
    tokens_without_answer: int


@dataclass(frozen=True)
class _Forward:
    loss: Tensor
    token_N: Tensor
    ok_N: Tensor
    num_tokens: int
    experts_alive: int

    def measure(self) -> LayerMetrics:
        """Counted when it is asked for, since that waits for the device and most forwards' counts nobody reads."""
        answered_T = self.ok_N.new_zeros(self.num_tokens).index_fill_(0, self.token_N[self.ok_N], True)
        return LayerMetrics(
            pairs_sent=len(self.token_N),
            pairs_answered=int(self.ok_N.sum()),
            experts_alive=self.experts_alive,
            tokens_without_answer=self.num_tokens - int(answered_T.sum()),
        )


class MoELayer(nn.Module):
    """(..., D) -> (..., D): the weighted sum of the experts each token was routed to, zero where none answered.

    With `whole_sequences`, for experts that see sequences, x is (..., S, D); a sequence is routed as one and lost as
    one. The router sees its first token alone: the choice of experts bears on every token of the sequence, and the
    first is the only one that none of them may not know. A mean would tell each token of those after it.

    `loss` (add it to yours, weighted as the preset says) and `metrics` belong to the calling thread's last forward.
    Outside a training loop of ours every forward is a step of its own, with `timeout_s` for the way there and back.
    """

    def __init__(
        self,
        layer: int,
        router: Router,
        experts: Experts,
        view: Callable[[int], View],
        *,
        timeout_s: float,
        whole_sequences: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.router = router
        self.ledger = Ledger()
        """Counts of forwards outside a training loop of ours."""
        self._experts = experts
        self._view = view
        self._timeout_s = timeout_s
        self._whole_sequences = whole_sequences
        self._last = threading.local()

    @property
    def loss(self) -> Tensor:
        """The balance loss of this thread's last forward, already weighted; a scalar."""
        return self._of_last_forward().loss

    @property
    def metrics(self) -> LayerMetrics:
        """Counts of this thread's last forward."""
        return self._of_last_forward().measure()

    def forward(self, x: Tensor) -> Tensor:
        """Blocks until the experts have answered or the deadline is over; never longer."""
        micro_batch = current_micro_batch() or self._step_of_its_own()
        x_TD = x.reshape(-1, x.shape[-1])
        view = self._view(self.layer)
        seq_len = max(1, x.shape[-2] if x.dim() > 2 else x_TD.shape[0])
        if self._whole_sequences:
            routed = self.router(x_TD[::seq_len], view)
            plan = routed.spread(seq_len)
        else:
            routed = plan = self.router(x_TD, view, seq_len=seq_len)
        out_ND, ok_N = self._experts.run(x_TD, plan, self.layer, micro_batch)
        y_TD = plan.combine(out_ND, ok_N)
        self._last.forward = _Forward(self.router.loss(routed), plan.token_N, ok_N, plan.num_tokens, view.num_live)
        if self.training and micro_batch.scope.train:
            micro_batch.observe(lambda: self.router.learn(routed))
        return y_TD.reshape(x.shape)

    def _step_of_its_own(self) -> MicroBatch:
        scope = StepScope(
            deadline_s=time.monotonic() + self._timeout_s,
            ledger=self.ledger,
            train=self.training and torch.is_grad_enabled(),
        )
        return MicroBatch(scope, defer_observations=False)

    def _of_last_forward(self) -> _Forward:
        forward: _Forward | None = getattr(self._last, "forward", None)
        if forward is None:
            raise RuntimeError("loss and metrics belong to this thread's last forward, and there was none")
        return forward
