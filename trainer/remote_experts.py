"""Experts on other people's machines, under autograd: one differentiable call per layer that loses what it loses.

A forward sends each peer its pairs in one packed call and returns outputs with an `ok` mask. A backward sends
gradients of the answered pairs to the peers that answered them; a lost backward leaves those rows' input gradient zero.
The training thread encodes and decodes, each call and each group of an answer while the others travel; the event loop
only moves bytes.
"""

import math
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from experts.uid import RunId
from peer.directory import Directory
from peer.event_loop import EventLoopThread
from peer.manifest import WireSettings
from peer.messages import (
    CALL_ID_BYTES,
    Call,
    ExpertRows,
    Mode,
    Outcome,
    ReplyLimits,
)
from peer.tensors import Role, WireTensor, all_finite, encode
from peer.transport import Endpoint, Method, Transport
from peer.wire_codecs import Codec
from trainer.absences import Absences
from trainer.asked import Answered, AskedBackward, AskedForward
from trainer.caller import Ending, Said
from trainer.ledger import BackwardOutcome, LossReason
from trainer.packing import PeerGroup, group_by_destination
from trainer.routing.plan import Plan
from trainer.scope import MicroBatch
from trainer.switchboard import Outgoing, Switchboard


class Experts(Protocol):
    """Whatever runs a layer's pairs: other people's machines, or this process (`local_experts`)."""

    def run(self, x_TD: Tensor, plan: Plan, layer: int, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Outputs (N, D), zero where lost, differentiable in x; and which pairs came back, (N,) bool."""
        ...


class RemoteExperts:
    """A run's experts as one swarm. Called from training threads; blocks until each call's deadline at most."""

    def __init__(
        self, *, run_id: RunId, wire: WireSettings, transport: Transport, directory: Directory, loop: EventLoopThread
    ) -> None:
        self.run_id = run_id
        self.forward_codec = Codec.named(wire.forward_codec)
        self.backward_codec = Codec.named(wire.backward_codec)
        self.call_timeout_s = wire.call_timeout_s
        self.switchboard = Switchboard(transport, directory, loop, call_timeout_s=wire.call_timeout_s)

    @property
    def absences(self) -> Absences:
        """Peers that failed us and have not been heard of since."""
        return self.switchboard.absences

    def run(self, x_TD: Tensor, plan: Plan, layer: int, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `Experts.run`."""
        trains = micro_batch.scope.train and torch.is_grad_enabled()
        if trains and not x_TD.requires_grad:
            x_TD = x_TD.detach().requires_grad_()  # else autograd would never ask for the experts' backward
        exchange = _Exchange(self, plan, layer, micro_batch, mode=Mode.TRAIN if trains else Mode.EVAL)
        out_ND = _RemoteCall.apply(x_TD, exchange)
        assert isinstance(out_ND, Tensor)
        return out_ND, exchange.ok_N.to(x_TD.device)


class _Exchange:
    """One layer's trip there and back: lives from forward to backward of one micro-batch, on one thread at a time."""

    def __init__(self, experts: RemoteExperts, plan: Plan, layer: int, micro_batch: MicroBatch, *, mode: Mode) -> None:
        self._experts = experts
        self._plan = plan
        self._layer = layer
        self._scope = micro_batch.scope
        self._loss_tokens = micro_batch.loss_tokens
        self._mode = mode
        self._answered: list[Answered] | None = []
        """None once their backwards have been sent."""
        self.ok_N = torch.zeros(plan.num_pairs, dtype=torch.bool)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(N, D) outputs in the plan's order; rows that did not come back are zero and not `ok`."""
        out_ND = x_TD.new_empty(self._plan.num_pairs, x_TD.shape[1])
        groups = group_by_destination(
            self._plan, self._experts.switchboard.assign(self._plan, self._layer, self._scope)
        )
        asked = [AskedForward(group) for group in groups]
        for number, said in self._ask(Method.FORWARD, (self._outgoing_forward(forward, x_TD) for forward in asked)):
            asked[number].hear(said, out_ND, self.ok_N)
        if not self.ok_N.all():
            out_ND[~self.ok_N] = 0.0
        for forward in asked:
            self._conclude(forward)
        if self._mode is Mode.TRAIN:
            unplaced = self._plan.num_pairs - sum(group.num_pairs for group in groups)
            self._scope.ledger.pairs_lost(unplaced, LossReason.UNREACHABLE)
            self._scope.answered(self._layer, sent=self._plan.num_pairs, answered=int(self.ok_N.sum()))
        return out_ND

    def _outgoing_forward(self, forward: AskedForward, x_TD: Tensor) -> Outgoing:
        group = forward.group
        forward.call = Call(
            call_id=secrets.token_bytes(CALL_ID_BYTES),
            run_id=self._experts.run_id,
            mode=self._mode,
            layer=self._layer,
            experts=tuple(ExpertRows(expert.slot, expert.num_rows) for expert in group.experts),
            reply_codec=self._experts.forward_codec,
            timeout_s=self._experts.call_timeout_s,
            tensors={
                Role.ROWS: encode(group.take_rows(x_TD), Role.ROWS, self._experts.forward_codec),
                **_layout(group, self._plan),
            },
            score=_score(group, self._plan),
        )
        limits = ReplyLimits.of(forward.call, Method.FORWARD, num_rows=group.num_rows)
        return Outgoing(group.destination, forward.call, limits)

    def _conclude(self, forward: AskedForward) -> None:
        """Blame, keep and count, once nothing more will be heard."""
        if forward.non_finite:
            self._scope.suspect(forward.group.destination.peer_id)
        if self._mode is Mode.EVAL:
            return
        if forward.versions:
            assert self._answered is not None
            assert forward.call is not None
            group = forward.group.only(list(forward.versions))
            self._answered.append(Answered(group, forward.call, forward.versions))
        self._scope.ledger.call(answered=bool(forward.versions))
        for expert in forward.group.experts:
            if (reason := forward.loss_reason(expert.slot)) is None:
                self._scope.ledger.pairs_answered(expert.num_rows)
            else:
                self._scope.ledger.pairs_lost(expert.num_rows, reason)

    def backward(self, grad_out_ND: Tensor) -> Tensor:
        """(T, D) gradient with respect to x; zero for the rows of a lost backward.

        RuntimeError after an evaluation, and the second time: it would be zero where autograd expects a gradient.
        """
        if self._mode is Mode.EVAL:
            raise RuntimeError("there is no way back through an evaluation: experts learn in training mode only")
        if self._answered is None:
            raise RuntimeError("backward through remote experts works once per forward: they have learnt from it")
        sent, self._answered = self._answered, None
        reachable = [answered for answered in sent if not self._is_suspect(answered)]
        for _ in range(len(sent) - len(reachable)):
            self._scope.ledger.backward(BackwardOutcome.LOST)
        asked = self._ask_backward([AskedBackward(answered) for answered in reachable], grad_out_ND, with_rows=False)
        missed = [backward for backward in asked if backward.is_missed and not self._is_suspect(backward.answered)]
        for _ in missed:
            self._scope.ledger.retried()
        again = [AskedBackward(backward.answered) for backward in missed]
        if again:
            self._ask_backward(again, grad_out_ND, with_rows=True)
        grad_x_TD: Tensor | None = None
        for backward in [*(backward for backward in asked if backward not in missed), *again]:
            outcome = self._outcome(backward)
            self._scope.ledger.backward(outcome)
            if outcome is BackwardOutcome.APPLIED:
                group, grad_UD = backward.answered.group, backward.grad_UD
                assert grad_UD is not None
                grad_x_TD = group.add_rows(grad_UD, grad_x_TD, num_tokens=self._plan.num_tokens)
        if grad_x_TD is None:
            return grad_out_ND.new_zeros(self._plan.num_tokens, grad_out_ND.shape[1])
        return grad_x_TD

    def _ask_backward(self, asked: list[AskedBackward], grad_out_ND: Tensor, *, with_rows: bool) -> list[AskedBackward]:
        outgoing = (self._outgoing_backward(backward.answered, grad_out_ND, with_rows=with_rows) for backward in asked)
        for number, said in self._ask(Method.BACKWARD, outgoing):
            asked[number].hear(said)
        return asked

    def _outgoing_backward(self, answered: Answered, grad_out_ND: Tensor, *, with_rows: bool) -> Outgoing:
        """With its rows it is what a peer needs that has forgotten them."""
        group, codec, call_id = answered.group, self._experts.backward_codec, answered.call.call_id
        grad_ND = group.take_pairs(grad_out_ND)
        gradients = {Role.GRADIENTS: encode(grad_ND, Role.GRADIENTS, codec, dither_seed=call_id)}
        rows = {Role.ROWS: answered.call.tensors[Role.ROWS], **_layout(group, self._plan)} if with_rows else {}
        call = Call(
            call_id=call_id,
            run_id=self._experts.run_id,
            mode=Mode.TRAIN,
            layer=self._layer,
            experts=tuple(ExpertRows(e.slot, e.num_rows, answered.versions[e.slot]) for e in group.experts),
            reply_codec=codec,
            timeout_s=self._experts.call_timeout_s,
            loss_tokens=self._loss_tokens,
            tensors=rows | gradients,
        )
        return Outgoing(group.destination, call, ReplyLimits.of(call, Method.BACKWARD, num_rows=group.num_rows))

    def _ask(self, method: Method, calls: Iterable[Outgoing]) -> Iterator[tuple[int, Said]]:
        for number, said in self._experts.switchboard.ask(method, calls, self._scope):
            if isinstance(said, Ending) and self._mode is Mode.TRAIN:
                self._scope.ledger.moved(bytes_up=said.bytes_up, bytes_down=said.bytes_down)
            yield number, said

    def _is_suspect(self, answered: Answered) -> bool:
        return self._scope.is_suspect(answered.group.destination.peer_id)

    def _outcome(self, backward: AskedBackward) -> BackwardOutcome:
        """Its gradients are lost when the peer failed or sent something not finite."""
        heard, group = backward.heard, backward.answered.group
        if heard.is_all(Outcome.STALE):
            return BackwardOutcome.STALE
        if heard.is_all(Outcome.ALREADY_APPLIED):
            self._scope.ledger.backward_repeated()
            return BackwardOutcome.LOST
        if heard.ending.failure is not None or backward.grad_UD is None:
            return BackwardOutcome.LOST
        if not all_finite(backward.grad_UD):
            self._scope.suspect(group.destination.peer_id)
            return BackwardOutcome.LOST
        return BackwardOutcome.APPLIED


class _RemoteCall(torch.autograd.Function):
    """Autograd's view of an exchange: a function of x alone. What travels is float32 on the CPU, whatever x is."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        sent_TD = x_TD.detach().to("cpu", torch.float32)
        if sent_TD.data_ptr() == x_TD.data_ptr():  # not a copy, and to be sent again to a peer that forgets it
            ctx.save_for_backward(x_TD)
        return exchange.forward(sent_TD).to(x_TD)

    @staticmethod
    @once_differentiable  # which types ctx as position-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (grad_out_ND,) = grad_outputs
        _ = ctx.saved_tensors  # raises when somebody has written to it meanwhile
        return ctx.exchange.backward(grad_out_ND.to("cpu", torch.float32)).to(grad_out_ND), None


def _layout(group: PeerGroup[Endpoint], plan: Plan) -> dict[Role, WireTensor]:
    """Which row each pair reads, and how the pairs fall into sequences, where that needs saying."""
    layout: dict[Role, WireTensor] = {}
    if group.row_index_N is not None:
        layout[Role.ROW_INDEX] = encode(group.row_index_N, Role.ROW_INDEX, Codec.RAW)
    lengths = plan.lengths(group.num_pairs)
    if lengths is not None:
        layout[Role.LENGTHS] = encode(torch.tensor(lengths, dtype=torch.int32), Role.LENGTHS, Codec.RAW)
    return layout


def _score(group: PeerGroup[Endpoint], plan: Plan) -> float:
    """Mean router weight of its pairs: a peer with too much to do declines the calls that matter least."""
    mean = float(group.take_pairs(plan.weights_N.detach()).mean())
    return mean if 0.0 <= mean < math.inf else 0.0
