"""Experts on other people's machines, under autograd: one differentiable call per layer that loses what it loses.

A forward sends each peer its pairs in one packed call and returns outputs with an `ok` mask. A backward sends
gradients of the answered pairs to the peers that answered them; a lost backward leaves those rows' input gradient zero.
The training thread encodes and decodes; the event loop only moves bytes.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
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
    GroupReply,
    Mode,
    Outcome,
    ReplyLimits,
)
from peer.tensors import Role, WireTensor, all_finite, decode, encode
from peer.transport import Endpoint, Method, Transport
from peer.wire_codecs import Codec
from trainer.absences import Absences
from trainer.caller import CallResult
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


@dataclass(frozen=True)
class _Answered:
    """A call that brought something back: where its backward goes."""

    group: PeerGroup[Endpoint]
    """Only the pairs that came back."""
    call: Call
    """Its rows are kept to be sent once more, should the peer have forgotten them."""
    versions: dict[int, int]


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
        self._answered: list[_Answered] | None = []
        """None once their backwards have been sent."""
        self.ok_N = torch.zeros(plan.num_pairs, dtype=torch.bool)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(N, D) outputs in the plan's order; rows that did not come back are zero and not `ok`."""
        out_ND = x_TD.new_zeros(self._plan.num_pairs, x_TD.shape[1])
        groups = group_by_destination(
            self._plan, self._experts.switchboard.assign(self._plan, self._layer, self._scope)
        )
        calls = [self._pack_forward(group, x_TD) for group in groups]
        outgoing = [
            Outgoing(group.destination, call, ReplyLimits.of(call, Method.FORWARD, num_rows=group.rows_U.numel()))
            for group, call in zip(groups, calls, strict=True)
        ]
        results = self._send(Method.FORWARD, outgoing)
        for group, call, result in zip(groups, calls, results, strict=True):
            self._unpack_forward(group, call, result, out_ND)
        if self._mode is Mode.TRAIN:
            unplaced = self._plan.num_pairs - sum(group.num_pairs for group in groups)
            self._scope.ledger.pairs_lost(unplaced, LossReason.UNREACHABLE)
            self._scope.answered(self._layer, sent=self._plan.num_pairs, answered=int(self.ok_N.sum()))
        return out_ND

    def _pack_forward(self, group: PeerGroup[Endpoint], x_TD: Tensor) -> Call:
        return Call(
            call_id=secrets.token_bytes(CALL_ID_BYTES),
            run_id=self._experts.run_id,
            mode=self._mode,
            layer=self._layer,
            experts=tuple(ExpertRows(expert.slot, expert.num_rows) for expert in group.experts),
            reply_codec=self._experts.forward_codec,
            timeout_s=self._experts.call_timeout_s,
            tensors=_rows(x_TD[group.rows_U], group, self._experts.forward_codec),
        )

    def _unpack_forward(self, group: PeerGroup[Endpoint], call: Call, result: CallResult, out_ND: Tensor) -> None:
        versions: dict[int, int] = {}
        refused: dict[int, LossReason] = {}
        for reply in result.groups:
            ok = [expert for expert in reply.experts if expert.outcome is Outcome.OK]
            if self._place(group, reply, [expert.index for expert in ok], out_ND):
                versions |= {expert.index: expert.version for expert in ok}
            else:
                refused |= {expert.index: LossReason.NON_FINITE for expert in ok}
        if refused:
            self._scope.suspect(group.destination.peer_id)
        if versions and self._mode is Mode.TRAIN:
            assert self._answered is not None
            self._answered.append(_Answered(group.only(list(versions)), call, versions))
        if self._mode is Mode.TRAIN:
            self._count_forward(group, result, versions, refused)

    def _place(self, group: PeerGroup[Endpoint], reply: GroupReply, ok: Sequence[int], out_ND: Tensor) -> bool:
        """Write a reply's rows into their pairs. False, and nothing written, when they are not finite."""
        if reply.tensor is None:
            return True
        rows_ND = decode(reply.tensor)
        if not all_finite(rows_ND):
            return False
        slices = {expert.slot: slice(expert.start, expert.stop) for expert in group.experts}
        pairs_N = torch.cat([group.pairs_N[slices[index]] for index in ok])
        out_ND[pairs_N] = rows_ND.to(out_ND.dtype)
        self.ok_N[pairs_N] = True
        return True

    def _count_forward(
        self, group: PeerGroup[Endpoint], result: CallResult, versions: dict[int, int], refused: dict[int, LossReason]
    ) -> None:
        self._scope.ledger.call(answered=bool(versions))
        for expert in group.experts:
            if expert.slot in versions:
                self._scope.ledger.pairs_answered(expert.num_rows)
            else:
                reason = refused.get(expert.slot) or result.loss_reason(expert.slot) or LossReason.MALFORMED
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
        grad_x_TD = grad_out_ND.new_zeros(self._plan.num_tokens, grad_out_ND.shape[1])
        reachable = [answered for answered in sent if not self._is_suspect(answered)]
        for _ in range(len(sent) - len(reachable)):
            self._scope.ledger.backward(BackwardOutcome.LOST)
        calls = [self._pack_backward(answered, grad_out_ND) for answered in reachable]
        results = self._send_backward(reachable, calls)
        missed = [
            i
            for i, result in enumerate(results)
            if result.is_all(Outcome.MISSING_INPUTS) and not self._is_suspect(reachable[i])
        ]
        for _ in missed:
            self._scope.ledger.retried()
        again = self._send_backward(
            [reachable[i] for i in missed], [_with_rows(reachable[i], calls[i]) for i in missed]
        )
        for i, result in zip(missed, again, strict=True):
            results[i] = result
        for answered, result in zip(reachable, results, strict=True):
            self._scope.ledger.backward(self._unpack_backward(answered, result, grad_x_TD))
        return grad_x_TD

    def _pack_backward(self, answered: _Answered, grad_out_ND: Tensor) -> Call:
        group, call_id = answered.group, answered.call.call_id
        grad_ND = grad_out_ND[group.pairs_N]
        gradients = encode(grad_ND, Role.GRADIENTS, self._experts.backward_codec, dither_seed=call_id)
        return Call(
            call_id=call_id,
            run_id=self._experts.run_id,
            mode=Mode.TRAIN,
            layer=self._layer,
            experts=tuple(ExpertRows(e.slot, e.num_rows, answered.versions[e.slot]) for e in group.experts),
            reply_codec=self._experts.backward_codec,
            timeout_s=self._experts.call_timeout_s,
            loss_tokens=self._loss_tokens,
            tensors={Role.GRADIENTS: gradients},
        )

    def _send_backward(self, answered: Sequence[_Answered], calls: Sequence[Call]) -> list[CallResult]:
        outgoing = [
            Outgoing(a.group.destination, call, ReplyLimits.of(call, Method.BACKWARD, num_rows=a.group.rows_U.numel()))
            for a, call in zip(answered, calls, strict=True)
        ]
        return self._send(Method.BACKWARD, outgoing)

    def _send(self, method: Method, calls: Sequence[Outgoing]) -> list[CallResult]:
        results = self._experts.switchboard.send(method, calls, self._scope)
        if self._mode is Mode.TRAIN:
            for result in results:
                self._scope.ledger.moved(bytes_up=result.bytes_up, bytes_down=result.bytes_down)
        return results

    def _is_suspect(self, answered: _Answered) -> bool:
        return self._scope.is_suspect(answered.group.destination.peer_id)

    def _unpack_backward(self, answered: _Answered, result: CallResult, grad_x_TD: Tensor) -> BackwardOutcome:
        """Add a backward's input gradients. They are lost when the peer failed or sent something not finite."""
        if result.is_all(Outcome.STALE):
            return BackwardOutcome.STALE
        if result.is_all(Outcome.ALREADY_APPLIED):
            self._scope.ledger.backward_repeated()
            return BackwardOutcome.LOST
        tensors = [group.tensor for group in result.groups if group.tensor is not None]
        if result.failure is not None or not tensors:
            return BackwardOutcome.LOST
        rows_UD = reduce(torch.add, map(decode, tensors))
        if not all_finite(rows_UD):
            self._scope.suspect(answered.group.destination.peer_id)
            return BackwardOutcome.LOST
        grad_x_TD.index_add_(0, answered.group.rows_U, rows_UD.to(grad_x_TD.dtype))
        return BackwardOutcome.APPLIED


