"""What the compute thread does with a call: decode, run experts, step, encode. Knows torch; knows no network.

Everything here runs on the one compute thread of the device, so nothing here is locked. Time is an argument.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.bank import ExpertBank, Pass
from experts.uid import ExpertUid
from peer.applied import AppliedBackwards
from peer.errors import MalformedMessage
from peer.kept_inputs import CallKey, KeptInputs
from peer.messages import Call, ExpertOutcome, GroupReply, Outcome
from peer.pair_rows import PairRows, pairs_of
from peer.tensors import Role, WireTensor, all_finite, decode, decode_row_index, encode
from peer.transport import CallRefused, Method, PeerId, Refusal

REPLY_LIFETIME_S = 30.0
"""At least this long a repeated backward gets the same answer."""


@dataclass(frozen=True)
class Request:
    """One call, and who sent it."""

    method: Method
    caller: PeerId
    call: Call

    @property
    def key(self) -> CallKey:
        return self.caller, self.call.call_id

    @property
    def uids(self) -> tuple[ExpertUid, ...]:
        """The experts it names, hosted or not."""
        return _uids(self.call)


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

    @property
    def kept_bytes(self) -> int:
        """Memory that waits for backwards."""
        return self._kept.size_bytes

    def forget_expired(self, *, now_s: float) -> None:
        """Let go of inputs whose backward will not come. Training calls do so too."""
        self._kept.expire(now_s=now_s)

    def answer(self, request: Request, *, now_s: float) -> GroupReply:
        """Run one call. Raises CallRefused when its tensors are not what a correct caller sends."""
        try:
            if request.method is Method.FORWARD:
                return self._forward(request.key, request.call, now_s)
            return self._backward(request.key, request.call, now_s)
        except MalformedMessage as error:
            raise CallRefused(Refusal.INVALID, str(error)) from None

    def _forward(self, key: CallKey, call: Call, now_s: float) -> GroupReply:
        hosted = self._rows(call).only({uid for uid in _uids(call) if uid in self.bank})
        rows, run = self._run_finite(hosted, keep_graph=call.is_training)
        outcomes = (
            dict.fromkeys(_uids(call), Outcome.UNKNOWN_EXPERT)
            | dict.fromkeys(hosted.uids, Outcome.NON_FINITE)
            | dict.fromkeys(rows.uids, Outcome.OK)
        )
        if run is None:
            return self._reply(call, outcomes, None)
        if call.is_training:
            size_bytes = rows.x_ND.nbytes + run.out_ND.nbytes + run.graph_bytes
            self._kept.keep(key, _KeptCall(rows, run), size_bytes=size_bytes, now_s=now_s)
            self.rows_served.update(dict(zip(rows.uids, rows.counts, strict=True)))
        return self._reply(call, outcomes, encode(run.out_ND, Role.OUTPUTS, call.reply_codec))

    def _run_finite(self, rows: PairRows, *, keep_graph: bool) -> tuple[PairRows, Pass | None]:
        """Outputs of the experts whose outputs are finite; one that is not takes no other with it."""
        while rows.uids:
            run = self.bank.forward(rows.x_ND, rows.uids, rows.counts, keep_graph=keep_graph)
            finite = _finite_experts(run)
            if len(finite) == len(rows.uids):
                return rows, run
            rows = rows.only(finite)
        return rows, None

    def _backward(self, key: CallKey, call: Call, now_s: float) -> GroupReply:
        if self._applied.was_applied(key):
            again = self._applied.reply(key, now_s=now_s)
            return again or self._reply(call, dict.fromkeys(_uids(call), Outcome.ALREADY_APPLIED), None)
        kept = self._kept.take(key, now_s=now_s)
        if kept is None and Role.ROWS not in call.tensors:
            return self._reply(call, dict.fromkeys(_uids(call), Outcome.MISSING_INPUTS), None)
        reply = self._apply(call, kept)
        size_bytes = reply.tensor.size_bytes if reply.tensor is not None else 0
        self._applied.record(key, reply, size_bytes=size_bytes, now_s=now_s)
        return reply

    def _apply(self, call: Call, kept: _KeptCall | None) -> GroupReply:
        grad_ND = self._decode_finite(call.tensors[Role.GRADIENTS])
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
        if kept is not None and kept.rows is rows:
            run = kept.run
            self.recomputed += not self.bank.is_current(run)
        else:
            run = self.bank.forward(rows.x_ND, rows.uids, rows.counts, keep_graph=True)
            self.recomputed += 1
        grad_x_UD = rows.sum_by_row(self.bank.backward(run, grad_ND, loss_tokens=call.loss_tokens))
        outcomes |= dict.fromkeys(self.bank.step(admitted).non_finite, Outcome.NON_FINITE)
        reply = encode(grad_x_UD, Role.ROW_GRADIENTS, call.reply_codec, dither_seed=call.call_id)
        return self._reply(call, outcomes, reply)

    def _rows_of_backward(self, call: Call, kept: _KeptCall | None) -> PairRows:
        if kept is None:
            return self._rows(call)
        _check_same_pairs(call, kept.rows)
        return kept.rows

    def _rows(self, call: Call) -> PairRows:
        """Decode a call's rows and spread them to its pairs. One copy where rows are shared, none otherwise."""
        x_UD = self._decode_finite(call.tensors[Role.ROWS])
        counts = tuple(expert.num_rows for expert in call.experts)
        if Role.ROW_INDEX not in call.tensors:
            return PairRows(_uids(call), counts, x_UD.shape[0], x_UD, None)
        row_index_N = decode_row_index(call.tensors[Role.ROW_INDEX], num_rows=x_UD.shape[0]).to(self._device)
        return PairRows(_uids(call), counts, x_UD.shape[0], x_UD[row_index_N], row_index_N)

    def _decode_finite(self, sent: WireTensor) -> Tensor:
        tensor = decode(sent)
        if not all_finite(tensor):
            raise MalformedMessage(f"{sent.spec.role.name} holds NaN or infinity")
        return tensor.to(self._device)

    def _admit(self, uid: ExpertUid, version_seen: int) -> Outcome:
        if uid not in self.bank:
            return Outcome.UNKNOWN_EXPERT
        return Outcome.STALE if self.bank.version(uid) - version_seen > self._max_staleness else Outcome.OK

    def _reply(self, call: Call, outcomes: dict[ExpertUid, Outcome], tensor: WireTensor | None) -> GroupReply:
        if Outcome.OK not in outcomes.values():
            tensor = None  # every expert of the call threw its gradient away
        versions = {uid: self.bank.version(uid) if uid in self.bank else 0 for uid in outcomes}
        return GroupReply(tuple(ExpertOutcome(uid.index, outcomes[uid], versions[uid]) for uid in _uids(call)), tensor)


def _uids(call: Call) -> tuple[ExpertUid, ...]:
    return tuple(ExpertUid(call.layer, expert.index) for expert in call.experts)


def _finite_experts(run: Pass) -> list[ExpertUid]:
    if all_finite(run.out_ND):
        return list(run.uids)
    outputs = run.out_ND.split(list(run.counts))
    return [uid for uid, out_ND in zip(run.uids, outputs, strict=True) if all_finite(out_ND)]


def _check_same_pairs(call: Call, rows: PairRows) -> None:
    """A backward names experts of its forward, in its order, with as many pairs each."""
    named = [(uid, expert.num_rows) for uid, expert in zip(_uids(call), call.experts, strict=True)]
    if named != [pair for pair in zip(rows.uids, rows.counts, strict=True) if pair in named]:
        raise CallRefused(Refusal.INVALID, "the backward names experts, rows or an order that its forward did not have")
