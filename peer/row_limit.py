"""How many rows a pass may have after the device ran out of memory. A rule without a clock or a tensor."""

_FORGETS_AFTER_S = 60.0
"""Then larger passes are tried again: whatever took the memory may have gone."""
NO_LIMIT = 1 << 62


class RowLimit:
    """None, until a pass does not fit; then half of what did not, for a while."""

    def __init__(self) -> None:
        self._rows = NO_LIMIT
        self._expires_s = 0.0

    def rows(self, *, now_s: float) -> int:
        """The most rows to try in one pass."""
        if now_s >= self._expires_s:
            self._rows = NO_LIMIT
        return self._rows

    def shrink(self, failed_rows: int, *, now_s: float) -> None:
        """So many did not fit."""
        self._rows = max(1, failed_rows // 2)
        self._expires_s = now_s + _FORGETS_AFTER_S
