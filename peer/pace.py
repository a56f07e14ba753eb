"""How long rows take on a device, by what is done with them, learnt from the latest passes. Knows no clock."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_KEEPS = 0.9
"""Of what is known, with every new pass: the last ten or so decide."""


class Pace(Generic[K]):
    """Seconds per row, each kind of work for itself."""

    def __init__(self) -> None:
        self._seen: dict[K, tuple[float, float]] = {}
        """Rows and seconds, older ones counting less."""

    def observe(self, kind: K, num_rows: int, duration_s: float) -> None:
        """So many rows took so long."""
        rows, seconds = self._seen.get(kind, (0.0, 0.0))
        self._seen[kind] = (_KEEPS * rows + num_rows, _KEEPS * seconds + duration_s)

    def rows(self, kind: K, duration_s: float) -> int | None:
        """How many are done in so long; None while nothing is known."""
        rows, seconds = self._seen.get(kind, (0.0, 0.0))
        return int(duration_s * rows / seconds) if seconds else None

    def seconds(self, kind: K, num_rows: int) -> float:
        """How long so many will take; 0 while nothing is known."""
        rows, seconds = self._seen.get(kind, (0.0, 0.0))
        return num_rows * seconds / rows if rows else 0.0
