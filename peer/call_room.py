"""Room for the bytes of calls: those that are read, that wait and that are answered. On the event loop.

A call that finds no room is told so before its tensors are read, or is not read until there is some: its bytes then
stay with its caller.
"""

import asyncio
from collections import deque


class RoomTaken(Exception):
    """There is no room now."""


class CallRoom:
    """Counts bytes, and lets some calls wait for them in the order they came."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def taken_bytes(self) -> int:
        return self._taken_bytes

    def take(self, size_bytes: int) -> None:
        """Raises RoomTaken. A call larger than the whole room gets in when it is alone."""
        if self._waiting or not self._fits(size_bytes):
            message = f"calls in progress have {self._taken_bytes} of {self._max_bytes} bytes"
            raise RoomTaken(f"{message}, and this one needs {size_bytes}; try later")
        self._taken_bytes += size_bytes

    async def wait(self, size_bytes: int) -> None:
        """As `take`, once it fits. Whoever gives up waiting has taken nothing."""
        if not self._waiting and self._fits(size_bytes):
            self._taken_bytes += size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and cancelled in one turn of the loop
                self.give_back(size_bytes)
            else:
                self._admit()  # whoever came after it may fit
            raise

    def give_back(self, size_bytes: int) -> None:
        """A call is over."""
        self._taken_bytes -= size_bytes
        self._admit()

    def _fits(self, size_bytes: int) -> bool:
        return self._taken_bytes == 0 or self._taken_bytes + size_bytes <= self._max_bytes

    def _admit(self) -> None:
        while self._waiting:
            size_bytes, turn = self._waiting[0]
            if not turn.cancelled():
                if not self._fits(size_bytes):
                    return
                self._taken_bytes += size_bytes
                turn.set_result(None)
            self._waiting.popleft()
