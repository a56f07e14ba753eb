"""An async context manager held open on the event loop by a thread that is not on it.

Daemons and `swarmoe.join` live in an ordinary thread; what they hold (servers, tasks, connections) lives on the loop.
One coroutine enters and leaves the context, so that task groups inside it work.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import AbstractAsyncContextManager, suppress
from typing import Generic, TypeVar

from peer.event_loop import EventLoopThread
from peer.signals import StopRequest

T = TypeVar("T")

_STOP_LOOK_EVERY_S = 0.1


class Held(Generic[T]):
    """Opened once and closed once, from any thread but the loop's."""

    def __init__(
        self, loop: EventLoopThread, context: AbstractAsyncContextManager[T], *, leave_timeout_s: float
    ) -> None:
        self._loop = loop
        self._context = context
        self._leave_timeout_s = leave_timeout_s
        self._entered: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._leave: asyncio.Event | None = None
        self._holding: asyncio.Task[None] | None = None

    def open(self, stop: StopRequest | None = None) -> T | None:
        """Block until it is open; None when `stop` was asked for first.

        Raises what opening it raised. An interrupt, like a stop, closes again what is half open.
        """
        self._loop.call_soon(self._begin)
        try:
            while not wait([self._entered], timeout=_STOP_LOOK_EVERY_S).done:
                if stop is not None and stop.is_requested:
                    self.close()
                    return None
            return self._entered.result()
        except BaseException:
            with suppress(BaseException):
                self.close()
            raise

    def close(self) -> None:
        """Leave, also while it is still opening. Raises what went wrong inside, or TimeoutError."""
        self._loop.call_soon(self._let_go)
        self._ended.result(self._leave_timeout_s)

    def until_stopped(self, stop: StopRequest, *, on_open: Callable[[T], object]) -> str:
        """Hold it until somebody asks to stop, also while it opens; returns why.

        `on_open` is called on the loop. Raises what went wrong inside, which also ends the holding.
        """
        self._entered.add_done_callback(lambda entered: entered.exception() or on_open(entered.result()))
        self._ended.add_done_callback(lambda _: stop.request("it ended by itself"))
        self._loop.call_soon(self._begin)
        reason = stop.wait()
        self.close()
        return reason

    def _begin(self) -> None:
        self._leave = asyncio.Event()
        self._holding = asyncio.ensure_future(self._hold(self._leave))

    def _let_go(self) -> None:
        assert self._leave is not None
        self._leave.set()
        # A task cancelled before its first turn never runs at all, and nobody would close what it was given to open.
        asyncio.get_running_loop().call_soon(self._stop_opening)

    def _stop_opening(self) -> None:
        assert self._holding is not None
        if not self._entered.done():
            self._holding.cancel()

    async def _hold(self, leave: asyncio.Event) -> None:
        try:
            async with self._context as value:
                self._entered.set_result(value)
                await leave.wait()
        except BaseException as error:
            cause = only_cause(error)
            if not self._entered.done():
                self._entered.set_exception(cause)
            if leave.is_set() and isinstance(cause, asyncio.CancelledError):
                self._ended.set_result(None)  # asked to leave before it was open
            else:
                self._ended.set_exception(cause)
        else:
            self._ended.set_result(None)


def only_cause(error: BaseException) -> BaseException:
    """A task group wraps what went wrong; one wrapped error is what the caller wants to see."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
