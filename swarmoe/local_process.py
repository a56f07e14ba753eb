"""One of our commands as a child process: started, read line by line, ended. Knows nothing of what the lines mean."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Self

_PR_SET_PDEATHSIG = 1
_LINE_LIMIT_BYTES = 1 << 20

OnLine = Callable[[str, bool], None]
"""A line, and whether it came on stdout."""


class Child:
    """A running command. Belongs to one event loop; `run` must be awaited until it ends."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(cls, name: str, arguments: Sequence[str]) -> Self:
        """Start `swarmoe ARGUMENTS`. It gets SIGTERM should this process vanish, and no Ctrl+C from the terminal."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "swarmoe",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT_BYTES,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"},
            preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
        )
        return cls(name, process)

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def run(self, on_line: OnLine) -> int:
        """Hand on every line until the process ends; its exit code (negative: the signal that killed it)."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_read(self._process.stdout, on_line, is_stdout=True))
            tasks.create_task(_read(self._process.stderr, on_line, is_stdout=False))
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if not self.has_ended:
            self._process.kill()

    def terminate(self) -> None:
        """Ask it to leave in good order."""
        if not self.has_ended:
            self._process.terminate()

    async def wait(self) -> int:
        return await self._process.wait()


async def _read(stream: asyncio.StreamReader, on_line: OnLine, *, is_stdout: bool) -> None:
    while line := await stream.readline():
        on_line(line.decode(errors="replace").rstrip("\n"), is_stdout)


def _end_with_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded before the fork: nothing may be imported or allocated after it

    def ask_the_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask_the_kernel
