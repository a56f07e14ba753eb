"""Room for the bytes of calls: those that are read, that wait and that are answered. On the event loop.

A call that finds no room is told so before its tensors are read, or is not read until there is some: its bytes then
stay with its caller.

Nobody takes more than is left over (dynamic thresholds, Choudhury and Hahne 1998): one caller has at most half of the
room, two a third each. So there is room for whoever comes next, however many calls a stranger begins and does not end.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Hashable


class RoomTaken(Exception):
    """There is no room now."""


class CallRoom:
    """Counts bytes, and lets some calls wait for them: a caller's own in the order they came."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken_bytes = 0
        self._taken_by: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[tuple[int, asyncio.Future[None]]]] = {}
        self._promised_bytes = 0
        """To whoever waits longest and has nothing in the room; half of it at most, the rest is for calls to pass."""

    @property
    def taken_bytes(self) -> int:
        return self._taken_bytes

    def take(self, caller: Hashable, size_bytes: int) -> None:
        """Raises RoomTaken. A caller's only call may be larger than its share, and than the room when it is empty."""
        if caller in self._waiting or not self._fits(caller, size_bytes, self._promised_bytes):
            message = f"calls in progress have {self._taken_bytes} of {self._max_bytes} bytes"
            whose = f"{self._taken_by[caller]} of them yours"
            raise RoomTaken(f"{message}, {whose}, and this one needs {size_bytes}; try later")
        self._enter(caller, size_bytes)

    async def wait(self, caller: Hashable, size_bytes: int) -> None:
        """As `take`, once it fits. Whoever gives up waiting has taken nothing."""
        if caller not in self._waiting and self._fits(caller, size_bytes, self._promised_bytes):
            self._enter(caller, size_bytes)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append((size_bytes, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and cancelled in one turn of the loop
                self.give_back(caller, size_bytes)
            else:
                self._admit()  # whoever came after it may fit
            raise

    def give_back(self, caller: Hashable, size_bytes: int) -> None:
        """A call is over."""
        self._taken_bytes -= size_bytes
        self._taken_by[caller] -= size_bytes
        if not self._taken_by[caller]:
            del self._taken_by[caller]
        self._admit()

    def _enter(self, caller: Hashable, size_bytes: int) -> None:
        self._taken_bytes += size_bytes
        self._taken_by[caller] += size_bytes

    def _has_share(self, caller: Hashable, size_bytes: int) -> bool:
        own_bytes = self._taken_by[caller]
        return not own_bytes or own_bytes + size_bytes <= self._max_bytes - self._taken_bytes - size_bytes

    def _fits(self, caller: Hashable, size_bytes: int, promised_bytes: int) -> bool:
        if self._taken_bytes == 0:
            return True
        return (
            self._has_share(caller, size_bytes) and self._taken_bytes + size_bytes + promised_bytes <= self._max_bytes
        )

    def _admit(self) -> None:
        """Let in whoever can be. Who has its share already holds up nobody but itself."""
        self._promised_bytes = 0
        for caller, calls in list(self._waiting.items()):
            while calls:
                size_bytes, turn = calls[0]
                if not turn.cancelled():
                    if not self._has_share(caller, size_bytes):
                        break
                    if not self._fits(caller, size_bytes, self._promised_bytes):
                        self._promised_bytes = self._promised_bytes or min(size_bytes, self._max_bytes // 2)
                        break
                    self._enter(caller, size_bytes)
                    turn.set_result(None)
                calls.popleft()
            if not calls:
                del self._waiting[caller]
