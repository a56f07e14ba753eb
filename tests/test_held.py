"""A context on the event loop, held open by a thread that is not on it."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from peer.event_loop import EventLoopThread
from peer.held import Held
from peer.signals import StopRequest


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    with EventLoopThread() as loop:
        yield loop
        assert loop.run(_num_tasks(), timeout_s=5.0) == 1  # the one that counts


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


class Door:
    """A context that says what happens to it, and does what it is told."""

    def __init__(
        self,
        *,
        opening: Callable[[], object] | None = None,
        inside: Callable[[], object] | None = None,
        leaving: Callable[[], object] | None = None,
    ) -> None:
        self.opening, self.inside, self.leaving = opening, inside, leaving
        self.steps: list[str] = []
        self.is_opening, self.is_open = threading.Event(), threading.Event()

    @asynccontextmanager
    async def context(self) -> AsyncGenerator[str]:
        self.steps.append("opening")
        self.is_opening.set()
        try:
            await self._do(self.opening)
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(self._do(self.inside))
                self.is_open.set()
                yield "value"
                task.cancel()
            await self._do(self.leaving)
        finally:
            self.steps.append("left")

    async def _do(self, action: Callable[[], object] | None) -> None:
        if action is not None:
            result = action()
            if asyncio.iscoroutine(result):
                await result


def for_ever() -> object:
    return asyncio.Event().wait()


def fail() -> object:
    raise ValueError("it broke")


def held(loop: EventLoopThread, door: Door, *, leave_timeout_s: float = 5.0) -> Held[str]:
    return Held(loop, door.context(), leave_timeout_s=leave_timeout_s)


def test_it_is_open_until_it_is_closed(loop: EventLoopThread) -> None:
    door = Door(inside=for_ever)
    holding = held(loop, door)

    assert holding.open() == "value"
    assert door.steps == ["opening"]
    holding.close()

    assert door.steps == ["opening", "left"]


def test_closing_twice_is_closing_once(loop: EventLoopThread) -> None:
    door = Door()
    holding = held(loop, door)
    holding.open()

    holding.close()
    holding.close()

    assert door.steps == ["opening", "left"]


def test_what_keeps_it_from_opening_is_raised_where_it_is_opened(loop: EventLoopThread) -> None:
    door = Door(opening=fail)

    with pytest.raises(ValueError, match="it broke"):
        held(loop, door).open()

    assert door.steps == ["opening", "left"]


def test_a_stop_while_it_opens_closes_what_is_half_open(loop: EventLoopThread) -> None:
    door, stop, opened = Door(opening=for_ever), StopRequest(), []
    holding = held(loop, door)
    opening = threading.Thread(target=lambda: opened.append(holding.open(stop)))
    opening.start()
    assert door.is_opening.wait(5.0)

    stop.request("SIGTERM")
    opening.join(5.0)

    assert opened == [None]
    assert door.steps == ["opening", "left"]


def test_a_stop_that_was_asked_for_before_it_opens_is_no_different(loop: EventLoopThread) -> None:
    door, stop = Door(opening=for_ever), StopRequest()
    stop.request("SIGTERM")

    assert held(loop, door).until_stopped(stop, on_open=print) == "SIGTERM"

    assert door.steps == ["opening", "left"]  # whatever its opener had started is over


def test_what_opens_at_once_is_left_properly_by_a_stop_from_before(loop: EventLoopThread) -> None:
    door, stop = Door(), StopRequest()
    stop.request("SIGTERM")

    assert held(loop, door).until_stopped(stop, on_open=lambda _: None) == "SIGTERM"

    assert door.steps == ["opening", "left"]


def test_it_is_held_until_somebody_asks_to_stop(loop: EventLoopThread) -> None:
    door, stop = Door(inside=for_ever), StopRequest()
    values: list[str] = []

    def on_open(value: str) -> None:
        values.append(value)
        stop.request("SIGINT")

    reason = held(loop, door).until_stopped(stop, on_open=on_open)

    assert (reason, values) == ("SIGINT", ["value"])
    assert door.steps == ["opening", "left"]


def test_a_failure_inside_ends_the_holding_and_is_raised(loop: EventLoopThread) -> None:
    async def fail_when_open() -> None:
        await asyncio.sleep(0)  # one turn of the loop: it is open by then
        raise ValueError("it broke")

    door, stop = Door(inside=fail_when_open), StopRequest()

    with pytest.raises(ValueError, match="it broke"):
        held(loop, door).until_stopped(stop, on_open=lambda _: None)

    assert door.steps == ["opening", "left"]


def test_a_failure_that_nobody_waited_for_is_raised_by_closing(loop: EventLoopThread) -> None:
    broken = threading.Event()

    async def fail_when_told() -> None:
        await asyncio.to_thread(broken.wait, 5.0)
        raise ValueError("it broke")

    door = Door(inside=fail_when_told)
    holding = held(loop, door)
    holding.open()
    broken.set()

    with pytest.raises(ValueError, match="it broke"):
        holding._ended.result(5.0)
    with pytest.raises(ValueError, match="it broke"):
        holding.close()

    assert door.steps == ["opening", "left"]


def test_a_failure_to_leave_is_raised_by_closing(loop: EventLoopThread) -> None:
    holding = held(loop, Door(leaving=fail))
    holding.open()

    with pytest.raises(ValueError, match="it broke"):
        holding.close()


def test_one_that_does_not_leave_in_time_is_given_up() -> None:
    door = Door(leaving=for_ever)
    with EventLoopThread() as loop:
        holding = held(loop, door, leave_timeout_s=0.01)
        holding.open()

        with pytest.raises(TimeoutError):
            holding.close()

    assert door.steps == ["opening", "left"]  # cancelled with the loop


def test_closing_from_elsewhere_ends_the_opening(loop: EventLoopThread) -> None:
    door = Door(opening=for_ever)
    holding = held(loop, door)
    raised: list[BaseException] = []

    def opens() -> None:
        try:
            holding.open()
        except asyncio.CancelledError as cancelled:
            raised.append(cancelled)

    opening = threading.Thread(target=opens)
    opening.start()
    assert door.is_opening.wait(5.0)

    holding.close()
    opening.join(5.0)

    assert len(raised) == 1
    assert door.steps == ["opening", "left"]
