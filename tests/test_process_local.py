"""`swarmoe local` as a person runs it: kills and verdict, Ctrl+C at any moment, and its own sudden death."""

import json
import re
import shutil
import signal
import time
from collections.abc import Generator
from dataclasses import dataclass

import pytest

from tests.processes import Processes, processes, until

pytestmark = pytest.mark.process

ENDS_WITHIN_S = 15.0
_SLOWED = ("--set=batch.sequences=64", "--set=batch.micro_batches=2")
_REPORT = {
    *("preset", "seed", "steps", "steps_skipped", "wall_s", "tokens", "tokens_per_s", "val_bits_per_byte"),
    *("train_bits_per_byte_first", "train_bits_per_byte_last", "calls", "pairs", "lost_by_reason", "backwards"),
    *("bytes_up", "bytes_down", "bytes_per_token", "experts", "kills", "peers", "trainers", "averaging", "verdict"),
}
_COUNTS = {
    "calls": {"sent", "answered", "lost", "retried", "hedged"},
    "pairs": {"sent", "answered", "lost", "declined"},
    "lost_by_reason": {"timeout", "unreachable", "declined", "malformed", "non_finite", "stale", "no_primary"},
    "backwards": {"sent", "applied", "lost", "duplicate", "stale"},
    "experts": {"total", "alive", "restored", "reinitialised", "taken_over"},
    "averaging": {"rounds", "failed", "bytes_up", "bytes_down", "max_relative_distance"},
}


@dataclass(frozen=True)
class SuddenDeath:
    """What a killed `swarmoe local` left, and how fast this machine had trained until then."""

    num_processes: int
    left: list[str]
    steps_per_s: float


@pytest.fixture
def started(tmp_path_factory: pytest.TempPathFactory) -> Generator[Processes]:
    with processes(tmp_path_factory.mktemp("local")) as started:
        yield started


@pytest.fixture(scope="module")
def sudden_death(tmp_path_factory: pytest.TempPathFactory) -> Generator[SuddenDeath]:
    with processes(tmp_path_factory.mktemp("sudden")) as started:
        local = started.start("local", "local", "--preset=tiny", "--peers=2", "--steps=100000", *_SLOWED)
        began_s = local.line(r"trainer-0 +step 10/") and time.monotonic()
        steps_per_s = 60 / (local.line(r"trainer-0 +step 70/") and time.monotonic() - began_s)
        num_processes = len(started.look())
        local.kill()
        left = started.left(within_s=ENDS_WITHIN_S)
        for folder in (started.folder / "tmp").glob("swarmoe-local-*"):
            shutil.rmtree(folder)
        yield SuddenDeath(num_processes, left, steps_per_s)


def test_killed_without_warning_its_members_end_by_themselves(sudden_death: SuddenDeath) -> None:
    assert sudden_death.num_processes >= 12  # four commands, each with a DHT process and a Go daemon
    (folder,) = sudden_death.left
    assert "swarmoe-local-" in folder  # nobody was left to remove it


