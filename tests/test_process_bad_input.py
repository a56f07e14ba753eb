"""What a person gets wrong, typed at real commands: one clear line on stderr, and the documented exit code."""

import json
import signal
import socket
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from experts.bank import ExpertBank
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid
from peer.identity import Identity
from peer.manifest import RunManifest
from tests.processes import Command, Processes, processes

pytestmark = [pytest.mark.process, pytest.mark.hostile]

NOBODY_WAITS = {"trainer.daemon.WAIT_FOR_EXPERTS_S": 1.0, "trainer.session.GIVE_UP_AFTER_S": 2.0}


@dataclass(frozen=True)
class Scene:
    """A coordinator without peers, an address somebody else has, and folders to spoil."""

    processes: Processes
    coordinator: Command
    taken: str

    @property
    def join(self) -> str:
        return self.coordinator.join

    @property
    def manifest(self) -> RunManifest:
        return RunManifest.model_validate_json((self.processes.folder / "coordinator" / "run.json").read_bytes())

    def file(self, path: str, content: bytes | str) -> Path:
        """A file below the processes' folder, with its folders."""
        file = self.processes.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file


# ---- who does what wrong --------------------------------------------------------------------------------------------


def _peer(name: str, *options: str) -> Callable[[Scene], Command]:
    return lambda scene: scene.processes.peer(scene.join, *options, name=name)


def _trainer(name: str, *options: str) -> Callable[[Scene], Command]:
    return lambda scene: scene.processes.trainer(scene.join, *options, name=name)


def _command(*arguments: str) -> Callable[[Scene], Command]:
    return lambda scene: scene.processes.start(arguments[0], *arguments)


def _empty_file(scene: Scene) -> Command:
    return scene.processes.trainer(scene.join, f"--data={scene.file('empty.txt', '')}", name="empty-data")


def _taken_port(scene: Scene) -> Command:
    return scene.processes.peer(scene.join, f"--listen={scene.taken}", name="taken-port")


def _taken_page(scene: Scene) -> Command:
    return scene.processes.peer(scene.join, f"--http={scene.taken}", name="taken-page")


def _wrong_key(scene: Scene) -> Command:
    address = scene.join.partition("/")[0]
    return scene.processes.peer(f"{address}/{Identity.generate().peer_id}", name="wrong-key")


def _another_runs_peer(scene: Scene) -> Command:
    other = scene.manifest.model_copy(update={"seed": 17})
    scene.file("another-run/run.json", other.canonical_json())
    return scene.processes.peer(scene.join, name="another-run")


def _another_runs_trainer(scene: Scene) -> Command:
    other = scene.manifest.model_copy(update={"experts_per_layer": 2})
    scene.file("another-training/run.json", other.canonical_json())
    return scene.processes.trainer(scene.join, name="another-training")


def _corrupt_checkpoint(scene: Scene) -> Command:
    scene.file("torn/checkpoint-000003/manifest.json", '{"format_version": 1, "step"')
    return scene.processes.trainer(scene.join, "--resume", name="torn")


def _no_checkpoint(scene: Scene) -> Command:
    folder = scene.processes.folder / "nothing-here"
    return scene.processes.start("generate", "generate", f"--join={scene.join}", f"--checkpoint-dir={folder}")


def _corrupt_snapshot(scene: Scene) -> Command:
    scene.file("torn-experts/experts/generation-00000001.json", b"\x00" * 64)
    return scene.processes.peer(scene.join, name="torn-experts")


def _no_key(scene: Scene) -> Command:
    scene.file("no-key/identity.key", "what is this").chmod(0o600)
    return scene.processes.peer(scene.join, name="no-key")


def _no_folder(scene: Scene) -> Command:
    scene.file("a-file", "")
    return scene.processes.peer(scene.join, name="a-file/below")


def _no_report(scene: Scene) -> Command:
    report = scene.file("a-third-file", "").joinpath("report.json")
    return scene.processes.start("local", "local", "--preset=tiny", f"--report={report}")


