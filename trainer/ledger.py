"""What a trainer sent, what came back and what was lost: the counters of the report. Training calls only.

A call is counted when it is first dispatched and is answered when at least one pair came back by its deadline, so
sent = answered + lost; pairs and backwards likewise (sent = applied + lost + stale). Evaluation is in no counter.
"""

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum


class LossReason(StrEnum):
    """Why a pair did not come back."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    DECLINED = "declined"
    MALFORMED = "malformed"
    NON_FINITE = "non_finite"
    STALE = "stale"
    NO_PRIMARY = "no_primary"


class BackwardOutcome(StrEnum):
    """How a backward ended, as the trainer sees it."""

    APPLIED = "applied"
    LOST = "lost"
    """No acknowledgement in time; it may have been applied."""
    STALE = "stale"


@dataclass(frozen=True)
class Counts:
    """One immutable reading of a ledger; the report's own field names."""

    calls: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    lost_by_reason: dict[str, int] = field(default_factory=dict)
    backwards: dict[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def answered_share(self) -> float:
        """Of the pairs sent so far; 1 before the first."""
        return self.pairs["answered"] / self.pairs["sent"] if self.pairs["sent"] else 1.0

    def as_report(self) -> dict[str, object]:
        return asdict(self)


class Ledger:
    """Adds up; may be told from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._pairs: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._backwards: Counter[str] = Counter()
        self._bytes_up = 0
        self._bytes_down = 0

    def call(self, *, answered: bool) -> None:
        with self._lock:
            self._calls["answered" if answered else "lost"] += 1

    def retried(self) -> None:
        """A call was sent once more: a backward with its inputs, to a peer that had forgotten them."""
        with self._lock:
            self._calls["retried"] += 1

    def pairs_answered(self, num_pairs: int) -> None:
        with self._lock:
            self._pairs["answered"] += num_pairs

    def pairs_lost(self, num_pairs: int, reason: LossReason) -> None:
        with self._lock:
            self._pairs["lost"] += num_pairs
            self._reasons[reason] += num_pairs

    def backward(self, outcome: BackwardOutcome) -> None:
        with self._lock:
            self._backwards[outcome] += 1

    def backward_repeated(self) -> None:
        """The peer had applied this backward already, and no longer has its answer. It is lost as well."""
        with self._lock:
            self._backwards["duplicate"] += 1

    def moved(self, *, bytes_up: int = 0, bytes_down: int = 0) -> None:
        """Message bytes at the RPC layer, frames included, TLS and TCP not."""
        with self._lock:
            self._bytes_up += bytes_up
            self._bytes_down += bytes_down

    def read(self) -> Counts:
        with self._lock:
            calls, pairs, backwards = self._calls, self._pairs, self._backwards
            return Counts(
                calls={
                    "sent": calls["answered"] + calls["lost"],
                    "answered": calls["answered"],
                    "lost": calls["lost"],
                    "retried": calls["retried"],
                    "hedged": 0,
                },
                pairs={
                    "sent": pairs["answered"] + pairs["lost"],
                    "answered": pairs["answered"],
                    "lost": pairs["lost"],
                    "declined": self._reasons[LossReason.DECLINED],
                },
                lost_by_reason={reason: self._reasons[reason] for reason in LossReason},
                backwards={
                    "sent": sum(backwards[outcome] for outcome in BackwardOutcome),
                    **{outcome: backwards[outcome] for outcome in BackwardOutcome},
                    "duplicate": backwards["duplicate"],
                },
                bytes_up=self._bytes_up,
                bytes_down=self._bytes_down,
            )
