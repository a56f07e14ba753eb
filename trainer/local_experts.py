"""The same experts, by the same rules, in this process: what remote ones are compared with. Knows no network."""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from experts.bank import ExpertBank, Pass
from experts.uid import ExpertUid
from trainer.routing.plan import Plan
from trainer.scope import MicroBatch


class LocalExperts:
    """Runs a layer's pairs on a bank of this process; each backward steps the experts it touched, as a peer does."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self._one_at_a_time = threading.Lock()

    def run(self, x_TD: Tensor, plan: Plan, layer: int, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `remote_experts.Experts.run`; every pair comes back."""
        trains = micro_batch.scope.train and torch.is_grad_enabled()
        if trains and not x_TD.requires_grad:
            x_TD = x_TD.detach().requires_grad_()  # else autograd would never ask for the experts' backward
        out_ND = _LocalCall.apply(plan.dispatch(x_TD), self, plan, layer, micro_batch, trains)
        assert isinstance(out_ND, Tensor)
        if trains:
            micro_batch.scope.answered(layer, sent=plan.num_pairs, answered=plan.num_pairs)
        return out_ND, torch.ones(plan.num_pairs, dtype=torch.bool)

    def forward(self, x_ND: Tensor, plan: Plan, layer: int, *, trains: bool) -> Pass:
        groups = plan.groups()
        uids = [ExpertUid(layer, slot) for slot, _ in groups]
        counts = [pairs.stop - pairs.start for _, pairs in groups]
        with self._one_at_a_time:
            return self._bank.forward(x_ND, uids, counts, keep_graph=trains, lengths=plan.lengths(plan.num_pairs))

    def backward(self, run: Pass, grad_ND: Tensor, micro_batch: MicroBatch) -> Tensor:
        with self._one_at_a_time:
            grad_x_ND = self._bank.backward(run, grad_ND, loss_tokens=micro_batch.loss_tokens)
            self._bank.step(run.uids)
        return grad_x_ND


class _LocalCall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, experts: LocalExperts, plan: Plan, layer: int, micro_batch: MicroBatch, trains: bool
    ) -> Tensor:
        run = experts.forward(x_ND.detach(), plan, layer, trains=trains)
        ctx.experts, ctx.micro_batch, ctx.trains, ctx.run = experts, micro_batch, trains, run
        return run.out_ND.clone()

    @staticmethod
    @once_differentiable  # which types ctx as position-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not ctx.trains:
            raise RuntimeError("there is no way back through an evaluation: experts learn in training mode only")
        if ctx.run is None:
            raise RuntimeError("backward through experts works once per forward: they have learnt from it")
        run, ctx.run = ctx.run, None
        grad_x_ND = ctx.experts.backward(run, grad_outputs[0].contiguous(), ctx.micro_batch)
        return grad_x_ND, None, None, None, None, None
