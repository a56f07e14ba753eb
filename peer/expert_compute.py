"""What the compute thread does with a call: decode, run experts, step, encode. Knows torch; knows no network.

Everything here runs on the one compute thread of the device, so nothing here is locked. Time is an argument.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from experts.bank import ExpertBank, Pass
from experts.uid import ExpertUid
from peer.applied import AppliedBackwards
from peer.errors import MalformedMessage
from peer.kept_inputs import CallKey, KeptInputs
from peer.messages import BackwardCall, ExpertOutcome, ForwardCall, GroupReply, Mode, Outcome
from peer.pair_rows import PairRows, pairs_of
from peer.tensors import Role, WireTensor, decode_finite, decode_row_index, encode
from peer.transport import CallRefused, PeerId, Refusal

REPLY_LIFETIME_S = 30.0
"""At least this long a repeated backward gets the same answer."""


@dataclass(frozen=True)
class Request:
    """One call, and who sent it."""

    caller: PeerId
    call: ForwardCall | BackwardCall

    @property
    def key(self) -> CallKey:
        return self.caller, self.call.call_id


@dataclass(frozen=True)
class Memory:
    """What may be kept between calls."""

    kept_bytes: int
    kept_lifetime_s: float
    reply_bytes: int


@dataclass(frozen=True)
class _KeptCall:
    rows: PairRows
    run: Pass
    """Outputs' versions and, while these stand, the autograd graph."""


