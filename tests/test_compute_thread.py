"""The compute thread: calls in, parts of answers out, what fails, what is too late, the end."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from structlog.testing import capture_logs

from peer.call_queue import CallQueue, Declined, Lane, Waiting
from peer.compute_thread import ComputeThread, ComputeThreadStopped, Part


def call(work: str, *, caller: str = "anne", num_rows: int = 1, score: float = 0.0, timeout_s: float = 60.0):
    deadline_s = time.monotonic() + timeout_s
    return Waiting(work, caller, Lane.FORWARD, num_rows, 0, deadline_s=deadline_s, score=score, runs_together=True)


def shout(works: Sequence[str], _: Callable[[], bool]) -> Iterator[Part[str]]:
    for position, work in enumerate(works):
        yield Part(position, ValueError("not this one") if work == "bad" else work.upper())


def thread_of(run_batch=shout, *, max_rows: int = 100) -> ComputeThread[str, str]:
    return ComputeThread(run_batch, CallQueue(max_rows=max_rows, max_bytes=1))


@pytest.fixture
def thread() -> Iterator[ComputeThread[str, str]]:
    thread = thread_of()
    thread.start()
    yield thread
    assert thread.close(timeout_s=5.0)


async def ask(thread: ComputeThread[str, str], waiting: Waiting[str]) -> list[str]:
    return [part async for part in thread.submit(waiting)]


def asking(thread: ComputeThread[str, str], waiting: Waiting[str]) -> "asyncio.Future[list[str]]":
    return asyncio.ensure_future(ask(thread, waiting))


class Busy:
    """Keeps a thread at an errand until it is left: what is asked meanwhile waits."""

    def __init__(self, thread: ComputeThread[str, str]) -> None:
        self._thread = thread
        self._entered, self._go_on = threading.Event(), threading.Event()

    def _work(self) -> None:
        self._entered.set()
        self._go_on.wait(10.0)

    async def __aenter__(self) -> None:
        self._working = asyncio.ensure_future(self._thread.run(self._work))
        await asyncio.to_thread(self._entered.wait, 10.0)

    async def __aexit__(self, *_: object) -> None:
        self._go_on.set()
        await self._working


async def test_every_caller_gets_its_own_answer(thread: ComputeThread[str, str]) -> None:
    answers = await asyncio.gather(*(ask(thread, call(work)) for work in "abc"))

    assert answers == [["A"], ["B"], ["C"]]


async def test_one_refused_call_does_not_touch_the_others(thread: ComputeThread[str, str]) -> None:
    async with Busy(thread):
        asked = [asking(thread, call(work)) for work in ("a", "bad", "b")]
        await asyncio.sleep(0)  # one turn of the loop: all have queued

    first, refused, last = await asyncio.gather(*asked, return_exceptions=True)

    assert (first, last) == (["A"], ["B"])
    assert isinstance(refused, ValueError)


async def test_a_batch_that_raises_fails_its_callers_and_the_thread_goes_on() -> None:
    def fail_first(works: Sequence[str], more: Callable[[], bool]) -> Iterator[Part[str]]:
        if "unlucky" in works:
            raise RuntimeError("the device is unhappy")
        yield from shout(works, more)

    thread = thread_of(fail_first)
    thread.start()

    with pytest.raises(RuntimeError, match="unhappy"):
        await ask(thread, call("unlucky"))

    assert await ask(thread, call("good")) == ["GOOD"]
    assert thread.close(timeout_s=5.0)


async def test_a_failure_is_logged_as_text_so_that_no_renderer_prints_the_tensors_in_its_frames() -> None:
    def fail(works: Sequence[str], _: Callable[[], bool]) -> Iterator[Part[str]]:
        yield from (Part(0, str(1 // 0)) for _ in works)

    thread = thread_of(fail)
    thread.start()
    with capture_logs() as events, pytest.raises(ZeroDivisionError):
        await ask(thread, call("a"))

    (event,) = events
    assert event["event"] == "compute.failed"
    assert "in fail" in event["exception"]
    assert "exc_info" not in event
    assert thread.close(timeout_s=5.0)


async def test_callers_left_without_an_answer_are_told() -> None:
    thread = thread_of(lambda works, _: [Part(0, works[0])])
    thread.start()
    async with Busy(thread):
        answered, left = asking(thread, call("a")), asking(thread, call("b"))
        await asyncio.sleep(0)

    assert await answered == ["a"]
    with pytest.raises(RuntimeError, match="left without an answer"):
        await left
    assert thread.close(timeout_s=5.0)


async def test_what_comes_while_the_device_is_busy_runs_together() -> None:
    batches: list[list[str]] = []

    def run_batch(works: Sequence[str], more: Callable[[], bool]) -> Iterator[Part[str]]:
        batches.append(list(works))
        yield from shout(works, more)

    thread = thread_of(run_batch)
    thread.start()
    async with Busy(thread):
        asked = [asking(thread, call(work)) for work in "ab"]
        await asyncio.sleep(0)
        assert thread.queued_rows == 2

    await asyncio.gather(*asked)

    assert batches == [["a", "b"]]
    assert thread.close(timeout_s=5.0)


async def test_a_part_of_an_answer_does_not_wait_for_the_rest() -> None:
    first_is_home = threading.Event()

    def run_batch(works: Sequence[str], _: Callable[[], bool]) -> Iterator[Part[str]]:
        yield Part(0, "first", is_last=False)
        assert first_is_home.wait(5.0), "the first part was kept back"
        yield Part(0, "second")

    thread = thread_of(run_batch)
    thread.start()
    parts = thread.submit(call("a"))

    assert await anext(parts) == "first"
    first_is_home.set()
    assert [part async for part in parts] == ["second"]
    assert thread.close(timeout_s=5.0)


async def test_an_errand_is_run_before_the_next_calls_and_raises_where_it_is_awaited(
    thread: ComputeThread[str, str],
) -> None:
    async with Busy(thread):
        waiting = asking(thread, call("a"))
        await asyncio.sleep(0)
        errand = asyncio.ensure_future(thread.run(lambda: waiting.done()))
        failing = asyncio.ensure_future(thread.run(lambda: int("x")))
        await asyncio.sleep(0)

    assert not await errand
    with pytest.raises(ValueError, match="invalid literal"):
        await failing
    assert await waiting == ["A"]


async def test_a_stopped_thread_refuses_calls_and_errands() -> None:
    thread = thread_of()
    thread.start()
    assert thread.close(timeout_s=5.0)

    for refused in (ask(thread, call("a")), thread.run(int)):
        with pytest.raises(ComputeThreadStopped):
            await refused
    with pytest.raises(ComputeThreadStopped):
        thread.check(call("a"))


async def test_closing_refuses_what_waits() -> None:
    thread = thread_of()
    thread.start()
    async with Busy(thread):
        waiting = [asking(thread, call("a")), asyncio.ensure_future(thread.run(int))]
        await asyncio.sleep(0)
        assert not thread.close(timeout_s=0.0)

    for refused in waiting:
        with pytest.raises(ComputeThreadStopped):
            await refused
    assert await asyncio.to_thread(thread.close, timeout_s=5.0)


async def test_a_caller_that_gives_up_takes_its_call_out_of_the_queue(thread: ComputeThread[str, str]) -> None:
    async with Busy(thread):
        given_up, other = asking(thread, call("a")), asking(thread, call("b", num_rows=2))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert thread.queued_rows == 2

    assert await other == ["B"]


async def test_a_call_whose_turn_comes_too_late_is_declined_before_its_deadline(
    thread: ComputeThread[str, str],
) -> None:
    async with Busy(thread):
        late = call("a", timeout_s=0.1)

        with pytest.raises(Declined, match="too late"):
            await ask(thread, late)

        assert time.monotonic() < late.deadline_s
        assert thread.queued_rows == 0


async def test_a_call_that_takes_longer_than_it_has_is_declined_before_its_deadline() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def run_batch(works: Sequence[str], more: Callable[[], bool]) -> Iterator[Part[str]]:
        begun.set()
        go_on.wait(5.0)
        yield from shout(works, more)

    thread = thread_of(run_batch)
    thread.start()
    slow = call("a", timeout_s=0.2)

    with pytest.raises(Declined, match="longer than it has"):
        await ask(thread, slow)

    assert begun.is_set()
    assert time.monotonic() < slow.deadline_s
    go_on.set()
    assert await ask(thread, call("b")) == ["B"]
    assert thread.close(timeout_s=5.0)


async def test_a_call_that_had_to_make_room_is_declined_and_who_made_it_is_answered() -> None:
    thread = thread_of(max_rows=2)
    thread.start()
    async with Busy(thread):
        low, high = (asking(thread, call(work, score=score)) for work, score in (("low", 0.1), ("high", 0.9)))
        await asyncio.sleep(0)
        better = asking(thread, call("better", score=0.5))

        with pytest.raises(Declined, match="more is asked"):
            await low

    assert await asyncio.gather(high, better) == [["HIGH"], ["BETTER"]]
    assert thread.close(timeout_s=5.0)
