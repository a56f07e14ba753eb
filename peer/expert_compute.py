"""What the compute thread does with calls: decode, run experts, step, encode. Knows torch; knows no network.

Calls that came together run as one pass, without a graph: their backwards compute the outputs again. A call that runs
alone keeps its graph for as long as its experts do not change. Experts step when no further backward follows at once.

Everything here runs on the one compute thread of the device, so nothing here is locked. Time is an argument.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.bank import ExpertBank, Pass
from experts.uid import ExpertUid
from peer.answer_groups import AnswerGroups
from peer.applied import AppliedBackwards
from peer.call_tensors import CallTensors
from peer.compute_thread import Part
from peer.errors import MalformedMessage
from peer.fitting_passes import DoesNotFit, FittingPasses
from peer.kept_inputs import CallKey, KeptInputs, KeptInputsCounts
from peer.messages import ExpertOutcome, GroupReply, Outcome
from peer.opened_calls import KeptCall, OpenedBackward, OpenedForward, Turn
from peer.pair_rows import Merged, PairRows, pairs_of
from peer.requests import Request
from peer.tensors import Role, WireTensor, all_finite, encode
from peer.transport import CallRefused, Method, Refusal

REPLY_LIFETIME_S = 30.0
"""At least this long a repeated backward gets the same answer."""

Numbered = Sequence[tuple[int, Request]]
"""Requests and their positions in the batch."""
Parts = Iterator[Part[GroupReply]]


@dataclass(frozen=True)
class Memory:
    """What may be kept between calls."""

    kept_bytes: int
    kept_lifetime_s: float
    reply_bytes: int


class ExpertCompute:
    """The experts of one device and what is remembered between their calls."""

    def __init__(
        self, bank: ExpertBank, *, device: torch.device, max_staleness: int, longest_sequence: int, memory: Memory
    ) -> None:
        self.bank = bank
        self.rows_served: Counter[ExpertUid] = Counter()
        self.kept_counts = KeptInputsCounts()
        self._max_staleness = max_staleness
        self._tensors = CallTensors(device=device, longest_sequence=longest_sequence)
        self._passes = FittingPasses(bank, device=device)
        self._kept: KeptInputs[KeptCall] = KeptInputs(max_bytes=memory.kept_bytes, lifetime_s=memory.kept_lifetime_s)
        self._applied: AppliedBackwards[GroupReply] = AppliedBackwards(
            max_reply_bytes=memory.reply_bytes, lifetime_s=max(REPLY_LIFETIME_S, memory.kept_lifetime_s)
        )
        self._turn = Turn()

    @property
    def kept_bytes(self) -> int:
        """Memory that waits for backwards."""
        return self._kept.size_bytes

    def forget(self, key: CallKey) -> None:
        """Let go of the inputs of a call that was declined."""
        self._kept.discard(key)

    def forget_expired(self, *, now_s: float) -> None:
        """Let go of inputs whose backward will not come. Training calls do so too."""
        self._kept.expire(now_s=now_s)

    def answer(
        self, requests: Sequence[Request], *, now_s: float, more_backwards: Callable[[], bool] = lambda: False
    ) -> Parts:
        """Run calls of one method together; the parts of their answers come as they are computed.

        A call whose tensors are not what a correct caller sends is refused, and takes no other with it. While
        `more_backwards` says that others follow, backwards are answered before their experts have stepped.
        """
        numbered = list(enumerate(requests))
        if requests[0].method is Method.FORWARD:
            self.step()
            yield from self._forwards(numbered, now_s)
        else:
            yield from self._backwards(numbered, now_s, more_backwards)

    def step(self) -> frozenset[ExpertUid]:
        """Have the experts step that have gathered enough; gives those that could not use what they had gathered."""
        turn, self._turn = self._turn, Turn()
        steps = self.bank.step([uid for uid in turn.gathered if uid in self.bank])
        return steps.non_finite - turn.non_finite

    # ---- forward

    def _forwards(self, numbered: Numbered, now_s: float) -> Parts:
        forwards: list[OpenedForward] = []
        for position, request in numbered:
            try:
                rows = self._tensors.rows(request).only({uid for uid in request.uids if uid in self.bank})
            except MalformedMessage as error:
                yield Part(position, _invalid(error))
            else:
                forwards.append(OpenedForward(position, request, rows))
        together = [forward for forward in forwards if forward.rows.uids]
        alone = [forward for forward in forwards if not forward.rows.uids]
        outs = self._outputs_together([forward.rows for forward in together], now_s) if len(together) > 1 else None
        if outs is None:
            together, alone, outs = [], forwards, []
        for forward in alone:
            yield from self._forward_alone(forward, now_s)
        for forward, out_ND in zip(together, outs, strict=True):
            groups = self._groups(forward)
            groups.add(forward.rows.uids, forward.rows.counts, out_ND)
            self._keep(forward, forward.rows, None, now_s)
            yield Part(forward.position, groups.take())

    def _outputs_together(self, calls: Sequence[PairRows], now_s: float) -> list[Tensor] | None:
        """Each call's outputs; None when they must be computed call by call, so that none spoils another's."""
        merged = Merged.of(calls)
        try:
            out_ND = self._passes.outputs(merged.rows, now_s=now_s)
        except DoesNotFit:
            return None
        return list(merged.split(out_ND)) if all_finite(out_ND) else None

    def _forward_alone(self, forward: OpenedForward, now_s: float) -> Parts:
        rows, groups = forward.rows, self._groups(forward)
        run: Pass | None = None
        counts = dict(zip(rows.uids, rows.counts, strict=True))
        try:
            for computed in self._passes.forward(rows, keep_graph=forward.request.call.is_training, now_s=now_s):
                run = computed.run
                groups.add(computed.uids, [counts[uid] for uid in computed.uids], computed.out_ND)
                if groups.is_worthwhile():
                    yield Part(forward.position, groups.take(), is_last=False)
        except DoesNotFit as error:
            if not groups.finite:
                yield Part(forward.position, CallRefused(Refusal.OVERLOADED, str(error)))
                return
            groups.give_up()
        finite = rows.only(groups.finite)
        self._keep(forward, finite, run if finite is rows else None, now_s)
        yield Part(forward.position, groups.take())

    def _groups(self, forward: OpenedForward) -> AnswerGroups:
        versions = {uid: self.bank.version(uid) for uid in forward.rows.uids}
        return AnswerGroups(forward.request.call, versions, forward.rows.uids)

    def _keep(self, forward: OpenedForward, rows: PairRows, run: Pass | None, now_s: float) -> None:
        call = forward.request.call
        if not call.is_training or not rows.uids:
            return
        graph_bytes = run.out_ND.nbytes + run.graph_bytes if run is not None else 0
        kept = KeptCall(rows, run, call.size_bytes)
        self._kept.keep(forward.request.key, kept, size_bytes=rows.x_ND.nbytes + graph_bytes, now_s=now_s)
        self.rows_served.update(dict(zip(rows.uids, rows.counts, strict=True)))

    # ---- backward

    def _backwards(self, numbered: Numbered, now_s: float, more_backwards: Callable[[], bool]) -> Parts:
        backwards: list[OpenedBackward] = []
        repeats: list[tuple[int, Request]] = []
        firsts: set[CallKey] = set()
        answers: dict[CallKey, GroupReply | CallRefused] = {}
        for position, request in numbered:
            if request.key in firsts:
                repeats.append((position, request))
                continue
            firsts.add(request.key)
            try:
                opened = self._open(position, request, now_s)
            except MalformedMessage as error:
                opened = _invalid(error)
            except CallRefused as refusal:
                opened = refusal
            if isinstance(opened, OpenedBackward):
                backwards.append(opened)
            else:
                answers[request.key] = opened
                yield Part(position, opened)
        self._learn([backward for backward in backwards if backward.rows.uids], now_s)
        if not more_backwards():
            failed = set(self.step())
            for backward in backwards:
                backward.failed(failed)
        for backward in backwards:
            answers[backward.request.key] = answer = self._backward_answer(backward, now_s)
            yield Part(backward.position, answer)
        for position, request in repeats:
            yield Part(position, answers[request.key])

    def _open(self, position: int, request: Request, now_s: float) -> OpenedBackward | GroupReply:
        """A backward that is to be applied, or the answer to one that is not."""
        call = request.call
        if self._applied.was_applied(request.key):
            again = self._applied.reply(request.key, now_s=now_s)
            return again or self._all(request, Outcome.ALREADY_APPLIED)
        kept = self._kept.take(request.key, now_s=now_s)
        if kept is None and Role.ROWS not in call.tensors:
            self.kept_counts.missed += 1
            return self._all(request, Outcome.MISSING_INPUTS)
        grad_ND = self._tensors.gradients(call)
        if kept is None:
            rows = self._tensors.rows(request)
        else:
            rows = kept.rows
            _check_same_pairs(request, rows)
            if Role.ROWS not in call.tensors:
                self.kept_counts.used += 1
                self.kept_counts.uplink_bytes_saved += kept.sent_bytes
        outcomes = {
            uid: self._admit(uid, expert.version) for uid, expert in zip(request.uids, call.experts, strict=True)
        }
        admitted = {uid for uid, outcome in outcomes.items() if outcome is Outcome.OK}
        if len(admitted) < len(outcomes):
            grad_ND = grad_ND[pairs_of(request.uids, request.counts, admitted).to(grad_ND.device)]
        taken = rows.only(admitted)
        run = kept.run if kept is not None and taken is kept.rows else None
        return OpenedBackward(position, request, outcomes, taken, grad_ND, run)

    def _learn(self, backwards: Sequence[OpenedBackward], now_s: float) -> None:
        """Have the experts gather the gradients of these calls, and write down what came of it."""
        if not backwards:
            return
        merged = Merged.of([backward.rows for backward in backwards])
        loss_tokens: Counter[ExpertUid] = Counter()
        for backward in backwards:
            loss_tokens.update(dict.fromkeys(backward.rows.uids, backward.request.call.loss_tokens))
        grad_ND = merged.merge([backward.grad_ND for backward in backwards])
        run = backwards[0].run if len(backwards) == 1 else None
        try:
            grad_x_ND, non_finite = self._gather(merged.rows, grad_ND, loss_tokens, run, now_s)
        except DoesNotFit as error:
            self._does_not_fit(backwards, error)
            return
        for backward, part_ND in zip(backwards, merged.split(grad_x_ND), strict=True):
            backward.grad_x_ND = part_ND
            if len(backwards) == 1:
                backward.failed(non_finite)
            elif spoilt := non_finite & set(backward.rows.uids):
                self._learn_alone(backward, spoilt, part_ND, now_s)

    def _learn_alone(self, backward: OpenedBackward, spoilt: set[ExpertUid], grad_x_ND: Tensor, now_s: float) -> None:
        """Once more for experts that threw away what several calls taught them: one's fault is not the others'."""
        spans = backward.rows.spans()
        for uid in spoilt:
            loss_tokens = {uid: backward.request.call.loss_tokens}
            try:
                grad_x_ND[spans[uid]], non_finite = self._gather(
                    backward.rows.only({uid}), backward.grad_ND[spans[uid]], loss_tokens, None, now_s
                )
            except DoesNotFit:
                non_finite = {uid}
            backward.failed(non_finite)

    def _gather(
        self, rows: PairRows, grad_ND: Tensor, loss_tokens: Mapping[ExpertUid, float], run: Pass | None, now_s: float
    ) -> tuple[Tensor, set[ExpertUid]]:
        gathered = self._passes.backward(rows, grad_ND, loss_tokens, run, now_s=now_s)
        self._turn.gathered.update(rows.uids)
        self._turn.non_finite |= gathered.non_finite
        self.kept_counts.went_back(rows.num_pairs, used_graph=gathered.used_graph)
        return gathered.grad_x_ND, gathered.non_finite

    def _does_not_fit(self, backwards: Sequence[OpenedBackward], error: DoesNotFit) -> None:
        for backward in backwards:
            if error.has_begun:  # some of it has been learnt, and must not be learnt again
                self._turn.gathered.update(backward.rows.uids)
                backward.outcomes |= dict.fromkeys(backward.rows.uids, Outcome.ALREADY_APPLIED)
            else:
                backward.refused = CallRefused(Refusal.OVERLOADED, str(error))

    def _backward_answer(self, backward: OpenedBackward, now_s: float) -> GroupReply | CallRefused:
        if backward.refused is not None:
            return backward.refused
        call = backward.request.call
        tensor: WireTensor | None = None
        if backward.grad_x_ND is not None and Outcome.OK in backward.outcomes.values():
            grad_x_UD = backward.rows.sum_by_row(backward.grad_x_ND)
            tensor = encode(grad_x_UD, Role.ROW_GRADIENTS, call.reply_codec, dither_seed=call.call_id)
        reply = self._reply(backward.request, backward.outcomes, tensor)
        size_bytes = tensor.size_bytes if tensor is not None else 0
        self._applied.record(backward.request.key, reply, size_bytes=size_bytes, now_s=now_s)
        return reply

    # ---- both

    def _admit(self, uid: ExpertUid, version_seen: int) -> Outcome:
        if uid not in self.bank:
            return Outcome.UNKNOWN_EXPERT
        return Outcome.STALE if self.bank.version(uid) - version_seen > self._max_staleness else Outcome.OK

    def _all(self, request: Request, outcome: Outcome) -> GroupReply:
        return self._reply(request, dict.fromkeys(request.uids, outcome), None)

    def _reply(self, request: Request, outcomes: Mapping[ExpertUid, Outcome], tensor: WireTensor | None) -> GroupReply:
        versions = {uid: self.bank.version(uid) if uid in self.bank else 0 for uid in outcomes}
        return GroupReply(tuple(ExpertOutcome(uid.index, outcomes[uid], versions[uid]) for uid in request.uids), tensor)


def _invalid(error: MalformedMessage) -> CallRefused:
    return CallRefused(Refusal.INVALID, str(error))


def _check_same_pairs(request: Request, rows: PairRows) -> None:
    """A backward names experts of its forward, in its order, with as many pairs each."""
    pairs = list(zip(request.uids, request.counts, strict=True))
    named = set(pairs)
    if pairs != [pair for pair in zip(rows.uids, rows.counts, strict=True) if pair in named]:
        raise CallRefused(Refusal.INVALID, "the backward names experts, rows or an order that its forward did not have")
