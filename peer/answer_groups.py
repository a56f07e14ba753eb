"""A forward's answer, put together while it is computed: experts leave in groups that are worth a message.

Knows which experts are done and what became of them; computes nothing.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from experts.uid import ExpertUid
from peer.messages import Call, ExpertOutcome, GroupReply, Outcome
from peer.tensors import Role, all_finite, encode

WORTHWHILE_BYTES = 1 << 19
"""Of float32 outputs that wait: with any codec still enough for a message of its own."""


class AnswerGroups:
    """The answer to one forward. Every expert of the call leaves in exactly one group."""

    def __init__(self, call: Call, versions: Mapping[ExpertUid, int], hosted: Collection[ExpertUid]) -> None:
        """`versions`: of the experts that are hosted here."""
        self._call = call
        self._versions = versions
        self._to_come = set(hosted)
        self._outcomes: dict[ExpertUid, Outcome] = {}
        """Of experts in no group yet; in the order of the call where they are OK."""
        self._outputs: list[Tensor] = []
        """Of those that are OK."""
        self._unsent = {ExpertUid(call.layer, expert.index) for expert in call.experts}
        self.finite: set[ExpertUid] = set()
        """All that have answered well."""

    def add(self, uids: Sequence[ExpertUid], counts: Sequence[int], out_ND: Tensor) -> None:
        """Outputs of these experts, consecutive. One that is not finite takes no other with it."""
        self._to_come.difference_update(uids)
        if all_finite(out_ND):
            self._outputs.append(out_ND)
            self._outcomes |= dict.fromkeys(uids, Outcome.OK)
            self.finite.update(uids)
        elif len(uids) == 1:
            self._outcomes[uids[0]] = Outcome.NON_FINITE
        else:
            for uid, count, rows_ND in zip(uids, counts, out_ND.split(list(counts)), strict=True):
                self.add([uid], [count], rows_ND)

    def is_worthwhile(self) -> bool:
        """Is there enough to send, and something still to come?"""
        return bool(self._to_come) and sum(out_ND.nbytes for out_ND in self._outputs) >= WORTHWHILE_BYTES

    def give_up(self) -> None:
        """What has not come will not come."""
        self._outcomes |= dict.fromkeys(self._to_come, Outcome.DECLINED)
        self._to_come.clear()

    def take(self) -> GroupReply:
        """What has come since the last group; the experts that are not here go with the last."""
        unsent, outcomes = self._unsent, self._outcomes
        if not self._to_come:
            outcomes = dict.fromkeys(unsent, Outcome.UNKNOWN_EXPERT) | outcomes
        experts = tuple(
            ExpertOutcome(uid.index, outcomes[uid], self._versions.get(uid, 0))
            for uid in (ExpertUid(self._call.layer, expert.index) for expert in self._call.experts)
            if uid in outcomes
        )
        tensor = encode(torch.cat(self._outputs), Role.OUTPUTS, self._call.reply_codec) if self._outputs else None
        self._unsent = unsent - outcomes.keys()
        self._outcomes, self._outputs = {}, []
        return GroupReply(experts, tensor)
