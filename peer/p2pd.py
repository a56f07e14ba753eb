"""The Go daemon under hivemind's DHT, started by us so that it cannot outlive us. Knows no DHT record.

`hivemind.P2P.create` starts the same binary, but leaves it running when its parent is killed, gives up when one of
several first addresses is dead for long, and turns on relaying and port mapping that we do without.
"""

import asyncio
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from peer.errors import CouldNotListen

CONTROL_SOCKET = "p2pd.sock"
_PR_SET_PDEATHSIG = 1
_READY = b"Peer ID:"
_KEPT_LINES = 20


class P2pDaemon:
    """A running p2pd. Belongs to the event loop of the main thread: the kernel ties it to the thread that starts it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)

    @classmethod
    async def start(
        cls,
        binary: Path,
        socket_dir: Path,
        *,
        listen_maddr: str,
        announce_maddr: str | None,
        timeout_s: float,
    ) -> Self:
        """Listen on one multiaddress. Raises CouldNotListen with what the daemon said."""
        announce = [f"-announceAddrs={announce_maddr}"] if announce_maddr is not None else []
        process = await asyncio.create_subprocess_exec(
            str(binary),
            f"-listen=/unix{socket_dir / CONTROL_SOCKET}",
            f"-hostAddrs={listen_maddr}",
            *announce,
            "-dhtServer=1",
            "-connManager=1",
            "-natPortMap=0",
            "-autonat=0",
            "-relay=0",
            "-idleTimeout=30s",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"GOLOG_LOG_LEVEL": "error"},
            preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
        )
        daemon = cls(process)
        try:
            async with asyncio.timeout(timeout_s):
                ready = await daemon._read_until_ready()
        except TimeoutError:
            ready = False
        if not ready:
            await daemon.stop(grace_s=0.0)
            said = next((line for line in reversed(daemon._last_lines) if line), f"nothing in {timeout_s:.0f} s")
            raise CouldNotListen(f"the DHT cannot listen on {listen_maddr}: {said}")
        return daemon

    async def ended(self) -> str:
        """Wait for its end, which is never expected; the last thing it said."""
        while line := await self._read_line():
            self._last_lines.append(line.decode(errors="replace").strip())
        await self._process.wait()
        return self._last_lines[-1] if self._last_lines else ""

    async def stop(self, *, grace_s: float) -> None:
        """End it, gently for `grace_s`. Idempotent."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _read_until_ready(self) -> bool:
        while line := await self._read_line():
            if line.startswith(_READY):
                return True
            self._last_lines.append(line.decode(errors="replace").strip())
        return False

    async def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        try:
            return await self._process.stdout.readline()
        except ValueError:  # a line longer than the stream's buffer; dropped
            return b"\n"


def _die_with_parent() -> Callable[[], None]:
    """A hook for the forked child: ask the kernel for SIGKILL when our main thread ends, however it ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # resolved here: no import lock is taken between fork and exec
    parent_pid = os.getpid()

    def hook() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended between fork and prctl
            os._exit(1)

    return hook