class ExpertCompute:
    """The experts of one device and what is remembered between their calls."""

    def __init__(self, bank: ExpertBank, *, device: torch.device, max_staleness: int, memory: Memory) -> None:
        self.bank = bank
        self.rows_served: Counter[ExpertUid] = Counter()
        self.recomputed = 0
        """Backwards whose graph was gone because one of their experts had stepped since."""
        self._device = device
        self._max_staleness = max_staleness
        self._kept: KeptInputs[_KeptCall] = KeptInputs(max_bytes=memory.kept_bytes, lifetime_s=memory.kept_lifetime_s)
        self._applied: AppliedBackwards[GroupReply] = AppliedBackwards(
            max_reply_bytes=memory.reply_bytes, lifetime_s=max(REPLY_LIFETIME_S, memory.kept_lifetime_s)
        )

    def answer(self, request: Request, *, now_s: float) -> GroupReply:
        """Run one call. Raises CallRefused when its tensors are not what a correct caller sends."""
        try:
            if isinstance(request.call, ForwardCall):
                return self._forward(request.key, request.call, now_s)
            return self._backward(request.key, request.call, now_s)
        except MalformedMessage as error:
            raise CallRefused(Refusal.INVALID, str(error)) from None

    def _forward(self, key: CallKey, call: ForwardCall, now_s: float) -> GroupReply:
        outcomes = {uid: Outcome.OK if self._hosts(uid) else Outcome.UNKNOWN_EXPERT for uid in _uids(call)}
        rows = self._rows(call, call.rows, call.row_index).only({uid for uid in outcomes if self._hosts(uid)})
        if not rows.uids:
            return self._reply(call, outcomes, None)
        is_training = call.mode is Mode.TRAIN
        run = self.bank.forward(rows.x_ND, rows.uids, rows.counts, keep_graph=is_training)
        if not torch.isfinite(run.out_ND).all():
            return self._reply(call, outcomes | dict.fromkeys(rows.uids, Outcome.NON_FINITE), None)
        if is_training:
            size_bytes = rows.x_ND.nbytes + run.graph_bytes
            self._kept.keep(key, _KeptCall(rows, run), size_bytes=size_bytes, now_s=now_s)
            self.rows_served.update(dict(zip(rows.uids, rows.counts, strict=True)))
        return self._reply(call, outcomes, encode(run.out_ND, role=Role.OUTPUTS, codec=call.reply_codec))

    def _backward(self, key: CallKey, call: BackwardCall, now_s: float) -> GroupReply:
        if self._applied.was_applied(key):
            again = self._applied.reply(key, now_s=now_s)
            return again or self._reply(call, dict.fromkeys(_uids(call), Outcome.ALREADY_APPLIED), None)
        kept = self._kept.take(key, now_s=now_s)
        if kept is None and call.rows is None:
            return self._reply(call, dict.fromkeys(_uids(call), Outcome.MISSING_INPUTS), None)
        reply = self._apply(call, kept)
        size_bytes = reply.tensor.spec.size_bytes if reply.tensor is not None else 0
        self._applied.record(key, reply, size_bytes=size_bytes, now_s=now_s)
        return reply

    def _apply(self, call: BackwardCall, kept: _KeptCall | None) -> GroupReply:
        grad_ND = decode_finite(call.gradients).to(self._device)
        rows = self._rows_of_backward(call, kept)
        outcomes = {
            uid: self._admit(uid, expert.version) for uid, expert in zip(_uids(call), call.experts, strict=True)
        }
        admitted = [uid for uid, outcome in outcomes.items() if outcome is Outcome.OK]
        if not admitted:
            return self._reply(call, outcomes, None)
        if len(admitted) < len(outcomes):
            grad_ND = grad_ND[pairs_of(_uids(call), [expert.num_rows for expert in call.experts], admitted)]
        rows = rows.only(admitted)
        run = kept.run if kept is not None and kept.rows is rows else None
        if run is None or not self.bank.is_current(run):
            self.recomputed += 1
            run = self.bank.forward(rows.x_ND, rows.uids, rows.counts, keep_graph=True)
        grad_x_UD = rows.sum_by_row(self.bank.backward(run, grad_ND, loss_tokens=call.loss_tokens))
        outcomes |= dict.fromkeys(self.bank.step(admitted).non_finite, Outcome.NON_FINITE)
        return self._reply(call, outcomes, encode(grad_x_UD, role=Role.ROW_GRADIENTS, codec=call.reply_codec))

    def _rows_of_backward(self, call: BackwardCall, kept: _KeptCall | None) -> PairRows:
        if kept is None:
            assert call.rows is not None, "checked before"
            return self._rows(call, call.rows, call.row_index)
        _check_same_pairs(call, kept.rows)
        return kept.rows

    def _rows(self, call: ForwardCall | BackwardCall, sent: WireTensor, row_index: WireTensor | None) -> PairRows:
        """Decode a call's rows and spread them to its pairs. One copy where rows are shared, none otherwise."""
        x_UD = decode_finite(sent).to(self._device)
        counts = tuple(expert.num_rows for expert in call.experts)
        if row_index is None:
            return PairRows(_uids(call), counts, sent.num_rows, x_UD, None)
        row_index_N = decode_row_index(row_index, num_rows=sent.num_rows).to(self._device)
        return PairRows(_uids(call), counts, sent.num_rows, x_UD[row_index_N], row_index_N)

    def _admit(self, uid: ExpertUid, version_seen: int) -> Outcome:
        if not self._hosts(uid):
            return Outcome.UNKNOWN_EXPERT
        return Outcome.STALE if self.bank.version(uid) - version_seen > self._max_staleness else Outcome.OK

    def _hosts(self, uid: ExpertUid) -> bool:
        return uid in self.bank.uids

    def _reply(
        self, call: ForwardCall | BackwardCall, outcomes: dict[ExpertUid, Outcome], tensor: WireTensor | None
    ) -> GroupReply:
        if Outcome.OK not in outcomes.values():
            tensor = None
        versions = {uid: self.bank.version(uid) if self._hosts(uid) else 0 for uid in outcomes}
        return GroupReply(tuple(ExpertOutcome(uid.index, outcomes[uid], versions[uid]) for uid in _uids(call)), tensor)


def _uids(call: ForwardCall | BackwardCall) -> tuple[ExpertUid, ...]:
    return tuple(ExpertUid(call.layer, expert.index) for expert in call.experts)


def _check_same_pairs(call: BackwardCall, rows: PairRows) -> None:
    """A backward names experts of its forward, in its order, with as many pairs each."""
    named = [(uid, expert.num_rows) for uid, expert in zip(_uids(call), call.experts, strict=True)]
    if named != [pair for pair in zip(rows.uids, rows.counts, strict=True) if pair in named]:
        raise CallRefused(Refusal.INVALID, "the backward names experts, rows or an order that its forward did not have")
