"""What the doctor says of machines, and that the look at this one is a look."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.doctor import CHECKS, diagnose
from peer.machine import Machine, SwarmSeen, look
from peer.settings import DoctorSettings

GIB = 1 << 30
WELL = Machine(
    python=(3, 11, 7),
    torch_version="2.13.0+cpu",
    accelerator=None,
    num_cores=2,
    memory_total_bytes=8 * GIB,
    memory_free_bytes=4 * GIB,
    state_dir=Path("/state"),
    disk_free_bytes=10 * GIB,
    state_dir_writable=True,
    now_unix_s=1_800_000_000.0,
    clock_synchronised=True,
    listen="0.0.0.0:4700",
    listen_error=None,
    dht_daemon=Path("/p2pd"),
    dht_daemon_runs=True,
    swarm=SwarmSeen("demo, 16 experts", 12.0, None, speaks_our_version=True),
)


def test_a_machine_in_good_order_needs_no_fix() -> None:
    checks = diagnose(WELL)

    assert [check.name for check in checks] == [
        "python",
        "torch",
        "device",
        "memory",
        "disk",
        "clock",
        "ports",
        "dht",
        "swarm",
    ]
    assert {(check.status, check.fix) for check in checks} == {("ok", "")}


@pytest.mark.parametrize(
    ("name", "status", "change"),
    [
        ("python", "error", {"python": (3, 10, 12)}),
        ("torch", "error", {"torch_version": "2.9.1+cpu"}),
        ("device", "warn", {"torch_version": "2.13.0"}),
        ("memory", "warn", {"memory_free_bytes": GIB // 2}),
        ("disk", "error", {"state_dir_writable": False}),
        ("disk", "warn", {"disk_free_bytes": 1 << 20}),
        ("clock", "error", {"now_unix_s": 0.0}),
        ("clock", "warn", {"clock_synchronised": False}),
        ("ports", "error", {"listen_error": "Address already in use"}),
        ("dht", "error", {"dht_daemon": None, "dht_daemon_runs": False}),
        ("dht", "error", {"dht_daemon_runs": False}),
        ("swarm", "error", {"swarm": SwarmSeen("", 0.0, "nobody let us in", speaks_our_version=True)}),
        ("swarm", "error", {"swarm": SwarmSeen("", 0.0, "protocol 1, theirs 2", speaks_our_version=False)}),
    ],
)
def test_each_complaint_says_what_to_do(name: str, status: str, change: dict[str, Any]) -> None:
    checks = diagnose(replace(WELL, **change))

    complaints = [check for check in checks if check.status != "ok"]
    assert [(check.name, check.status) for check in complaints] == [(name, status)]
    assert complaints[0].fix


def test_a_gpu_is_named() -> None:
    checks = {check.name: check for check in diagnose(replace(WELL, accelerator="A GPU", torch_version="2.13.0"))}

    assert checks["device"].detail.startswith("A GPU")


def test_the_look_finds_what_runs_these_tests(tmp_path: Path) -> None:
    machine = look(DoctorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "not" / "there" / "yet"))

    assert machine.state_dir_writable
    assert machine.disk_free_bytes > 0
    assert machine.listen_error is None
    assert machine.dht_daemon_runs
    assert machine.swarm is None
    assert len(diagnose(machine)) == len(CHECKS) - 1  # nothing is said of a swarm that nobody asked about
    assert not (tmp_path / "not").exists()


def test_a_taken_port_is_seen(silent_listener: str) -> None:
    machine = look(DoctorSettings(listen=silent_listener))

    assert machine.listen_error == "Address already in use"


def test_a_swarm_that_does_not_answer_is_reported_with_the_reason(closed_port: str) -> None:
    machine = look(DoctorSettings(join=(closed_port,)))

    assert machine.swarm is not None
    assert f"{closed_port}: cannot connect: " in str(machine.swarm.error)


def test_a_folder_that_is_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    machine = look(DoctorSettings(state_dir=tmp_path / "file" / "peer"))

    assert not machine.state_dir_writable