@pytest.mark.timeout(240)
def test_peers_are_killed_and_come_back_and_the_report_adds_up(started: Processes, sudden_death: SuddenDeath) -> None:
    path, steps = started.folder / "runs" / "report.json", round(22 * sudden_death.steps_per_s)

    code, local = started.run(
        *("local", "--preset=tiny", "--peers=2", f"--steps={steps}", "--seed=3", *_SLOWED),
        *("--kill-every=10", f"--report={path}", "--no-dashboard"),
        constants={"swarmoe.local_kills.QUIET_END_S": 4.0},  # 30 s would make a test of a minute
        timeout_s=220,
    )

    assert code == 0, local.log()
    report = json.loads(path.read_text())
    assert report.keys() == _REPORT | {"problems"}
    assert {name: set(report[name]) for name in _COUNTS} == _COUNTS
    calls, pairs, backwards, experts = report["calls"], report["pairs"], report["backwards"], report["experts"]
    assert calls["sent"] == calls["answered"] + calls["lost"]
    assert pairs["sent"] == pairs["answered"] + pairs["lost"]
    assert pairs["lost"] == sum(report["lost_by_reason"].values())
    assert backwards["sent"] == backwards["applied"] + backwards["lost"] + backwards["stale"]
    assert (report["preset"], report["seed"], report["peers"], report["trainers"]) == ("tiny", 3, 2, 1)
    assert report["steps"] == steps
    assert report["tokens"] == (steps - report["steps_skipped"]) * 2 * 64 * 32
    assert report["kills"] >= 1
    assert (experts["total"], experts["alive"]) == (4, 4)
    assert experts["restored"] >= 2
    assert report["train_bits_per_byte_last"] < report["train_bits_per_byte_first"]
    assert (report["verdict"], report["problems"]) == ("ok", [])
    assert "verdict           ok" in local.stdout
    assert started.left() == []


def test_over_a_slow_lossy_network_it_learns_and_says_what_was_lost(started: Processes) -> None:
    path = started.folder / "runs" / "report.json"

    code, local = started.run(
        *("local", "--preset=tiny", "--peers=2", "--steps=20", "--seed=3", "--set=wire.call_timeout_s=0.5"),
        *("--latency-ms=5", "--jitter-ms=5", "--loss=0.15", "--bandwidth-mbit=50", f"--report={path}"),
        timeout_s=110,
    )

    assert code == 0, local.log()
    report = json.loads(path.read_text())
    calls, pairs, reasons = report["calls"], report["pairs"], report["lost_by_reason"]
    assert "emulating for every process: 5 to 10 ms one way, 50 Mbit/s a direction, 15.0% of" in local.stderr
    assert report["verdict"] == "ok"
    assert calls["sent"] == calls["answered"] + calls["lost"]
    assert calls["lost"] >= 1
    assert reasons["timeout"] == pairs["lost"] - reasons["unreachable"] > 0
    assert re.search(rf"pairs .*\(lost: {reasons['timeout']:,} timeout", local.stdout)


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        (r"local +starting 2 peers", ()),
        (r"local +killing peer-", ("--kill-every=1", "--steps=100000", *_SLOWED)),
    ],
    ids=["while peers start", "in training, with a peer just killed"],
)
def test_ctrl_c_ends_everything_and_leaves_nothing(started: Processes, moment: str, options: tuple[str, ...]) -> None:
    local = started.start("local", "local", "--preset=tiny", "--peers=2", *options)
    local.line(moment)
    started.look()

    local.process.send_signal(signal.SIGINT)
    local.line(r"coordinator +(Trainer \S+ is gone|coordinator.left)")
    code = local.end(signal.SIGINT, timeout_s=ENDS_WITHIN_S)  # once more, as people do

    assert code == 6, local.log()
    assert "interrupted before the end" in local.stderr.splitlines()[-1]
    assert "Traceback" not in local.stderr
    assert started.left(within_s=1.0) == []


def test_ctrl_c_just_after_the_start_ends_everything_and_leaves_nothing(started: Processes) -> None:
    local = started.start("local", "local", "--preset=tiny")
    until(lambda: len(started.look()) > 1, what="the first member")

    code = local.end(signal.SIGINT, timeout_s=ENDS_WITHIN_S)

    assert code == 6, local.log()
    assert started.left(within_s=1.0) == []


def test_a_member_that_does_not_come_up_is_one_line(started: Processes) -> None:
    code, local = started.run("local", "--preset=tiny", constants={"swarmoe.local_members.READY_WITHIN_S": 0.1})

    assert code == 4, local.log()
    assert local.stderr.splitlines()[-1].startswith("error: coordinator should have become ready and was not in 0 s")
    assert "Traceback" not in local.stderr
    assert started.left(within_s=1.0) == []