MISTAKES: dict[str, tuple[Callable[[Scene], Command], int, str]] = {
    "no such preset": (_command("coordinator", "--preset=huge"), 2, "there is no preset 'huge'"),
    "no such setting": (_command("local", "--set=expert.hiden=4"), 2, "did you mean 'expert.hidden'"),
    "no join": (_command("train"), 2, "join is missing"),
    "no address": (_command("peer", "--join=somewhere"), 2, "--join"),
    "not a range": (_peer("range", "--experts=0.3-0.1"), 2, "is not a range"),
    "nat": (_command("local", "--nat"), 2, "--nat: not built yet"),
    "loss": (_command("local", "--loss=2"), 2, "--loss: Input should be less than or equal to 1"),
    "not built": (_command("relay"), 2, "relay is not built yet"),
    "local on no data": (_command("local", "--data=/no/such/text"), 2, "/no/such/text"),
    "local with no report": (_no_report, 2, "--report"),
    "nobody there": (_command("status", "--join=127.0.0.1:1"), 4, "127.0.0.1:1: cannot connect"),
    "nobody lets a peer in": (lambda scene: scene.processes.peer("127.0.0.1:1", name="out"), 4, "cannot connect"),
    "nobody lets a trainer in": (lambda s: s.processes.trainer("127.0.0.1:1", name="out2"), 4, "cannot connect"),
    "wrong key": (_wrong_key, 8, "not the key given; check the address or drop the key"),
    "taken port": (_taken_port, 3, "the port is taken"),
    "taken page": (_taken_page, 3, "cannot serve HTTP on"),
    "missing data": (_trainer("missing-data", "--data=/no/such/text"), 2, "there is no file or folder /no/such/text"),
    "empty data": (_empty_file, 2, "empty.txt holds no bytes to train on"),
    "another run's peer": (_another_runs_peer, 7, "seed: ours 17, theirs 0"),
    "another run's trainer": (_another_runs_trainer, 7, "experts_per_layer: ours 2, theirs 4"),
    "corrupt checkpoint": (_corrupt_checkpoint, 5, "checkpoint-000003 has a damaged manifest.json"),
    "no checkpoint": (_no_checkpoint, 5, "it holds no checkpoint"),
    "corrupt snapshot": (_corrupt_snapshot, 5, "generation-00000001.json"),
    "no key": (_no_key, 2, "is not a private key"),
    "no folder": (_no_folder, 2, "cannot hold our state"),
    "no such expert": (_peer("expert", "--experts=0.9"), 2, "this run has no expert 0.9"),
    "more experts than room": (
        _peer("room", "--experts=0.0-0.2", "--max-experts=2"),
        2,
        "--experts names 3 experts and this peer has room for 2",
    ),
    "too many experts": (_peer("many", "--max-experts=1000000000"), 2, "needs more memory than is free"),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Generator[Scene]:
    with processes(tmp_path_factory.mktemp("mistakes")) as started, socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = started.coordinator()
        assert coordinator.join
        yield Scene(started, coordinator, f"127.0.0.1:{taken.getsockname()[1]}")
        assert coordinator.end(signal.SIGTERM) == 0, coordinator.log()


@pytest.fixture(scope="module")
def endings(scene: Scene) -> Generator[dict[str, Future[tuple[int, Command]]]]:
    """Every mistake's exit code, as they come: a few commands run at a time."""

    def make(mistake: Callable[[Scene], Command]) -> tuple[int, Command]:
        command = mistake(scene)
        return command.wait(), command

    with ThreadPoolExecutor(4) as hands:
        yield {name: hands.submit(make, mistake) for name, (mistake, _, _) in MISTAKES.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_its_exit_code(
    endings: dict[str, Future[tuple[int, Command]]], name: str
) -> None:
    _, expected, sentence = MISTAKES[name]

    code, command = endings[name].result(60)

    assert code == expected, command.log()
    errors = [line for line in command.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors == command.stderr.splitlines()[-1:]
    assert sentence in errors[0]
    assert "Traceback" not in command.stderr
    assert command.stdout.count("\n") <= 1  # at most `joined: RUN`


def test_a_trainer_whom_nobody_serves_waits_and_then_gives_up(scene: Scene) -> None:
    trainer = scene.processes.trainer(scene.join, name="alone", constants=NOBODY_WAITS)

    code = trainer.wait()

    assert code == 6, trainer.log()
    assert trainer.line("nobody serves 4 of 4 experts yet; beginning without")
    assert trainer.stderr.splitlines()[-1].startswith("error: no step succeeded for 2 s; the last: ")
    assert "bring peers back and go on with --resume" in trainer.stderr.splitlines()[-1]
    summary = json.loads((scene.processes.folder / "alone" / "summary.json").read_text())
    assert summary["steps"] == summary["steps_skipped"] > 0
    assert summary["tokens"] == 0


def test_a_trainer_that_waits_for_experts_leaves_when_asked(scene: Scene) -> None:
    trainer = scene.processes.trainer(scene.join, name="impatient")
    trainer.line("joined: ")

    assert trainer.end(signal.SIGTERM, timeout_s=10) == 0, trainer.log()


def test_a_peer_with_less_room_than_before_keeps_the_experts_it_no_longer_hosts(scene: Scene) -> None:
    manifest = scene.manifest
    bank = ExpertBank(manifest.expert, manifest.expert_optimizer, device=torch.device("cpu"), seed=manifest.seed)
    for uid in manifest.uids():
        bank.add(uid)
    folder = SnapshotFolder(scene.processes.folder / "shrunk" / "experts")
    folder.save({uid: bank.state(uid) for uid in bank.uids}, manifest.run_id)

    peer = scene.processes.peer(scene.join, "--max-experts=1", name="shrunk")

    assert peer.join
    assert peer.end() == 0
    assert folder.load_newest(manifest.run_id).states.keys() == set(manifest.uids())


def test_a_peer_falls_back_to_the_older_snapshot_and_says_so(scene: Scene) -> None:
    manifest, uid = scene.manifest, ExpertUid(0, 2)
    bank = ExpertBank(manifest.expert, manifest.expert_optimizer, device=torch.device("cpu"), seed=manifest.seed)
    bank.add(uid)
    folder = SnapshotFolder(scene.processes.folder / "spoiled" / "experts")
    folder.save({uid: bank.state(uid)}, manifest.run_id)
    folder.save({uid: bank.state(uid)}, manifest.run_id)
    scene.file("spoiled/experts/generation-00000002.json", "torn")

    peer = scene.processes.peer(scene.join, "--max-experts=1", name="spoiled")

    assert peer.event("expert.restored")["uid"] == "0.2"
    assert "generation-00000002.json" in peer.event("snapshot.passed_over", level="warning")["reason"]
    assert peer.join
    assert peer.end() == 0
