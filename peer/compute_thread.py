"""The one thread that owns a device's experts and optimisers; the event loop hands it calls and awaits their answers.

Knows neither tensors nor experts: what to do with a batch of calls is its owner's `run_batch`.
"""

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from peer.call_queue import CallQueue, Declined, Waiting

log = structlog.get_logger(__name__)

W = TypeVar("W")
R = TypeVar("R")
T = TypeVar("T")


_LAST_WORD_SHARE = 0.05
"""Of a call's time, for the news that it takes too long."""


class ComputeThreadStopped(Exception):
    """The peer is closing; what was still queued will not be done."""


@dataclass(frozen=True)
class Part(Generic[R]):
    """Some of the answer to one call of a batch."""

    position: int
    """Of the call in its batch."""
    result: R | Exception
    is_last: bool = True


class _Inbox(Generic[R]):
    """Where the parts of one answer arrive: written by any thread, read on the loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[R | Exception, bool]] = asyncio.Queue()

    def put(self, result: R | Exception, *, is_last: bool = True) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it went everybody who waited
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (result, is_last))

    async def get(self) -> tuple[R, bool]:
        """The next part, and whether it is the last. Raises what ended the answer instead."""
        result, is_last = await self._parts.get()
        if isinstance(result, Exception):
            raise result
        return result, is_last


@dataclass(frozen=True)
class _Errand(Generic[T]):
    """Something other than a call that must happen on this thread."""

    action: Callable[[], T]
    inbox: _Inbox[T]

    def run(self) -> None:
        try:
            self.inbox.put(self.action())
        except Exception as error:  # the top of the compute thread for one errand
            self.inbox.put(error)  # raised, and logged, where it is awaited


@dataclass(frozen=True)
class _Batch(Generic[W, R]):
    calls: Sequence[Waiting[W]]
    inboxes: Sequence[_Inbox[R]]


class ComputeThread(Generic[W, R]):
    """Runs what its queue says is next. Started and closed by the thread that owns the peer.

    `run_batch` gets the works of calls that run together, and a way to ask whether more backwards follow at once. It
    gives the parts of their answers; each goes to its caller as soon as it is there.
    """

    def __init__(
        self,
        run_batch: Callable[[Sequence[W], Callable[[], bool]], Iterable[Part[R]]],
        queue: CallQueue[W],
    ) -> None:
        self._run_batch = run_batch
        self._queue = queue
        self._inboxes: dict[Waiting[W], _Inbox[R]] = {}
        """Of the calls that wait or run."""
        self._errands: deque[_Errand[Any]] = deque()
        self._wake = threading.Condition()
        """Guards all of these."""
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="swarmoe-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def trips_per_s(self) -> float | None:
        """See `CallQueue`. Readable from any thread."""
        return self._queue.trips_per_s

    @property
    def queued_rows(self) -> int:
        return self._queue.num_rows

    def check(self, call: Waiting[W]) -> None:
        """Would this call be let in now? Raises Declined, or ComputeThreadStopped."""
        with self._wake:
            self._raise_if_stopping()
            self._queue.check(call, now_s=time.monotonic())

    async def submit(self, call: Waiting[W]) -> AsyncGenerator[R]:
        """Queue a call and give its answer, part by part.

        A caller that gives up does not stop work already begun. Raises what `run_batch` answered for this call,
        Declined when there is no room or no time for it, or ComputeThreadStopped.
        """
        inbox = _Inbox[R]()
        with self._wake:
            self._raise_if_stopping()
            for other in self._queue.offer(call, now_s=time.monotonic()):
                self._inboxes[other].put(Declined("more is asked of this peer than it can do; try later"))
            self._inboxes[call] = inbox
            self._wake.notify()
        try:
            result, is_last = await self._begin(call, inbox)
            yield result
            while not is_last:
                result, is_last = await inbox.get()
                yield result
        finally:
            with self._wake:
                self._queue.withdraw(call)
                del self._inboxes[call]

    async def run(self, action: Callable[[], T]) -> T:
        """Have the thread do this before it takes the next calls. Raises what it raises, or ComputeThreadStopped."""
        errand = _Errand(action, _Inbox[T]())
        with self._wake:
            self._raise_if_stopping()
            self._errands.append(errand)
            self._wake.notify()
        result, _ = await errand.inbox.get()
        return result

    def close(self, *, timeout_s: float) -> bool:
        """Finish the batch in hand, refuse the rest. False when it did not end in time. Blocks; not for the loop."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise ComputeThreadStopped

    async def _begin(self, call: Waiting[W], inbox: _Inbox[R]) -> tuple[R, bool]:
        """The first part; or Declined, as soon as it is too late to begin or what was begun takes too long.

        Whoever is declined knows where it stands; whoever hears nothing by its deadline suspects the peer.
        """
        now_s = time.monotonic()
        left_s = call.deadline_s - now_s
        try:
            async with asyncio.timeout(max(0.0, self._queue.start_by_s(call, now_s=now_s) - now_s)):
                return await inbox.get()
        except TimeoutError:
            with self._wake:
                if self._queue.withdraw(call):
                    raise Declined("its turn would come too late for its deadline; try later") from None
        try:
            async with asyncio.timeout(max(0.0, call.deadline_s - _LAST_WORD_SHARE * left_s - time.monotonic())):
                return await inbox.get()
        except TimeoutError:
            raise Declined("it takes longer than it has; try later, or with fewer rows") from None

    def _main(self) -> None:
        while (work := self._next()) is not None:
            work.run() if isinstance(work, _Errand) else self._run(work)
        with self._wake:
            for errand in self._errands:
                errand.inbox.put(ComputeThreadStopped())
            while calls := self._queue.pop_together():
                for call in calls:
                    self._inboxes[call].put(ComputeThreadStopped())

    def _next(self) -> _Errand[Any] | _Batch[W, R] | None:
        with self._wake:
            while not self._stopping:
                if self._errands:
                    return self._errands.popleft()
                if calls := self._queue.pop_together():
                    return _Batch(calls, [self._inboxes[call] for call in calls])
                self._wake.wait()
            return None

    def _run(self, batch: _Batch[W, R]) -> None:
        unanswered = dict(enumerate(batch.inboxes))
        started_s = time.monotonic()
        failure: Exception = RuntimeError("the call was left without an answer")
        try:
            for part in self._run_batch([call.work for call in batch.calls], self._more_backwards):
                unanswered[part.position].put(part.result, is_last=part.is_last)
                if part.is_last:
                    del unanswered[part.position]
        except Exception as error:  # the top of a compute thread: one bad batch must not end the peer
            # As text: a renderer that is handed the exception may print its frames' tensors, which takes seconds.
            log.error("compute.failed", calls=len(batch.calls), exception=traceback.format_exc())  # noqa: TRY400
            failure = error
        for inbox in unanswered.values():
            inbox.put(failure)
        num_rows = sum(call.num_rows for call in batch.calls)
        with self._wake:
            self._queue.took(batch.calls[0].lane, num_rows, time.monotonic() - started_s)

    def _more_backwards(self) -> bool:
        with self._wake:
            return self._queue.more_backwards()
