"""Which calls may wait, which of them run next, and together. Rules without a clock, a thread or a tensor.

Callers take turns by rows (`fair_queue`), so that nobody starves another. Forwards and backwards take turns too. A turn
of forwards is short, and a turn of backwards lasts while there are any: all of them go back through the experts as
their forwards saw them, and the experts step once, at its end. A step after every backward would outdate the graphs of
all the others: on one CPU core with four calls in flight (`ffn`, D 256, H 1024, one expert) the backwards then take 1.4
times as long.

Calls that are small for their experts run together as one pass. Measured as above, forward and backward of four calls
together, against one by one with one step: 0.45 of the time at 1 row per expert and call, 0.7 at 32, and 1.1 to 1.5
from 128 on, where computing the outputs again costs more than the passes that it saves. Nothing waits for company on
an idle device: what comes while it works is company enough.

Over capacity the caller with the most rows waiting loses its own lowest-scored forward: whoever lies about scores
loses its better calls for its worse ones. A backward makes room for itself among forwards, never the other way round:
its forward's work is spent already.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from peer.fair_queue import FairQueue
from peer.least_wanted import LeastWanted
from peer.pace import Pace

T = TypeVar("T")

SMALL_ROWS_PER_EXPERT = 64
"""A training call with fewer rows than this per expert runs together with others."""
_TOGETHER_ROWS = 2048
"""No more than this in one pass of several calls: more is not faster, and all wait for the last."""
_QUANTUM_ROWS = 512
_MAX_CALLS = 4096
"""However small they are."""
_FORWARDS_TURN_S = 0.2
"""Under overload backwards wait for this and no more, so that none of their forwards was computed in vain."""
_BACKWARDS_TURN_S = 2.0
"""A flood of backwards keeps the forwards waiting for so long, not for ever."""
_TRAVEL_SHARE = 0.2
"""Of a call's time, set aside for its answer to be put together and to travel."""
_TRAVEL_MOST_S = 0.5


class Declined(Exception):
    """Not now: the sentence says why."""


