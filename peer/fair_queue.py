"""Whose turn it is: deficit round robin by rows. A rule without a clock, a thread or a tensor.

Shreedhar and Varghese 1996: whoever has something waiting gets equally many rows a round, in items of whatever size.
What a round leaves over is kept for the next; whoever has nothing waiting keeps nothing.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Items of many callers, each caller's in the order they came."""

    def __init__(self, *, quantum_rows: int) -> None:
        if quantum_rows < 1:
            raise ValueError("a round must give everybody at least one row")
        self._quantum_rows = quantum_rows
        self._waiting: dict[Hashable, dict[T, int]] = {}
        """Of each caller with something waiting, its items and their rows."""
        self._round: deque[Hashable] = deque()
        self._deficit: dict[Hashable, int] = {}
        self._rows: dict[Hashable, int] = {}
        self._num_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows waiting."""
        return self._num_rows

    def __bool__(self) -> bool:
        return bool(self._round)

    def rows_of(self, caller: Hashable) -> int:
        """Rows this caller has waiting."""
        return self._rows.get(caller, 0)

    def callers(self) -> Iterator[Hashable]:
        """Those with something waiting."""
        return iter(self._waiting)

    def add(self, item: T, *, caller: Hashable, num_rows: int) -> None:
        """Let an item wait. It must not be waiting already."""
        if caller not in self._waiting:
            self._waiting[caller] = {}
            self._rows[caller] = self._deficit[caller] = 0
            self._round.append(caller)
        self._waiting[caller][item] = num_rows
        self._rows[caller] += num_rows
        self._num_rows += num_rows

    def next(self) -> T | None:
        """The item whose turn it is, left where it is; None when nothing waits."""
        while self._round:
            caller = self._round[0]
            item, num_rows = next(iter(self._waiting[caller].items()))
            if num_rows <= self._deficit[caller]:
                return item
            self._deficit[caller] += self._quantum_rows
            self._round.rotate(-1)
        return None

    def pop(self) -> T | None:
        """Take the item whose turn it is."""
        item = self.next()
        if item is not None:
            caller = self._round[0]
            self._deficit[caller] -= self._waiting[caller][item]
            self.remove(item, caller=caller)
        return item

    def remove(self, item: T, *, caller: Hashable) -> bool:
        """Take an item out of turn, which costs its caller nothing; False when it does not wait."""
        waiting = self._waiting.get(caller, {})
        num_rows = waiting.pop(item, None)
        if num_rows is None:
            return False
        self._rows[caller] -= num_rows
        self._num_rows -= num_rows
        if not waiting:
            self._round.remove(caller)
            del self._waiting[caller], self._deficit[caller], self._rows[caller]
        return True
