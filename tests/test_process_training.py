"""A swarm of real processes to which nothing happens: it trains, shows itself, stops, resumes, writes and leaves."""

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Command, Swarm, processes, start_swarm, until

pytestmark = pytest.mark.process

LEAVE_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with processes(tmp_path_factory.mktemp("training")) as started:
        yield start_swarm(started, num_peers=2)


def test_status_and_every_peer_show_the_swarm(swarm: Swarm) -> None:
    code, status = swarm.processes.run("status", f"--join={swarm.join}", "--json")

    assert code == 0, status.log()
    state = json.loads(status.stdout)
    assert state.keys() >= {"run", "peers", "experts", "trainers", "uncovered"}
    assert {peer["peer_id"] for peer in state["peers"]} == {peer.key for peer in swarm.peers}
    for peer in state["peers"]:
        assert peer.keys() >= {"flags", "endpoint", "throughput_tokens_per_s", "version"}
        assert peer["state"] == "online"
        assert min(peer[rate] for rate in ("up_bits_per_s", "down_bits_per_s", "flops_per_s")) > 0
    assert sorted(uid for peer in state["peers"] for uid in peer["experts"]) == ["0.0", "0.1", "0.2", "0.3"]
    for expert in state["experts"]:
        assert expert.keys() >= {"uid", "version", "load"}
        assert expert["replicas"] == [expert["primary"]]
    assert (state["trainers"], state["uncovered"]) == ([], [])
    (kind,) = state["expert_kinds"]
    assert [told["peer_id"] for told in kind["peers"]] == sorted(peer.key for peer in swarm.peers)
    for peer in swarm.peers:
        assert until(lambda peer=peer: _get(peer, "api/state")["uncovered"] == [])
        assert _get(peer, "healthz") == {"status": "ok", "detail": "online, hosting 2 experts"}
        assert _get(peer, "api/state")["run"] == state["run"]
        assert "# TYPE swarmoe_chi gauge" in _read(peer, "metrics")


def test_doctor_answers_in_json_also_of_the_swarm(swarm: Swarm) -> None:
    code, doctor = swarm.processes.run("doctor", f"--join={swarm.join}", "--json")

    checks = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
    assert checks.keys() >= {"python", "torch", "device", "memory", "disk", "clock", "ports", "swarm", "link", "chi"}
    assert all(check.keys() == {"name", "status", "detail", "fix"} for check in checks.values())
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert "run tiny, 4 experts" in checks["swarm"]["detail"]
    assert code == 0


def test_a_stopped_trainer_resumes_at_its_step_and_the_swarm_writes(swarm: Swarm) -> None:
    folder = swarm.processes.folder / "trainer"
    trainer = swarm.processes.trainer(swarm.join, "--steps=100000", name="trainer")
    trainer.line(r"step 20/100000 ")

    assert trainer.end(signal.SIGTERM) == 0, trainer.log()
    summary = json.loads((folder / "summary.json").read_text())
    stopped_at = _metrics(folder)[-1]["step"]
    assert summary["steps"] == stopped_at >= 20
    assert (summary["val_bits_per_byte"], summary["gave_up"]) == (None, None)

    code, resumed = swarm.processes.run_trainer(swarm.join, f"--steps={stopped_at + 5}", "--resume", name="trainer")
    assert code == 0, resumed.log()
    assert (
        f"resumed at step {stopped_at}: trunk, optimiser, random state and data position exactly as saved; "
        "experts as the swarm has them now (4 of 4 served)"
    ) in resumed.stdout
    trained = [line["step"] for line in _metrics(folder) if "train_bits_per_byte" in line]
    assert trained == list(range(1, stopped_at + 6))
    assert json.loads((folder / "summary.json").read_text())["val_bits_per_byte"] < 8.0

    code, generate = swarm.processes.run(
        "generate", f"--join={swarm.join}", f"--checkpoint-dir={folder}", "--prompt=It is", "--length=20", "--json"
    )
    assert code == 0, generate.log()
    answer = json.loads(generate.stdout)
    assert answer["text"].startswith("It is")
    assert len(answer["text"].encode()) >= len("It is") + 20
    assert answer["step"] == stopped_at + 5


def test_a_new_peer_serves_seconds_after_its_imports(swarm: Swarm, capsys: pytest.CaptureFixture[str]) -> None:
    peer = swarm.processes.peer(swarm.join, "--max-experts=1", name="spare")
    assert peer.join

    found, online = (datetime.fromisoformat(peer.event(name)["timestamp"]) for name in ("swarm.found", "peer.online"))
    took_s = (online - found).total_seconds()
    with capsys.disabled():
        print(f"\n  a new peer was online {took_s:.1f} s after it found the swarm (limit 8 s on an idle machine)")
    assert took_s < 20.0
    assert peer.event("peer.online")["experts"] == 0
    assert _get(peer, "healthz")["status"] == "ok"
    assert peer.end() == 0


def test_a_folder_has_one_daemon(swarm: Swarm) -> None:
    second = swarm.processes.peer(swarm.join, name="peer-0")

    assert second.wait() == 3
    assert second.stderr.splitlines()[-1].startswith("error: ")
    assert f"is held by process {swarm.peers[0].process.pid}" in second.stderr


def test_a_peer_that_is_told_to_leave_says_goodbye_and_keeps_what_it_learnt(swarm: Swarm) -> None:
    leaver, other = swarm.peers
    held = _get(leaver, "api/state")

    began_s = time.monotonic()
    code = leaver.end(signal.SIGTERM)
    left_after_s = time.monotonic() - began_s
    until(lambda: len(swarm.state()["peers"]) == 1, timeout_s=LEAVE_WITHIN_S, what="the tombstone")
    _, status = swarm.processes.run("status", f"--join={other.join}", "--json")

    assert (code, left_after_s < LEAVE_WITHIN_S) == (0, True), leaver.log()
    state = json.loads(status.stdout)
    mine = next(peer["experts"] for peer in held["peers"] if peer["peer_id"] == leaver.key)
    assert state["uncovered"] == mine
    assert [peer["peer_id"] for peer in state["peers"]] == [other.key]
    assert list((swarm.processes.folder / "peer-0" / "experts").glob("generation-*.json"))


def _get(peer: Command, path: str) -> dict[str, Any]:
    return json.loads(_read(peer, path))


def _read(peer: Command, path: str) -> str:
    address = peer.event("http.listening")["address"]
    with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as answer:
        return answer.read().decode()


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
