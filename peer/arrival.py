"""Until when the next bytes of a call must come. A rule without a clock.

A call that is being read has room that others wait for. Bytes that come buy time for the next ones, never more than a
pause: neither silence nor a byte now and then keeps the room.
"""

MAX_PAUSE_S = 20.0
"""A frame has a second per 50 KiB: some home uplinks, shared by several calls, carry no more."""
_MIN_BYTES_PER_S = 16 << 10


class Arrival:
    """Of one call."""

    def __init__(self, *, now_s: float) -> None:
        self._until_s = now_s + MAX_PAUSE_S

    @property
    def until_s(self) -> float:
        """Nothing by then: its sender dawdles."""
        return self._until_s

    def came(self, size_bytes: int, *, now_s: float) -> None:
        """More of it is here."""
        self._until_s = min(self._until_s + size_bytes / _MIN_BYTES_PER_S, now_s + MAX_PAUSE_S)