class _RemoteCall(torch.autograd.Function):
    """Autograd's view of an exchange: a function of x alone. What travels is float32 on the CPU, whatever x is."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.forward(x_TD.detach().to("cpu", torch.float32)).to(x_TD)

    @staticmethod
    @once_differentiable  # which types ctx as position-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (grad_out_ND,) = grad_outputs
        return ctx.exchange.backward(grad_out_ND.to("cpu", torch.float32)).to(grad_out_ND), None


def _with_rows(answered: _Answered, call: Call) -> Call:
    """The same backward with its inputs: what a peer that has forgotten them needs."""
    rows: dict[Role, WireTensor] = {Role.ROWS: answered.call.tensors[Role.ROWS], **_row_index(answered.group)}
    return replace(call, tensors=rows | dict(call.tensors))


def _rows(x_UD: Tensor, group: PeerGroup[Endpoint], codec: Codec) -> dict[Role, WireTensor]:
    return {Role.ROWS: encode(x_UD, Role.ROWS, codec), **_row_index(group)}


def _row_index(group: PeerGroup[Endpoint]) -> dict[Role, WireTensor]:
    if group.row_index_N is None:
        return {}
    return {Role.ROW_INDEX: encode(group.row_index_N, Role.ROW_INDEX, Codec.RAW)}
