"""`swarmoe coordinator` and those who meet it, as real processes over loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.process

LEAVE_WITHIN_S = 5.0
READY_WITHIN_S = 40.0


class Daemon:
    """One `swarmoe` daemon that has printed its first line."""

    def __init__(self, *arguments: str, log: Path, http: str) -> None:
        self._log = log
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "swarmoe", *arguments, "--listen", "127.0.0.1:0", "--http", http],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().strip()

    @property
    def join(self) -> str:
        assert self.first_line.startswith("join: "), self.log()
        return self.first_line.removeprefix("join: ")

    def log(self) -> str:
        return self._log.read_text()

    def page(self) -> str:
        """Where it says its page is."""
        return re.findall(r"dashboard=(http://\S+/)", self.log())[-1]

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what was on stdout after the first line."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=LEAVE_WITHIN_S)
        return self.process.returncode, rest


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator["Daemons"]:
    started = Daemons(tmp_path)
    yield started
    for daemon in started.all:
        daemon.process.kill()
        daemon.process.communicate(timeout=10)


class Daemons:
    """Starts them, each on a folder of its own name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.all: list[Daemon] = []

    def start(self, command: str, *options: str, name: str, http: str = "127.0.0.1:0") -> Daemon:
        folder = str(self._root / name)
        self.all.append(Daemon(command, "--state-dir", folder, *options, log=self._root / f"{name}.log", http=http))
        return self.all[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_one_line_and_leaves_in_time_and_leaves_nothing_behind(
    daemons: Daemons, number: signal.Signals
) -> None:
    coordinator = daemons.start("coordinator", "--preset", "tiny", name="owner")
    assert re.fullmatch(r"127\.0\.0\.1:\d+/[a-z2-7]{52}", coordinator.join)
    children = psutil.Process(coordinator.process.pid).children(recursive=True)
    arguments = [argument for child in children for argument in child.cmdline()]
    sockets = [Path(argument) for argument in arguments if argument.startswith("/tmp/swarmoe-")]
    assert children
    assert sockets

    code, rest = coordinator.end(number)

    assert (code, rest) == (0, "")
    psutil.wait_procs(children, timeout=LEAVE_WITHIN_S)
    assert not [child for child in children if child.is_running()]
    assert not [path for path in sockets if path.exists()]


def test_killed_and_started_again_it_is_the_same_owner_in_the_same_swarm(daemons: Daemons) -> None:
    coordinator = daemons.start("coordinator", "--preset", "tiny", name="owner")
    peer = daemons.start("peer", "--join", coordinator.join, "--device", "cpu", name="peer")
    _wait_until_known(coordinator, peer)

    coordinator.process.kill()
    coordinator.process.wait(10)
    again = daemons.start("coordinator", "--preset", "tiny", name="owner")

    assert _key(again) == _key(coordinator)
    assert _wait_until_known(again, peer)["uncovered"] == []


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--preset", "demo"), 7, "experts_per_layer: ours 4, theirs 8"),
        (("--preset", "tiny"), 3, "is held by process"),
    ],
)
def test_a_folder_is_one_run_and_one_daemon(
    daemons: Daemons, options: tuple[str, ...], code: int, sentence: str
) -> None:
    first = daemons.start("coordinator", "--preset", "tiny", name="owner")
    if code == 7:
        assert first.end()[0] == 0

    second = daemons.start("coordinator", *options, name="owner")

    assert second.process.wait(READY_WITHIN_S) == code
    assert second.first_line == ""
    assert sentence in second.log()
    assert "Traceback" not in second.log()


def test_a_taken_page_port_is_one_line_and_exit_code_3(daemons: Daemons, silent_listener: str) -> None:
    stopped = daemons.start("coordinator", "--preset", "tiny", name="owner", http=silent_listener)

    assert stopped.process.wait(READY_WITHIN_S) == 3
    assert stopped.first_line == ""
    assert f"cannot serve HTTP on {silent_listener}" in stopped.log()
    assert "Traceback" not in stopped.log()


def _key(daemon: Daemon) -> str:
    return daemon.join.split("/")[1]


def _wait_until_known(coordinator: Daemon, peer: Daemon) -> dict[str, Any]:
    """The first state the coordinator tells its page in which this peer is online."""
    with urllib.request.urlopen(f"{coordinator.page()}events", timeout=READY_WITHIN_S) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                state = json.loads(line.removeprefix(b"data: "))["state"]
                if (_key(peer), "online") in [(known["peer_id"], known["state"]) for known in state["peers"]]:
                    return state
    raise AssertionError(coordinator.log())
