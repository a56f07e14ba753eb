import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest

from peer.compute_thread import ComputeThread, ComputeThreadStopped


def double(works: Sequence[int]) -> list[int | Exception]:
    return [ValueError("thirteen") if work == 13 else 2 * work for work in works]


@pytest.fixture
def thread() -> Iterator[ComputeThread[int, int]]:
    thread = ComputeThread(double, max_tokens=100)
    thread.start()
    yield thread
    assert thread.close(timeout_s=5.0)


async def test_every_caller_gets_its_own_result(thread: ComputeThread[int, int]) -> None:
    results = await asyncio.gather(*(thread.submit(number, num_tokens=1) for number in range(5)))

    assert results == [0, 2, 4, 6, 8]


async def test_one_refused_work_does_not_touch_the_others(thread: ComputeThread[int, int]) -> None:
    results = await asyncio.gather(*(thread.submit(n, num_tokens=1) for n in (1, 13, 2)), return_exceptions=True)

    assert results[0] == 2
    assert isinstance(results[1], ValueError)
    assert results[2] == 4


async def test_a_batch_that_raises_fails_its_callers_and_the_thread_goes_on() -> None:
    def fail_first(works: Sequence[str]) -> list[str | Exception]:
        if "bad" in works:
            raise RuntimeError("the device is unhappy")
        return list(works)

    thread: ComputeThread[str, str] = ComputeThread(fail_first, max_tokens=100)
    thread.start()

    with pytest.raises(RuntimeError, match="unhappy"):
        await thread.submit("bad", num_tokens=1)

    assert await thread.submit("good", num_tokens=1) == "good"
    assert thread.close(timeout_s=5.0)


async def test_what_comes_while_the_device_is_busy_is_one_batch() -> None:
    entered, go_on = threading.Event(), threading.Event()
    batches: list[list[str]] = []

    def run_batch(works: Sequence[str]) -> list[str | Exception]:
        batches.append(list(works))
        entered.set()
        go_on.wait(5.0)
        return list(works)

    thread: ComputeThread[str, str] = ComputeThread(run_batch, max_tokens=100)
    thread.start()
    first = asyncio.ensure_future(thread.submit("a", num_tokens=1))
    await asyncio.to_thread(entered.wait, 5.0)
    rest = [asyncio.ensure_future(thread.submit(name, num_tokens=1)) for name in "bc"]
    await asyncio.sleep(0)  # one turn of the loop: both have queued their work
    assert thread.queued_tokens == 2

    go_on.set()

    assert await asyncio.gather(first, *rest) == ["a", "b", "c"]
    assert batches == [["a"], ["b", "c"]]
    assert thread.close(timeout_s=5.0)


async def test_a_stopped_thread_refuses_work() -> None:
    thread: ComputeThread[int, int] = ComputeThread(double, max_tokens=100)
    thread.start()
    assert thread.close(timeout_s=5.0)

    with pytest.raises(ComputeThreadStopped):
        await thread.submit(1, num_tokens=1)


async def test_a_caller_that_gives_up_leaves_the_others_alone(thread: ComputeThread[int, int]) -> None:
    task = asyncio.ensure_future(thread.submit(1, num_tokens=1))
    await asyncio.sleep(0)
    task.cancel()

    assert await thread.submit(2, num_tokens=1) == 4
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_caller_that_gives_up_while_the_batch_is_put_together_does_not_shift_the_others(
    thread: ComputeThread[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class GivesUpAtTheSecondLook(asyncio.Future[int]):
        looks = 0

        def cancelled(self) -> bool:
            self.looks += 1
            return self.looks > 1

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "create_future", lambda: GivesUpAtTheSecondLook(loop=loop))

    first, second = await asyncio.gather(*(thread.submit(number, num_tokens=1) for number in (1, 2)))

    assert (first, second) == (2, 4)


async def test_a_result_does_not_wait_for_the_rest_of_its_batch() -> None:
    first_is_home, batches = threading.Event(), list[list[str]]()

    def run_batch(works: Sequence[str]) -> Iterator[str | Exception]:
        batches.append(list(works))
        for work in works:
            if work == "second":
                assert first_is_home.wait(5.0), "the first result was kept back"
            yield work

    thread: ComputeThread[str, str] = ComputeThread(run_batch, max_tokens=100)
    first, second = (asyncio.ensure_future(thread.submit(work, num_tokens=1)) for work in ("first", "second"))
    await asyncio.sleep(0)  # one turn of the loop: both are queued before the thread begins
    thread.start()

    assert await first == "first"
    first_is_home.set()
    assert await second == "second"
    assert batches == [["first", "second"]]
    assert thread.close(timeout_s=5.0)


async def test_callers_left_without_a_result_are_told() -> None:
    thread: ComputeThread[str, str] = ComputeThread(lambda works: works[:1], max_tokens=100)
    answered, left = (asyncio.ensure_future(thread.submit(work, num_tokens=1)) for work in ("a", "b"))
    await asyncio.sleep(0)
    thread.start()

    assert await answered == "a"
    with pytest.raises(ValueError, match="shorter"):
        await left
    assert thread.close(timeout_s=5.0)
