"""A link as arithmetic: how many bytes may go together, and when what is sent arrives. Knows no clock, no socket.

A process has two links, one a direction, and all its calls share them. What is sent waits its turn, takes as long as
its bytes do at the link's bandwidth, and then travels for the link's latency, drawn once for each stream, which is one
direction of one call. Streams take turns by pieces of 5 ms: a small message is not held up by another call's megabyte.
"""

import random
from collections.abc import Callable, Iterator

Delay = Callable[[random.Random], float]
"""Draws seconds on the way, one way."""

_PIECE_S = 0.005
_MIN_PIECE_BYTES = 1024
_LATE_S = 0.05
"""Who comes back this soon after its last piece was waiting for the link: timers fire late, senders have buffers."""


def uniform(latency_s: float, jitter_s: float = 0.0) -> Delay:
    """At least the latency, at most the jitter more."""
    return lambda rng: latency_s + jitter_s * rng.random()


def exponential(mean_s: float) -> Delay:
    """No memory, a long tail: one in a hundred takes 4.6 times the mean."""
    return lambda rng: rng.expovariate(1 / mean_s) if mean_s > 0 else 0.0


class Link:
    """One direction of one process. Without a bandwidth it is as wide as the wire below."""

    def __init__(
        self, *, bits_per_s: float | None = None, delay: Delay | None = None, rng: random.Random | None = None
    ) -> None:
        self._bytes_per_s = None if bits_per_s is None else bits_per_s / 8
        self._delay = delay or uniform(0.0)
        self._rng = rng or random.Random(0)
        self._free_s = 0.0
        """When it has sent all that was given to it."""

    def stream(self) -> "Stream":
        """For one direction of one call."""
        return Stream(self, self._delay(self._rng))

    def pieces(self, size_bytes: int) -> Iterator[int]:
        """A message in the sizes in which streams take turns."""
        if self._bytes_per_s is None:
            yield size_bytes
            return
        piece_bytes = max(_MIN_PIECE_BYTES, int(self._bytes_per_s * _PIECE_S))
        for start in range(0, size_bytes, piece_bytes):
            yield min(piece_bytes, size_bytes - start)

    def take(self, size_bytes: int, *, ready_s: float) -> float:
        """Send so many bytes that could go from `ready_s` on; when the last of them has gone."""
        if self._bytes_per_s is None:
            return ready_s
        self._free_s = max(self._free_s, ready_s) + size_bytes / self._bytes_per_s
        return self._free_s


class Stream:
    """One call's use of a link. It hands in a piece when the one before has gone, and so leaves room for others."""

    def __init__(self, link: Link, latency_s: float) -> None:
        self.latency_s = latency_s
        self._link = link
        self._gone_s = float("-inf")

    def pieces(self, size_bytes: int) -> Iterator[int]:
        return self._link.pieces(size_bytes)

    def send(self, size_bytes: int, *, now_s: float) -> float:
        """When this piece has gone: then the next may be handed in. It arrives `latency_s` later."""
        was_waiting = now_s - self._gone_s <= _LATE_S
        self._gone_s = self._link.take(size_bytes, ready_s=min(now_s, self._gone_s) if was_waiting else now_s)
        return self._gone_s
