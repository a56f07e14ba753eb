"""How a daemon is asked to stop: by SIGINT or SIGTERM, or by a part of itself that cannot go on."""

import os
import queue
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Asked for once, waited for once. `request` may be called from any thread and from a signal handler.

    A SimpleQueue, because its `put` is reentrant: an Event's lock may be held by the very thread a signal interrupts.
    """

    def __init__(self) -> None:
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.is_requested = False

    def request(self, reason: str) -> None:
        self.is_requested = True
        self._reasons.put(reason)

    def wait(self) -> str:
        """Block until somebody asks; returns why, such as `SIGTERM`. The main thread takes signals meanwhile."""
        return self._reasons.get()


@contextmanager
def stop_on_signals() -> Generator[StopRequest]:
    """A request that the first signal makes; a second one ends the process at once, as if unhandled.

    Only in the main thread, where Python runs signal handlers. Restores what was there before.
    """
    stop = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.request(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
