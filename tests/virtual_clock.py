"""Event loops whose clocks belong to the test.

On a virtual clock time stands still while there is work, and jumps to the next timer when there is none: a test of ten
minutes of timeouts takes milliseconds and comes out the same every time. For code that waits for nothing but timers and
other tasks: no sockets, no threads. Where there are sockets, the real clock can be set forward.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 1000 s, so that a forgotten zero shows."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now_s

    def jump(self, duration_s: float) -> None:
        self._now_s += duration_s


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("nothing will ever happen: every task waits for another or for a thread")
        if not events and timeout is not None:
            self._loop.jump(max(timeout, 0.0))
        return events


def run_virtual(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)


class _ForwardLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s


def run_skipping(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on the real clock, in which the coroutine may `skip`."""
    with asyncio.Runner(loop_factory=_ForwardLoop) as runner:
        return runner.run(coroutine)


def skip(duration_s: float) -> None:
    """Have so much time gone by: what was due in it happens at the next turns of the loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _ForwardLoop)
    loop.skipped_s += duration_s
