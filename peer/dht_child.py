"""The parent's handle on one life of the DHT process: spawn it, ask it, see it end, leave nothing of it behind.

Knows no restart (`supervisor` does) and no record.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import structlog

from peer.dht_frames import Frame, encode_frame, read_frame
from peer.errors import CouldNotJoin, CouldNotListen, RecordsUnavailable, SwarmError

log = structlog.get_logger()

SOCKET_DIR_PREFIX = "swarmoe-dht-"
SOCKET_ROOT = "/tmp"
"""Not TMPDIR: the path of a Unix socket may have 107 bytes."""
_KEPT_LINES = 20
_ERRORS: dict[str, Callable[[str], SwarmError]] = {
    "CouldNotJoin": CouldNotJoin,
    "CouldNotListen": CouldNotListen,
    "Failed": RecordsUnavailable,
}


class DhtChild:
    """One process. `spawn` from any thread before there is a loop; everything else belongs to the loop of `run`."""

    def __init__(self, process: subprocess.Popen[bytes], parent_end: socket.socket, socket_dir: Path) -> None:
        self._process = process
        self._parent_end = parent_end
        self._socket_dir = socket_dir
        self._writer: asyncio.StreamWriter | None = None  # None until attached
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.is_running = True
        self._is_leaving = False
        """Nothing can be said to it any more."""

    @classmethod
    def spawn(cls) -> Self:
        """Start it; it imports hivemind while the caller goes on."""
        socket_dir = Path(tempfile.mkdtemp(prefix=SOCKET_DIR_PREFIX, dir=SOCKET_ROOT))
        parent_end, child_end = socket.socketpair()
        with child_end:
            process = subprocess.Popen(
                [sys.executable, "-m", "peer.dht_process", str(socket_dir)],
                stdin=child_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl+C is for us, and its process group is ours to kill
                env=os.environ | {"HIVEMIND_LOGLEVEL": "ERROR", "HIVEMIND_COLORS": "0"},
            )
        return cls(process, parent_end, socket_dir)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def attach(self) -> None:
        """Move onto the running loop. Before `run`; requests may be sent from here on."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._parent_end)

    async def run(self) -> str:
        """Carry its answers until it ends; what it said last. Nothing of it is left then. Cancel it to kill it."""
        assert self._writer is not None, "attach comes first"
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_stderr())
                while (reply := await read_frame(self._reader)) is not None:
                    self._settle(reply)
                self._writer.close()
        finally:
            self._writer.close()
            self.dispose()
            self._fail_pending()
        return self._said()

    async def request(self, verb: str, *, timeout_s: float, **fields: Any) -> Any:
        """Ask and wait. Raises RecordsUnavailable when no answer comes in time, CouldNotJoin, CouldNotListen."""
        if not self.is_running or self._writer is None or self._is_leaving:
            raise RecordsUnavailable("the DHT process is not running")
        self._next_id += 1
        request: Frame = {"id": self._next_id, "verb": verb, **fields}
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[self._next_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(encode_frame(request))
                return await answer
        except TimeoutError:
            raise RecordsUnavailable(f"the DHT process did not answer {verb} in {timeout_s:g} s") from None
        finally:
            self._pending.pop(request["id"], None)

    def hang_up(self) -> None:
        """Let it end by itself: to it, the end of our side of the socket pair is the end of us."""
        self._is_leaving = True
        if self._writer is not None and self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    def kill(self) -> None:
        """End its whole group now; `run` returns soon after. Idempotent."""
        if self.is_running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own

    def dispose(self) -> None:
        """Kill, reap, remove its folder. Takes milliseconds. Idempotent."""
        if not self.is_running:
            return
        self.kill()
        self.is_running = False
        self._process.wait()
        if self._writer is None:
            self._parent_end.close()
        assert self._process.stderr is not None
        self._process.stderr.close()
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _settle(self, reply: Frame) -> None:
        answer = self._pending.pop(reply["id"], None)
        if answer is None or answer.done():
            return  # asked for too long ago
        if "error" in reply:
            answer.set_exception(_ERRORS[reply["error"]](reply["message"]))
        else:
            answer.set_result(reply["result"])

    def _fail_pending(self) -> None:
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(RecordsUnavailable(f"the DHT process ended; it said: {self._said()}"))

    def _said(self) -> str:
        return self._last_lines[-1] if self._last_lines else "nothing"

    async def _read_stderr(self) -> None:
        lines = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), self._process.stderr
        )
        try:
            while line := await _read_line(lines):
                self._last_lines.append(line.decode(errors="replace").rstrip())
                log.debug("dht.process_said", line=self._last_lines[-1])
        finally:
            transport.close()


async def _read_line(lines: asyncio.StreamReader) -> bytes:
    """One line; empty at the end. Of one that is absurdly long, only that it was there."""
    try:
        return await lines.readline()
    except ValueError:
        return b"\n"
