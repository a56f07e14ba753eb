"""The process that runs this member's DHT node: `python -m peer.dht_process SOCKET_FOLDER`, its parent on stdin.

A process of its own keeps hivemind's modules, threads and signals away from gRPC and training. It lives as long as its
parent: when the socket pair on stdin closes, whatever killed the parent, it ends the Go daemon, removes its folder and
exits within 2 s. Knows nothing of what the records say, and is never imported by another module.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from experts.uid import RunId
from peer.bare_hivemind import P2PD_PATH
from peer.dht_frames import Frame, encode_frame, read_frame
from peer.dht_guard import RecordGuard
from peer.dht_node import Node
from peer.errors import CouldNotJoin, CouldNotListen
from peer.p2pd import P2pDaemon
from peer.record_keys import RecordKeys

_LISTEN_TIMEOUT_S = 15.0
_EXIT_WITHIN_S = 2
_GRACE_S = 0.5


class _Stopped(Exception):
    """Ends the session's task group: the parent is gone, or asked for it."""


class DhtSession:
    """Serves one parent. Requests carry an id and are answered as they finish, in any order."""

    def __init__(self, socket_dir: Path, writer: asyncio.StreamWriter) -> None:
        self._socket_dir = socket_dir
        self._writer = writer
        self._stopped = asyncio.Event()
        self._daemon: P2pDaemon | None = None
        self._node: Node | None = None
        self._verbs: dict[str, Callable[[Frame], Awaitable[Any]]] = {
            "join": self._join,
            "store": self._store,
            "get": self._get,
            "status": self._status,
        }

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Until the parent is gone, SIGTERM comes, or the Go daemon ends."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopped.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_requests(reader, tasks))
                await self._stopped.wait()
                signal.alarm(_EXIT_WITHIN_S)  # for whatever hangs from here on; the Go daemon then dies with us
                raise _Stopped  # noqa: TRY301 - the way to end a task group
        except* _Stopped:
            pass
        await self._shut_down()

    async def _read_requests(self, reader: asyncio.StreamReader, tasks: asyncio.TaskGroup) -> None:
        while (request := await read_frame(reader)) is not None:
            if request["verb"] == "listen":
                tasks.create_task(self._answer(request, self._listen(request, tasks)))
            else:
                tasks.create_task(self._answer(request, self._verbs[request["verb"]](request)))
        self._stopped.set()

    async def _answer(self, request: Frame, work: Awaitable[Any]) -> None:
        try:
            reply: Frame = {"id": request["id"], "result": await work}
        except (CouldNotJoin, CouldNotListen) as error:
            reply = {"id": request["id"], "error": type(error).__name__, "message": str(error)}
        except Exception as error:  # a servicer's edge: hivemind may raise anything, and our parent has to hear of it
            reply = {"id": request["id"], "error": "Failed", "message": f"{type(error).__name__}: {error}"}
        with suppress(ConnectionError):  # the parent is gone; the reader sees it too
            self._writer.write(encode_frame(reply))
            await self._writer.drain()

    async def _listen(self, request: Frame, tasks: asyncio.TaskGroup) -> Frame:
        self._daemon = await P2pDaemon.start(
            P2PD_PATH,
            self._socket_dir,
            listen_maddr=request["listen_maddr"],
            announce_maddr=request["announce_maddr"],
            timeout_s=_LISTEN_TIMEOUT_S,
        )
        tasks.create_task(self._end_with(self._daemon))
        run_id = RunId(request["run_id"])
        keys = RecordKeys(run_id, num_experts=request["num_experts"])
        self._node = await Node.start(self._socket_dir, RecordGuard(run_id, keys, time.time))
        return await self._status(request)

    async def _join(self, request: Frame) -> None:
        num_joined, reasons = await self._listening.join(request["addresses"])
        if not num_joined:
            raise CouldNotJoin(f"no DHT node lets us in: {'; '.join(reasons) or 'no address but our own'}")

    async def _store(self, request: Frame) -> bool:
        return await self._listening.store(
            request["key"], request["subkey"], request["value"], request["expires_at_unix_s"]
        )

    async def _get(self, request: Frame) -> list[tuple[str, bytes, float]]:
        return await self._listening.get(request["keys"])

    async def _status(self, request: Frame) -> Frame:
        node = self._listening
        return {"addresses": await node.addresses(), "neighbours": await node.neighbours(), "known": node.num_known}

    @property
    def _listening(self) -> Node:
        assert self._node is not None, "listen comes first"
        return self._node

    async def _end_with(self, daemon: P2pDaemon) -> None:
        said = await daemon.ended()
        print(f"the Go daemon of the DHT ended: {said}", file=sys.stderr)
        self._stopped.set()

    async def _shut_down(self) -> None:
        with suppress(Exception):  # hivemind's side of it; the daemon's end below is what counts
            async with asyncio.timeout(_GRACE_S):
                if self._node is not None:
                    await self._node.stop()
        if self._daemon is not None:
            await self._daemon.stop(grace_s=_GRACE_S)


async def _serve(parent: socket.socket, socket_dir: Path) -> None:
    reader, writer = await asyncio.open_connection(sock=parent)
    await DhtSession(socket_dir, writer).run(reader)


def main() -> None:
    """Serve the parent on file descriptor 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the parent's to act on
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    socket_dir = Path(sys.argv[1])
    exit_code = 0
    try:
        asyncio.run(_serve(socket.socket(fileno=0), socket_dir))
    except Exception:
        traceback.print_exc()
        exit_code = 1
    shutil.rmtree(socket_dir, ignore_errors=True)
    sys.stderr.flush()
    os._exit(exit_code)  # hivemind leaves tasks behind whose end prints noise, or waits for ever


if __name__ == "__main__":
    main()
