"""Real `swarmoe` commands for tests: started, read line by line, ended by handle, and nothing of them left behind.

Every process inherits a mark in its environment, so that what outlives its parent is found too. Knows no command's
meaning beyond how it says that it is ready.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

READY_WITHIN_S = 60.0
"""Imports included, on a machine that does other things too."""
GONE_WITHIN_S = 10.0
_MARK = "TEST_OF_SWARM"  # not SWARMOE_: those variables are settings
_LOOK_EVERY_S = 0.05

T = TypeVar("T")


class Command:
    """One running command and every line it has said so far."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self.process = process
        self.started_s = time.monotonic()
        self._said: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._heard = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, said), daemon=True)
            for stream, said in zip((process.stdout, process.stderr), self._said.values(), strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def stdout(self) -> str:
        return "\n".join(self._said["stdout"])

    @property
    def stderr(self) -> str:
        return "\n".join(self._said["stderr"])

    @property
    def join(self) -> str:
        """What a joiner is given; waits until it is ready."""
        return self.line(r"join: (\S+)")[1]

    @property
    def key(self) -> str:
        return self.join.partition("/")[2]

    def line(self, pattern: str, *, timeout_s: float = READY_WITHIN_S) -> "re.Match[str]":
        """The first line, on either stream, that matches from its beginning; waits for it."""

        def find() -> "re.Match[str] | None":
            lines = [line for said in self._said.values() for line in said]
            return next((match for line in lines if (match := re.match(pattern, line))), None)

        return self._await(find, pattern, timeout_s)

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        """Log lines of this name so far with these fields; of a command started with `--log-format=json`."""
        logged = [json.loads(line) for line in list(self._said["stderr"]) if line.startswith("{")]
        return [event for event in logged if event["event"] == name and event.items() >= fields.items()]

    def event(self, name: str, *, timeout_s: float = READY_WITHIN_S, **fields: object) -> dict[str, Any]:
        """The first such log line; waits for it."""
        return self._await(lambda: next(iter(self.events(name, **fields)), None), f"{name} {fields}", timeout_s)

    def wait(self, timeout_s: float = READY_WITHIN_S) -> int:
        """Its exit code, once it has ended and all it said is here."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended in {timeout_s:.0f} s:\n{self.log()}") from None
        for reader in self._readers:
            reader.join(GONE_WITHIN_S)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(GONE_WITHIN_S)

    def end(self, number: signal.Signals = signal.SIGTERM, *, timeout_s: float = READY_WITHIN_S) -> int:
        """Send a signal and wait; the exit code, negative for a signal that ended it."""
        self.process.send_signal(number)
        return self.wait(timeout_s)

    def log(self) -> str:
        """What it said last, for the message of a failed test."""
        return f"--- {self.name}: stdout\n{self.stdout[-4000:]}\n--- {self.name}: stderr\n{self.stderr[-8000:]}"

    def close(self) -> None:
        """Kill it if need be and let go of its pipes. Idempotent."""
        self.kill()
        for reader in self._readers:
            reader.join(GONE_WITHIN_S)

    def _read(self, stream: "IO[str] | None", said: list[str]) -> None:
        assert stream is not None
        with stream:
            for line in stream:
                with self._heard:
                    said.append(line.rstrip("\n"))
                    self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def _await(self, find: Callable[[], T | None], what: str, timeout_s: float) -> T:
        deadline_s = time.monotonic() + timeout_s
        with self._heard:
            while (found := find()) is None:
                if time.monotonic() >= deadline_s or not any(reader.is_alive() for reader in self._readers):
                    raise AssertionError(f"{self.name} did not say {what!r}:\n{self.log()}")
                self._heard.wait(1.0)
        return found


class Processes:
    """Starts commands below one folder. Made by `processes`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._commands: list[Command] = []
        self._traces: set[Path] = set()
        self._temporary = folder / "tmp"
        self._temporary.mkdir()

    def start(self, name: str, *arguments: object, constants: Mapping[str, object] | None = None) -> Command:
        """Start `swarmoe ARGUMENTS`; `constants` are put into its modules first, by dotted name."""
        entry = ["-m", "swarmoe"] if constants is None else ["-c", _with_constants(constants)]
        process = subprocess.Popen(
            [sys.executable, *entry, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                "TMPDIR": str(self._temporary),
                _MARK: str(self.folder),
            },
        )
        self._commands.append(Command(name, process))
        return self._commands[-1]

    def run(self, *arguments: object, timeout_s: float = READY_WITHIN_S, **options: Any) -> tuple[int, Command]:
        """Start a command that ends by itself, and wait for it."""
        command = self.start(str(arguments[0]), *arguments, **options)
        return command.wait(timeout_s), command

    def coordinator(self, *options: object, name: str = "coordinator") -> Command:
        return self._daemon("coordinator", name, "--preset=tiny", *options)

    def peer(self, join: str, *options: object, name: str, **start: Any) -> Command:
        """`name` is its state folder: another peer of the same name goes on where the first one was."""
        return self._daemon("peer", name, f"--join={join}", "--device=cpu", *options, **start)

    def trainer(self, join: str, *options: object, name: str, **start: Any) -> Command:
        folder = f"--checkpoint-dir={self.folder / name}"
        return self.start(
            name, "train", f"--join={join}", folder, "--device=cpu", "--log-format=json", *options, **start
        )

    def look(self) -> list[psutil.Process]:
        """Ours that are alive, whoever their parent is by now; notes the files they use."""
        alive = [process for process in psutil.process_iter() if process.pid != os.getpid() and self._is_ours(process)]
        for process in alive:
            self._traces |= _traces(process)
        return alive

    def left(self, within_s: float = GONE_WITHIN_S) -> list[str]:
        """Processes, sockets, shared memory and temporary folders still there; returns early when there is nothing."""
        _, alive = psutil.wait_procs(self.look(), timeout=within_s)
        paths = [path for path in self._traces if path.exists()]
        return [*map(str, alive), *map(str, paths), *map(str, self._temporary.glob("swarmoe*"))]

    def close(self) -> None:
        """Kill what still runs, and insist that nothing of it stays."""
        self.look()
        for command in self._commands:
            command.close()
        assert self.left() == []

    def run_trainer(self, join: str, *options: object, name: str, **start: Any) -> tuple[int, Command]:
        """A trainer, to its end."""
        trainer = self.trainer(join, *options, name=name, **start)
        return trainer.wait(), trainer

    def _daemon(self, command: str, name: str, *options: object, **start: Any) -> Command:
        folder = f"--state-dir={self.folder / name}"
        where = ["--listen=127.0.0.1:0", "--http=127.0.0.1:0", "--log-format=json"]
        return self.start(name, command, folder, *where, *options, **start)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


@contextmanager
def processes(folder: Path) -> Generator[Processes]:
    """Whatever the block starts is gone when it ends, with every trace of it."""
    started = Processes(folder)
    try:
        yield started
    finally:
        started.close()


@dataclass(frozen=True)
class Swarm:
    """A coordinator of the `tiny` run and its peers, ready."""

    processes: Processes
    coordinator: Command
    peers: list[Command]

    @property
    def join(self) -> str:
        return self.coordinator.join

    def state(self) -> dict[str, Any]:
        """As the coordinator sees it."""
        page = self.coordinator.event("coordinator.ready")["dashboard"]
        with urllib.request.urlopen(f"{page}api/state", timeout=10) as answer:
            return json.load(answer)


def start_swarm(started: Processes, *run: object, num_peers: int) -> Swarm:
    """Peers share the four experts evenly; `run` are the coordinator's options."""
    coordinator = started.coordinator(*run)
    each = 4 // num_peers
    peers = [started.peer(coordinator.join, f"--max-experts={each}", name=f"peer-{n}") for n in range(num_peers)]
    swarm = Swarm(started, coordinator, peers)
    until(lambda: all(peer.join for peer in peers) and not swarm.state()["uncovered"], what="the swarm")
    return swarm


def until(find: Callable[[], T | None], *, timeout_s: float = READY_WITHIN_S, what: str = "it") -> T:
    """Ask until the answer is neither None nor False."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while (found := find()) is None or found is False:
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what} did not come in {timeout_s:.0f} s")
        pause.wait(_LOOK_EVERY_S)
    return found


def _traces(process: psutil.Process) -> set[Path]:
    """The socket folder it was told of, and shared memory that would stay when it is killed."""
    try:
        sockets = {Path(argument) for argument in process.cmdline() if argument.startswith("/tmp/swarmoe-")}
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return set()
    shared = {Path(line[line.index("/dev/shm/") :]) for line in maps if "/dev/shm/" in line}
    return sockets | {path for path in shared if not path.name.endswith("(deleted)")}


def _with_constants(constants: Mapping[str, object]) -> str:
    """A program that runs the command line after waits meant for people were made short."""
    modules = "".join(f"import {name.rpartition('.')[0]}\n" for name in constants)
    values = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    return f"{modules}{values}from swarmoe.cli import main\nmain()\n"
