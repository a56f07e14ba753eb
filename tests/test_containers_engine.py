"""The composed swarm on a Docker Engine, from the image `swarmoe` as it was built last."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = [Path(sys.executable).parent / "docker-compose", "--project-name=swarmoe-test"]
SERVICES = ["coordinator", *["peer"] * 4, "trainer"]


def _compose(*arguments: str) -> str:
    done = subprocess.run([*COMPOSE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def _composed() -> Iterator[None]:
    docker = shutil.which("docker") or pytest.skip("no docker client")
    image = subprocess.run([docker, "image", "inspect", "swarmoe"], capture_output=True, text=True)
    if image.returncode != 0:
        pytest.skip(image.stderr.strip())  # no engine, or nothing built
    try:
        _compose("up", "--detach", "--no-build", "--wait", "--wait-timeout=300")
        yield
    finally:
        _compose("down", "--volumes")


def test_every_member_becomes_healthy_and_is_nobody_special() -> None:
    members = [json.loads(line) for line in _compose("ps", "--format=json").splitlines()]

    assert sorted(member["Service"] for member in members) == SERVICES
    assert {member["Health"] for member in members} == {"healthy"}
    for service in set(SERVICES):
        assert _compose("exec", "-T", service, "id", "-u") == "10001\n"


def test_four_peers_serve_the_16_experts_of_the_demo() -> None:
    status = json.loads(_compose("exec", "-T", "coordinator", "swarmoe", "status", "--join=127.0.0.1:4700", "--json"))

    assert [peer["state"] for peer in status["peers"]] == ["online"] * 4
    assert sum(len(peer["experts"]) for peer in status["peers"]) == len(status["experts"]) == 16
    assert status["uncovered"] == []


def test_the_trainer_trains() -> None:
    trainer = _compose("logs", "--no-log-prefix", "trainer")

    assert "joined: " in trainer
    assert " bits/byte " in trainer