class Lane(Enum):
    """What takes turns."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, eq=False)
class Waiting(Generic[T]):
    """A call in the queue. Each is itself and no other."""

    work: T
    caller: Hashable
    lane: Lane
    num_rows: int
    size_bytes: int
    deadline_s: float
    score: float = 0.0
    runs_together: bool = False
    """Whether it is faster in one pass with others of its kind."""


class CallQueue(Generic[T]):
    """The calls that wait for one device."""

    def __init__(self, *, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._lanes: dict[Lane, FairQueue[Waiting[T]]] = {lane: FairQueue(quantum_rows=_QUANTUM_ROWS) for lane in Lane}
        self._least_wanted = LeastWanted[Waiting[T]]()
        """The forwards once more."""
        self._size_bytes = 0
        self._num_calls = 0
        self._turn = Lane.BACKWARD
        self._turn_rows_left = 0
        self._pace = Pace[Lane]()

    @property
    def num_rows(self) -> int:
        """Rows waiting: what the peer's record says of its load."""
        return sum(lane.num_rows for lane in self._lanes.values())

    @property
    def size_bytes(self) -> int:
        """Of the tensors waiting."""
        return self._size_bytes

    def offer(self, call: Waiting[T], *, now_s: float) -> list[Waiting[T]]:
        """Let a call wait; gives those that had to make room. Raises Declined, and nobody has made room then."""
        displaced = self.check(call, now_s=now_s)
        for other in displaced:
            self.withdraw(other)
        self._lanes[call.lane].add(call, caller=call.caller, num_rows=call.num_rows)
        self._came(call)
        return displaced

    def check(self, call: Waiting[T], *, now_s: float) -> list[Waiting[T]]:
        """What `offer` would do. Raises Declined."""
        ahead_s = self._seconds_ahead(call)
        left_s = self.start_by_s(call, now_s=now_s) - now_s
        if ahead_s > left_s:
            raise Declined(f"its turn would come in {ahead_s:.1f} s, and it has {max(0.0, left_s):.1f} s; try later")
        return self._make_room(call)

    def start_by_s(self, call: Waiting[T], *, now_s: float) -> float:
        """Started later than this, its answer would come too late."""
        alone_s = self._pace.seconds(call.lane, call.num_rows)
        return call.deadline_s - alone_s - min(_TRAVEL_MOST_S, _TRAVEL_SHARE * max(0.0, call.deadline_s - now_s))

    def withdraw(self, call: Waiting[T]) -> bool:
        """It is not wanted any more; False when it does not wait."""
        waited = self._lanes[call.lane].remove(call, caller=call.caller)
        if waited:
            self._went(call)
        return waited

    def pop_together(self) -> list[Waiting[T]]:
        """What runs next, in one pass, all of one lane; nothing when nothing waits."""
        if not any(self._lanes.values()):
            return []
        self._take_turns()
        lane = self._lanes[self._turn]
        together: list[Waiting[T]] = []
        room_rows = _TOGETHER_ROWS
        while (call := lane.next()) is not None:
            if together and not (call.runs_together and call.num_rows <= room_rows):
                break
            lane.pop()
            together.append(call)
            room_rows -= call.num_rows
            self._turn_rows_left -= call.num_rows
            self._went(call)
            if not call.runs_together:
                break
        return together

    def more_backwards(self) -> bool:
        """Whether the turn of the backwards goes on after the pass in hand."""
        return bool(self._lanes[Lane.BACKWARD]) and (self._turn_rows_left > 0 or not self._lanes[Lane.FORWARD])

    def took(self, lane: Lane, num_rows: int, duration_s: float) -> None:
        """A pass is over: how long the next ones will take."""
        self._pace.observe(lane, num_rows, duration_s)

    @property
    def trips_per_s(self) -> float | None:
        """Rows a second, forward and backward, as the latest passes went; None before there were both."""
        seconds = [self._pace.seconds(lane, 1) for lane in Lane]
        return 1 / sum(seconds) if all(seconds) else None

    def _came(self, call: Waiting[T]) -> None:
        self._num_calls += 1
        self._size_bytes += call.size_bytes
        if call.lane is Lane.FORWARD:
            self._least_wanted.add(call)

    def _went(self, call: Waiting[T]) -> None:
        self._num_calls -= 1
        self._size_bytes -= call.size_bytes
        if call.lane is Lane.FORWARD:
            self._least_wanted.remove(call)

    def _take_turns(self) -> None:
        other = Lane.FORWARD if self._turn is Lane.BACKWARD else Lane.BACKWARD
        if not self._lanes[other] or (self._lanes[self._turn] and self._turn_rows_left > 0):
            return
        self._turn = other
        turn_rows = self._pace.rows(other, _BACKWARDS_TURN_S if other is Lane.BACKWARD else _FORWARDS_TURN_S)
        self._turn_rows_left = self._lanes[other].num_rows if turn_rows is None else turn_rows

    def _seconds_ahead(self, call: Waiting[T]) -> float:
        """What the device does before it comes to this call, if all callers get the same share of it."""
        if self._num_calls == 0:
            return 0.0
        callers = {caller for lane in self._lanes.values() for caller in lane.callers()}
        own_s = self._seconds_of(call.caller, call.lane)
        share_s = own_s + self._cost_s(call.lane, call.num_rows)
        return own_s + sum(
            min(self._seconds_of(caller, call.lane), share_s) for caller in callers if caller != call.caller
        )

    def _seconds_of(self, caller: Hashable, lane: Lane) -> float:
        """Of what a caller has waiting, as far as it is computed before a new call in this lane."""
        backward_s = self._cost_s(Lane.BACKWARD, self._lanes[Lane.BACKWARD].rows_of(caller))
        if lane is Lane.BACKWARD:
            return backward_s
        return backward_s + self._cost_s(Lane.FORWARD, self._lanes[Lane.FORWARD].rows_of(caller))

    def _cost_s(self, lane: Lane, num_rows: int) -> float:
        """A forward costs its backward too: it will come before the forwards behind it."""
        backward_s = self._pace.seconds(Lane.BACKWARD, num_rows)
        return backward_s if lane is Lane.BACKWARD else backward_s + self._pace.seconds(Lane.FORWARD, num_rows)

    def _make_room(self, call: Waiting[T]) -> list[Waiting[T]]:
        """Which forwards go so that this call fits. Raises Declined when it would be the call itself."""
        calls, rows, size_bytes = self._num_calls, self.num_rows, self._size_bytes
        losers = self._least_wanted.losers(call if call.lane is Lane.FORWARD else None)
        displaced: list[Waiting[T]] = []
        while calls > 0 and (
            calls + 1 > _MAX_CALLS
            or rows + call.num_rows > self._max_rows
            or size_bytes + call.size_bytes > self._max_bytes
        ):
            loser = next(losers, None)
            if loser is None:
                raise Declined(f"{self.num_rows} rows of {self._size_bytes} bytes are waiting already; try later")
            displaced.append(loser)
            calls, rows, size_bytes = calls - 1, rows - loser.num_rows, size_bytes - loser.size_bytes
        return displaced
