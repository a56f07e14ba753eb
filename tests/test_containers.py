"""The image and the composed swarm, judged without an engine by the tools that know their languages."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from coordinator.settings import CoordinatorSettings
from peer.settings import PeerSettings
from swarmoe.cli import COMMANDS
from trainer.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
SETTINGS = {"coordinator": CoordinatorSettings, "peer": PeerSettings, "train": TrainSettings}


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def _composed() -> dict[str, Any]:
    return json.loads(_run("docker-compose", "-f", "docker-compose.yml", "config", "--format", "json"))["services"]


def test_hadolint_has_nothing_to_say_of_the_image() -> None:
    assert _run("hadolint", "--no-color", "Dockerfile") == ""


def test_compose_reads_its_file() -> None:
    assert _run("docker-compose", "-f", "docker-compose.yml", "config", "-q") == ""
    assert _composed().keys() == {"coordinator", "peer", "trainer"}


def test_the_image_runs_as_nobody_special_and_one_thread_a_process() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()

    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert any("OMP_NUM_THREADS=1" in line for line in lines if line.startswith("ENV "))
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


def test_peers_start_on_a_healthy_coordinator_and_the_trainer_on_healthy_peers() -> None:
    services = _composed()

    assert {name: s["condition"] for name, s in services["peer"]["depends_on"].items()} == {
        "coordinator": "service_healthy"
    }
    assert {name: s["condition"] for name, s in services["trainer"]["depends_on"].items()} == {
        "coordinator": "service_healthy",
        "peer": "service_healthy",
    }


def test_a_peer_can_be_scaled() -> None:
    peer = _composed()["peer"]

    assert peer["deploy"]["replicas"] == 4
    assert "ports" not in peer  # a published port can be had once
    assert "container_name" not in peer
    assert all("source" not in volume for volume in peer["volumes"])  # a named volume would be shared


def test_a_restarted_trainer_goes_on_from_its_checkpoint() -> None:
    trainer = _composed()["trainer"]

    assert trainer["restart"] == "on-failure"
    assert "--resume" in trainer["command"]
    folder = trainer["command"][trainer["command"].index("--checkpoint-dir") + 1]
    assert folder in {volume["target"] for volume in trainer["volumes"]}


def test_the_page_is_published_on_loopback_alone() -> None:
    published = {name: service.get("ports", []) for name, service in _composed().items()}

    assert [port["host_ip"] for ports in published.values() for port in ports] == ["127.0.0.1"]
    assert published["coordinator"]


def test_every_service_runs_a_command_with_flags_that_it_has() -> None:
    commands = {command.name: command for command in COMMANDS}

    for service in _composed().values():
        name, *arguments = service["command"]
        flags = {argument.removeprefix("--").replace("-", "_") for argument in arguments if argument.startswith("--")}
        assert commands[name].settings is SETTINGS[name]
        assert flags <= SETTINGS[name].model_fields.keys()


def test_the_build_sends_every_package_and_the_text() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert sent == {
        *("pyproject.toml", "README.md", "LICENSE", "data"),
        *("protos", "experts", "peer", "trainer", "coordinator", "swarmoe"),
    }
