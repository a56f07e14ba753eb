"""The bridge blocks as long as it was told to, cancels what it gives up on, and never waits for itself."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import uvloop

from peer.event_loop import EventLoopThread, Talk


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    with EventLoopThread() as loop:
        yield loop


async def _double(number: int) -> int:
    return 2 * number


async def _fail() -> None:
    raise KeyError("as it was raised")


async def _where() -> tuple[str, type[asyncio.AbstractEventLoop]]:
    return threading.current_thread().name, type(asyncio.get_running_loop())


def test_a_result_and_an_exception_come_back_to_the_calling_thread(loop: EventLoopThread) -> None:
    assert loop.run(_double(21), timeout_s=5) == 42
    with pytest.raises(KeyError, match="as it was raised"):
        loop.run(_fail(), timeout_s=5)


def test_coroutines_run_on_the_loops_own_thread_on_uvloop(loop: EventLoopThread) -> None:
    assert loop.run(_where(), timeout_s=None) == ("event-loop", uvloop.Loop)


def test_what_takes_too_long_is_cancelled_and_the_caller_goes_on(loop: EventLoopThread) -> None:
    cancelled = threading.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        loop.run(hang(), timeout_s=0.05)

    assert cancelled.wait(2)
    assert loop.run(_double(1), timeout_s=5) == 2


def test_a_timeout_of_the_coroutines_own_is_its_result(loop: EventLoopThread) -> None:
    async def give_up() -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        loop.run(give_up(), timeout_s=5)


def test_what_coroutines_tell_is_heard_while_they_still_run(loop: EventLoopThread) -> None:
    go_on = {name: threading.Event() for name in "ab"}

    def talk(name: str) -> Talk[str]:
        async def say(tell: Callable[[str], None]) -> None:
            tell(f"{name} begins")
            await asyncio.to_thread(go_on[name].wait, 5)
            tell(f"{name} ends")

        return say

    heard = loop.listen([talk("a"), talk("b")], timeout_s=5)

    assert {next(heard), next(heard)} == {"a begins", "b begins"}
    go_on["b"].set()
    assert next(heard) == "b ends"
    go_on["a"].set()
    assert list(heard) == ["a ends"]


def test_a_coroutine_starts_before_the_next_one_is_asked_for(loop: EventLoopThread) -> None:
    begun = threading.Event()

    async def begin(tell: Callable[[bool], None]) -> None:
        begun.set()

    async def note(tell: Callable[[bool], None]) -> None:
        tell(True)

    def talks() -> Iterator[Talk[bool]]:
        yield begin
        assert begun.wait(5)
        yield note

    assert list(loop.listen(talks(), timeout_s=5)) == [True]


def test_what_a_coroutine_raises_ends_the_listening_and_the_others(loop: EventLoopThread) -> None:
    cancelled = threading.Event()

    async def hang(tell: Callable[[str], None]) -> None:
        tell("begun")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def fail(tell: Callable[[str], None]) -> None:
        raise KeyError("as it was raised")

    def talks() -> Iterator[Talk[str]]:
        yield hang
        yield fail

    heard = loop.listen(talks(), timeout_s=5)
    assert next(heard) == "begun"
    with pytest.raises(KeyError, match="as it was raised"):
        next(heard)

    assert cancelled.wait(2)


@pytest.mark.parametrize("leaves_early", [True, False])
def test_listening_ends_at_its_timeout_or_when_nobody_listens_and_cancels_the_rest(
    loop: EventLoopThread, leaves_early: bool
) -> None:
    cancelled = threading.Event()

    async def hang(tell: Callable[[str], None]) -> None:
        tell("begun")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    heard = loop.listen([hang], timeout_s=5 if leaves_early else 0.05)
    assert next(heard) == "begun"
    if leaves_early:
        heard.close()
    else:
        with pytest.raises(TimeoutError):
            next(heard)

    assert cancelled.wait(2)


def test_the_loop_refuses_to_wait_for_itself(loop: EventLoopThread) -> None:
    async def wait_for_myself() -> None:
        loop.run(_double(1), timeout_s=1)

    with pytest.raises(RuntimeError, match="another thread than the loop's"):
        loop.run(wait_for_myself(), timeout_s=5)


def test_call_soon_returns_at_once_and_runs_on_the_loop(loop: EventLoopThread) -> None:
    names: list[str] = []
    ran = threading.Event()

    loop.call_soon(lambda: (names.append(threading.current_thread().name), ran.set()))

    assert ran.wait(2)
    assert names == ["event-loop"]


def test_closing_cancels_and_awaits_what_still_runs() -> None:
    ended = threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    async def begin() -> None:
        tasks.append(asyncio.create_task(hang()))
        await asyncio.sleep(0)

    loop = EventLoopThread().start()
    loop.run(begin(), timeout_s=5)

    assert loop.close()
    assert ended.is_set()
    assert loop.close(), "closing twice is fine"


def test_a_loop_that_does_not_run_refuses_work() -> None:
    never_started = EventLoopThread()
    with pytest.raises(RuntimeError, match="between start"):
        never_started.run(_double(1), timeout_s=1)
    never_started.close()

    closed = EventLoopThread().start()
    closed.close()
    with pytest.raises(RuntimeError, match="between start"):
        closed.run(_double(1), timeout_s=1)


def test_a_task_that_ignores_its_cancellation_cannot_hold_up_the_close() -> None:
    may_end = threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def stubborn() -> None:
        while not may_end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    async def begin() -> None:
        tasks.append(asyncio.create_task(stubborn()))
        await asyncio.sleep(0)

    loop = EventLoopThread().start()
    loop.run(begin(), timeout_s=5)

    assert not loop.close(timeout_s=0.05)
    may_end.set()
    assert loop.close(timeout_s=5)


def test_ctrl_c_ends_a_wait_without_end() -> None:
    program = """
import asyncio, os, signal, threading
from peer.event_loop import EventLoopThread, Talk

async def wait_for_ever():
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.Event().wait()

with EventLoopThread() as loop:
    try:
        loop.run(wait_for_ever(), timeout_s=None)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)

    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr
