"""Which waiting forwards go when there are too many. A rule without a clock, a thread or a tensor.

Whoever has the most rows waiting loses its own forward with the lowest score, of equal ones the latest. To choose is to
look at each caller once and at each forward that goes, however many wait.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heapreplace
from itertools import count
from typing import Generic, NamedTuple, Protocol, TypeVar


class Forward(Protocol):
    """What is looked at. Each is itself and no other."""

    @property
    def caller(self) -> Hashable: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def score(self) -> float: ...


C = TypeVar("C", bound=Forward)


class _Place(NamedTuple, Generic[C]):
    score: float
    minus_arrival: int
    """No two are the same."""
    call: C


class LeastWanted(Generic[C]):
    """Forwards of many callers, each caller's in the order in which they go."""

    def __init__(self) -> None:
        self._places: dict[Hashable, list[_Place[C]]] = {}
        """Of each caller with something waiting."""
        self._place_of: dict[C, _Place[C]] = {}
        self._rows: Counter[Hashable] = Counter()
        self._arrivals = count()

    def add(self, call: C) -> None:
        """It must not be here already."""
        place = self._place_of[call] = _Place(call.score, -next(self._arrivals), call)
        insort(self._places.setdefault(call.caller, []), place)
        self._rows[call.caller] += call.num_rows

    def remove(self, call: C) -> None:
        """It must be here."""
        place, places = self._place_of.pop(call), self._places[call.caller]
        del places[bisect_left(places, place)]
        self._rows[call.caller] -= call.num_rows
        if not places:
            del self._places[call.caller], self._rows[call.caller]

    def losers(self, newcomer: C | None = None) -> Iterator[C]:
        """Who goes, one after another, up to where the newcomer would be the next to go. Removes nobody."""
        rows = dict(self._rows)
        if newcomer is not None:
            rows[newcomer.caller] = rows.get(newcomer.caller, 0) + newcomer.num_rows
        most = [(-num_rows, order, caller) for order, (caller, num_rows) in enumerate(rows.items())]
        heapify(most)
        gone: Counter[Hashable] = Counter()
        while most:
            minus_rows, order, caller = most[0]
            places = self._places.get(caller, [])
            place = places[gone[caller]] if gone[caller] < len(places) else None
            if newcomer is not None and caller == newcomer.caller and (place is None or newcomer.score <= place.score):
                return
            if place is None:
                heappop(most)
                continue
            yield place.call
            gone[caller] += 1
            heapreplace(most, (minus_rows + place.call.num_rows, order, caller))
