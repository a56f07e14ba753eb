"""Which requests the device takes next. A rule without a clock, a thread or a tensor."""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    request: T
    num_tokens: int
    arrived_s: float


class Batcher(Generic[T]):
    """A batch is ready when it is full, or when its oldest request has waited long enough.

    Requests leave in the order they came, and none is ever split: one that is larger than a batch leaves alone.
    With `max_wait_s` 0 whatever has come while the device was busy is the next batch.
    """

    def __init__(self, *, max_tokens: int, max_wait_s: float) -> None:
        if max_tokens < 1 or max_wait_s < 0:
            raise ValueError("max_tokens must be at least 1 and max_wait_s at least 0")
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._waiting: deque[_Waiting[T]] = deque()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens waiting: what the peer's record says of its load."""
        return self._num_tokens

    def add(self, request: T, *, num_tokens: int, now_s: float) -> None:
        """Queue a request of `num_tokens` rows (0 for one that only asks)."""
        self._waiting.append(_Waiting(request, num_tokens, now_s))
        self._num_tokens += num_tokens

    def pop_ready(self, *, now_s: float) -> list[T]:
        """The next batch, or nothing yet."""
        deadline_s = self.next_deadline_s()
        if deadline_s is None or (now_s < deadline_s and self._num_tokens < self._max_tokens):
            return []
        batch: list[T] = []
        num_tokens = 0
        while self._waiting and (not batch or num_tokens + self._waiting[0].num_tokens <= self._max_tokens):
            waiting = self._waiting.popleft()
            num_tokens += waiting.num_tokens
            batch.append(waiting.request)
        self._num_tokens -= num_tokens
        return batch

    def next_deadline_s(self) -> float | None:
        """When the oldest request has waited long enough; None when nothing waits."""
        return self._waiting[0].arrived_s + self._max_wait_s if self._waiting else None
