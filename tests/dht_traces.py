"""What DHT processes leave behind: watched by a mark in the environment that every descendant inherits."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import peer.dht_child

_MARK = "SWARMOE_TEST_MARK"


class Traces:
    """Everything started under one mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def processes(self) -> list[psutil.Process]:
        """Those alive, this one not among them, whoever their parent is by now."""
        return [process for process in psutil.process_iter() if process.pid != os.getpid() and self._is_ours(process)]

    def named(self, text: str) -> list[psutil.Process]:
        return [process for process in self.processes() if text in " ".join(process.cmdline())]

    def left(self, within_s: float) -> list[str]:
        """What is still there after `within_s`; returns as soon as there is nothing."""
        _, alive = psutil.wait_procs(self.processes(), timeout=within_s)
        alive = [process for process in alive if self._is_ours(process)]  # not one that init has yet to collect
        return [str(process) for process in alive] + [str(path) for path in self.folder.rglob("*")]

    def shared_memory(self) -> list[str]:
        """Shared-memory files any of them has mapped that would stay when it is killed: unlinked ones do not."""
        return [
            mapped.path
            for process in self.processes()
            for mapped in process.memory_maps()
            if mapped.path.startswith("/dev/shm") and Path(mapped.path).exists()
        ]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    """Run DHT processes under a mark; fails unless nothing of them is left 2.5 s after the block."""
    with tempfile.TemporaryDirectory(prefix="swarmoe-test-", dir="/tmp") as folder:
        traces = Traces(Path(folder))
        monkeypatch.setenv(_MARK, folder)
        monkeypatch.setattr(peer.dht_child, "SOCKET_ROOT", folder)
        yield traces
        assert traces.left(within_s=2.5) == []
