"""The one event loop of a process, on a thread of its own, and the one bridge to it from threads that may block.

gRPC's asyncio objects belong to the loop that made them, and two loops interfere: everything that talks lives here.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

Talk = Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]
"""Makes a coroutine that tells what it has to say through the callable it is given."""

_CLOSE_TIMEOUT_S = 5.0


class EventLoopThread:
    """Runs from `start` to `close`; once closed it stays closed. Every method may be called from any other thread."""

    def __init__(self) -> None:
        self._loop = _new_event_loop()
        self._thread = threading.Thread(target=self._run_forever, name="event-loop", daemon=True)
        self._closed = False

    def start(self) -> Self:
        """Returns when the loop runs."""
        self._thread.start()
        self.run(asyncio.sleep(0), timeout_s=_CLOSE_TIMEOUT_S)
        return self

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float | None) -> T:
        """Run it on the loop and block until it returns or raises.

        After `timeout_s` (None: never), and on KeyboardInterrupt, it is cancelled and this returns at once with
        TimeoutError or the interrupt. RuntimeError when called from the loop itself, which would wait for ever, or when
        the loop is not running.
        """
        future = self._start(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()  # does nothing when the coroutine itself raised
            raise

    def listen(self, talks: Iterable[Talk[T]], *, timeout_s: float) -> Generator[T]:
        """Run coroutines side by side on the loop, each as soon as `talks` gives it; yield what they tell, as it comes.

        Ends when all have ended. Raises what one of them raised, and TimeoutError after `timeout_s`; then, and when the
        generator is closed early, those still running are cancelled. RuntimeError as for `run`.
        """
        deadline_s = time.monotonic() + timeout_s
        inbox: SimpleQueue[T | Future[None]] = SimpleQueue()
        running: list[Future[None]] = []
        try:
            for talk in talks:
                running.append(self._start(talk(inbox.put)))
                running[-1].add_done_callback(inbox.put)
            num_open = len(running)
            while num_open:
                said = inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
                if isinstance(said, Future):
                    said.result()
                    num_open -= 1
                else:
                    yield said
        except Empty:
            raise TimeoutError from None
        finally:
            for future in running:
                future.cancel()  # does nothing to one that has ended

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Have the loop call this and return at once. RuntimeError after `close`."""
        self._loop.call_soon_threadsafe(callback)

    def close(self, *, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """Cancel what still runs, wait for it, end the thread; False when that took too long. Idempotent."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the loop cannot wait for its own end")
        if not self._closed:
            self._closed = True
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._loop.stop)
            else:
                self._loop.close()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if threading.current_thread() is self._thread or self._closed or not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("this blocks: call it from another thread than the loop's, between start() and close()")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run_forever(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # its exit cancels and awaits every task
            runner.get_loop().run_forever()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows has none
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
