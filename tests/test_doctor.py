"""What the doctor says of machines, and that the look at this one is a look."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.introducer import Introducer
from peer.bootstrap import sign_manifest
from peer.doctor import CHECKS, diagnose
from peer.event_loop import EventLoopThread
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.machine import Machine, SwarmSeen, look
from peer.rates import Rates
from peer.settings import DoctorSettings
from tests.swarm_scenes import SIX_EXPERTS, rates

GIB = 1 << 30


def swarm(measured: Rates) -> SwarmSeen:
    return SwarmSeen("demo, 16 experts", 12.0, None, speaks_our_version=True, manifest=SIX_EXPERTS, rates=measured)


WELL = Machine(
    python=(3, 11, 7),
    torch_version="2.13.0+cpu",
    device_error=None,
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
    swarm=swarm(rates(3.0)),
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
        "link",
        "chi",
    ]
    assert {(check.status, check.fix) for check in checks} == {("ok", "")}


@pytest.mark.parametrize(
    ("name", "status", "change"),
    [
        ("python", "error", {"python": (3, 10, 12)}),
        ("torch", "error", {"torch_version": "2.9.1+cpu"}),
        ("device", "warn", {"torch_version": "2.13.0"}),
        ("device", "error", {"device_error": "--device cuda: this machine or torch build has none"}),
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
        ("chi", "warn", {"swarm": swarm(rates(0.19))}),
        ("chi", "error", {"swarm": replace(swarm(rates(1.0)), kind_error="expert kind 'conv' is not known")}),
    ],
)
def test_each_complaint_says_what_to_do(name: str, status: str, change: dict[str, Any]) -> None:
    checks = diagnose(replace(WELL, **change))

    complaints = [check for check in checks if check.status != "ok"]
    assert [(check.name, check.status) for check in complaints] == [(name, status)]
    assert complaints[0].fix


def test_a_narrow_link_is_told_in_numbers_with_what_would_help() -> None:
    checks = {check.name: check for check in diagnose(replace(WELL, swarm=swarm(rates(0.04))))}

    assert checks["link"].detail.endswith("23 ms there and back")
    assert "could use 30.9 Mbit/s, and this link has 1.24 Mbit/s (chi 0.04)" in checks["chi"].detail
    assert "busy 4 % of the time" in checks["chi"].detail
    assert "hidden width" in checks["chi"].fix
    assert "transformer blocks" in checks["chi"].fix
    assert "not built yet" in checks["chi"].fix


@pytest.mark.parametrize("missing", ["link", "device"])
def test_what_could_not_be_measured_is_said_not_to_be(missing: str) -> None:
    measured = rates(3.0).model_copy(update={missing: None})

    checks = {check.name: check for check in diagnose(replace(WELL, swarm=swarm(measured)))}

    assert checks["link"].status == ("warn" if missing == "link" else "ok")
    assert checks["chi"].status == "warn"
    assert "not known" in checks["chi"].detail


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
    assert len(diagnose(machine)) == len(CHECKS) - 3  # nothing is said of a swarm that nobody asked about
    assert not (tmp_path / "not").exists()


def test_a_taken_port_is_seen(silent_listener: str) -> None:
    machine = look(DoctorSettings(listen=silent_listener))

    assert machine.listen_error == "Address already in use"


def test_a_swarm_that_does_not_answer_is_reported_with_the_reason(closed_port: str) -> None:
    machine = look(DoctorSettings(join=(closed_port,)))

    assert machine.swarm is not None
    assert f"{closed_port}: cannot connect: " in str(machine.swarm.error)


@pytest.fixture
def kind() -> str:
    return "swiglu"


@pytest.fixture
def coordinator(kind: str) -> Iterator[str]:
    """HOST:PORT/KEY of an introducer on a real socket."""
    owner = Identity.generate()
    expert = SIX_EXPERTS.expert.model_copy(update={"kind": kind})
    manifest = SIX_EXPERTS.model_copy(update={"owner": owner.peer_id, "expert": expert})

    async def serve(transport: GrpcTransport) -> str:
        introducer = Introducer(
            owner,
            certificate_der=transport.certificate_der,
            signed_manifest=sign_manifest(owner, manifest),
            dht_addresses=list,
            software_version="test",
        )
        return (await transport.serve(introducer, "127.0.0.1:0")).address

    with EventLoopThread() as loop:
        transport = GrpcTransport(owner)
        yield f"{loop.run(serve(transport), timeout_s=10)}/{owner.peer_id}"
        loop.run(transport.close(), timeout_s=10)


def test_the_way_to_a_swarm_and_the_device_on_its_experts_are_measured(coordinator: str) -> None:
    machine = look(DoctorSettings(join=(coordinator,), device="cpu"))

    checks = {check.name: check for check in diagnose(machine)}
    assert machine.swarm is not None
    assert machine.swarm.rates.link is not None
    assert machine.swarm.rates.device is not None
    assert checks["link"].status == "ok"
    assert "bit/s up" in checks["link"].detail
    assert checks["chi"].detail.startswith("swiglu experts of 128 x 16 at ")


@pytest.mark.parametrize("kind", ["conv"])
def test_a_run_whose_expert_kind_is_not_installed_is_an_error(coordinator: str) -> None:
    checks = {check.name: check for check in diagnose(look(DoctorSettings(join=(coordinator,), device="cpu")))}

    assert checks["link"].status == "ok"
    assert checks["chi"].status == "error"
    assert "'conv' is not known" in checks["chi"].detail


def test_a_device_that_is_not_here_is_an_error() -> None:
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"

    checks = {check.name: check for check in diagnose(look(DoctorSettings(device=missing)))}

    assert checks["device"].status == "error"
    assert f"--device {missing}" in checks["device"].detail


def test_a_folder_that_is_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    machine = look(DoctorSettings(state_dir=tmp_path / "file" / "peer"))

    assert not machine.state_dir_writable
