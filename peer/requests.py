"""A call at the peer that answers it: who sent it, what for, and what it takes of the device. Knows no tensors."""

from dataclasses import dataclass

from experts.uid import ExpertUid
from peer.call_queue import SMALL_ROWS_PER_EXPERT, Lane, Waiting
from peer.kept_inputs import CallKey
from peer.messages import Call
from peer.transport import Method, PeerId


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
        return tuple(ExpertUid(self.call.layer, expert.index) for expert in self.call.experts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Pairs of each."""
        return tuple(expert.num_rows for expert in self.call.experts)

    def waiting(self, *, now_s: float) -> "Waiting[Request]":
        """Its place in the queue. An evaluation has no graph to lose and runs with others whatever its size."""
        call = self.call
        is_small = call.num_pairs < SMALL_ROWS_PER_EXPERT * len(call.experts)
        return Waiting(
            self,
            self.caller,
            Lane.FORWARD if self.method is Method.FORWARD else Lane.BACKWARD,
            num_rows=call.num_pairs,
            size_bytes=call.size_bytes,
            deadline_s=now_s + call.timeout_s,
            score=call.score,
            runs_together=is_small or not call.is_training,
        )
