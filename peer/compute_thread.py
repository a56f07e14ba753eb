"""The one thread that owns a device's experts and optimisers; the event loop hands it work and awaits results.

Knows neither tensors nor experts: what to do with a batch is its owner's `run_batch`.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import structlog

from peer.batching import Batcher

log = structlog.get_logger(__name__)

W = TypeVar("W")
R = TypeVar("R")


class ComputeThreadStopped(Exception):
    """The peer is closing; work that was still queued will not be done."""


class ComputeThread(Generic[W, R]):
    """Runs batches in the order their requests came. Started and closed by the thread that owns the peer.

    `run_batch` gives one result per work, in order; each goes to its caller as soon as it is there.
    """

    def __init__(
        self,
        run_batch: Callable[[Sequence[W]], Iterable[R | Exception]],
        *,
        max_tokens: int,
        max_wait_s: float = 0.0,
    ) -> None:
        self._run_batch = run_batch
        self._batcher: Batcher[tuple[W, asyncio.Future[R]]] = Batcher(max_tokens=max_tokens, max_wait_s=max_wait_s)
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="swarmoe-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def queued_tokens(self) -> int:
        return self._batcher.num_tokens

    async def submit(self, work: W, *, num_tokens: int) -> R:
        """Queue `work` and wait for its result. A caller that gives up does not stop work already begun.

        Raises what `run_batch` answered for this work, or ComputeThreadStopped.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._stopping:
                raise ComputeThreadStopped
            self._batcher.add((work, future), num_tokens=num_tokens, now_s=time.monotonic())
            self._wake.notify()
        return await future

    def close(self, *, timeout_s: float) -> bool:
        """Finish the batch in hand, refuse the rest. False when it did not end in time. Blocks; not for the loop."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while (batch := self._next_batch()) is not None:
            # Looked at once: a caller may give up at any moment, also between two looks.
            wanted = [(work, future) for work, future in batch if not future.cancelled()]
            unanswered = iter([future for _, future in wanted])
            try:
                results = self._run_batch([work for work, _ in wanted])
                for (_, future), result in zip(wanted, results, strict=True):
                    next(unanswered)
                    _deliver(future, result)
            except Exception as error:  # the top of a compute thread: one bad batch must not end the peer
                log.exception("compute.failed", requests=len(wanted))
                for future in unanswered:
                    _deliver(future, error)
        for _, future in self._drain():
            _deliver(future, ComputeThreadStopped())

    def _next_batch(self) -> list[tuple[W, asyncio.Future[R]]] | None:
        with self._wake:
            while not self._stopping:
                now_s = time.monotonic()
                if batch := self._batcher.pop_ready(now_s=now_s):
                    return batch
                deadline_s = self._batcher.next_deadline_s()
                self._wake.wait(None if deadline_s is None else max(0.0, deadline_s - now_s))
            return None

    def _drain(self) -> list[tuple[W, asyncio.Future[R]]]:
        with self._wake:
            waiting: list[tuple[W, asyncio.Future[R]]] = []
            while self._batcher.next_deadline_s() is not None:
                waiting += self._batcher.pop_ready(now_s=float("inf"))
            return waiting


def _deliver(future: "asyncio.Future[R]", result: R | Exception) -> None:
    def settle() -> None:
        if future.done():
            return  # the caller gave up
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    with suppress(RuntimeError):  # the loop is closed, and with it went everybody who waited
        future.get_loop().call_soon_threadsafe(settle)
