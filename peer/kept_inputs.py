"""What a peer keeps between a call's forward and its backward, within a memory cap and a time limit.

A kept call lets backward send gradients only: a third less uplink than sending the inputs twice. What it holds is
the owner's business; this module counts bytes and ages.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from peer.transport import PeerId

T = TypeVar("T")
CallKey = tuple[PeerId, bytes]
"""Caller and call id: one caller cannot reach another's inputs."""


@dataclass(frozen=True)
class _Kept(Generic[T]):
    value: T
    size_bytes: int
    expires_s: float


@dataclass
class KeptInputsCounts:
    """What keeping was good for. Numbers only grow; written by the compute thread, readable from any."""

    used: int = 0
    """Backwards that sent gradients only, and found their inputs kept."""
    missed: int = 0
    """Backwards that sent gradients only, and had to send the inputs after all."""
    uplink_bytes_saved: int = 0
    """What the used ones did not send twice."""
    rows_from_graph: int = 0
    """Went back through the graph that their forward had built."""
    rows_recomputed: int = 0
    """Had their outputs computed again: their experts had stepped, or they ran together with others."""
    passes_recomputed: int = 0

    def went_back(self, num_rows: int, *, used_graph: bool) -> None:
        """A backward pass of so many rows is over."""
        if used_graph:
            self.rows_from_graph += num_rows
        else:
            self.rows_recomputed += num_rows
            self.passes_recomputed += 1


class KeptInputs(Generic[T]):
    """The newest calls that fit; the oldest make room."""

    def __init__(self, *, max_bytes: int, lifetime_s: float) -> None:
        self._max_bytes = max_bytes
        self._lifetime_s = lifetime_s
        self._kept: OrderedDict[CallKey, _Kept[T]] = OrderedDict()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: CallKey, value: T, *, size_bytes: int, now_s: float) -> None:
        """Keep `value`; one that exceeds the whole cap is not kept at all, and its backward will be a miss."""
        self.expire(now_s=now_s)
        self.discard(key)
        if size_bytes > self._max_bytes:
            return
        self._kept[key] = _Kept(value, size_bytes, now_s + self._lifetime_s)
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes:
            self.discard(next(iter(self._kept)))

    def take(self, key: CallKey, *, now_s: float) -> T | None:
        """Hand out a call and forget it: its backward comes once. None is a miss."""
        self.expire(now_s=now_s)
        kept = self._kept.get(key)
        self.discard(key)
        return kept.value if kept is not None else None

    def expire(self, *, now_s: float) -> None:
        """Forget what is too old. All live equally long, so the oldest come first."""
        while self._kept:
            key, kept = next(iter(self._kept.items()))
            if kept.expires_s > now_s:
                return
            self.discard(key)

    def discard(self, key: CallKey) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._size_bytes -= kept.size_bytes
