"""Members of a real swarm die without warning while a trainer trains on: SIGKILL in mid-step, and the way back."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import Command, Swarm, processes, start_swarm, until

pytestmark = pytest.mark.process

STEP_TIMEOUT_S = 10.0
STEP_SLACK_S = 5.0
_RUN = (
    "--set=batch.sequences=64",  # steps of a tenth of a second: a kill lands inside one
    "--set=batch.micro_batches=2",
    f"--set=wire.step_timeout_s={STEP_TIMEOUT_S}",
    "--set=wire.call_timeout_s=5",
)


class Training:
    """A trainer at work, and its steps so far."""

    def __init__(self, swarm: Swarm, trainer: Command) -> None:
        self.swarm = swarm
        self.trainer = trainer
        self._metrics = swarm.processes.folder / trainer.name / "metrics.jsonl"

    def steps(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        whole_lines = self._metrics.read_text().splitlines(keepends=True)
        reports = [json.loads(line) for line in whole_lines if line.endswith("\n")]
        return [report for report in reports if "val_bits_per_byte" not in report]

    def after(
        self, num_steps: int, *, all_alive: bool = False, cause: Callable[[], object] = lambda: None
    ) -> list[dict[str, Any]]:
        """The steps from `cause` on, once so many have been trained, with every expert at their end if asked for."""
        known = len(self.steps())
        cause()

        def trained() -> list[dict[str, Any]] | None:
            new = self.steps()[known:]
            good = [step for step in new if step["skipped"] is None]
            alive = good and (good[-1]["experts_alive"], good[-1]["answered_share"]) == (4, 1.0)
            return new if len(good) >= num_steps and (alive or not all_alive) else None

        return until(trained, what=f"{num_steps} steps\n{self.trainer.log()}")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    with processes(tmp_path_factory.mktemp("faults")) as started:
        swarm = start_swarm(started, *_RUN, num_peers=2)
        training = Training(swarm, started.trainer(swarm.join, "--steps=1000000", name="trainer"))
        training.after(5, all_alive=True)
        yield training


@pytest.mark.parametrize("identity", ["new", "same"])
def test_a_peer_killed_in_mid_step_is_missed_and_comes_back_with_what_it_learnt(
    training: Training, identity: str
) -> None:
    started, victim = training.swarm.processes, training.swarm.peers[0]
    folder = started.folder / "peer-0"
    saved = until(lambda: _newest_snapshot(folder), what="a snapshot")
    training.after(1)

    without = training.after(10, cause=victim.kill)
    if identity == "new":
        (folder / "identity.key").unlink()
    again = started.peer(training.swarm.join, "--max-experts=2", name="peer-0")
    training.swarm.peers[0] = again
    whole = training.after(5, all_alive=True)
    restored = [event["uid"] for event in again.events("expert.restored")]

    assert (again.key == victim.key) == (identity == "same")
    assert len(restored) == 2
    assert set(restored) <= {expert["uid"] for expert in saved}  # it may have had more, and given them up
    assert again.events("expert.fresh") == []
    assert min(step["experts_alive"] for step in without) == 2
    _check_steps([*without, *whole])


def test_a_frozen_peer_is_missed_and_welcome_when_it_thaws(training: Training) -> None:
    frozen = psutil.Process(training.swarm.peers[1].process.pid)

    without = training.after(10, cause=frozen.suspend)
    whole = training.after(5, all_alive=True, cause=frozen.resume)

    assert min(step["experts_alive"] for step in without) == 2
    _check_steps([*without, *whole])


def _check_steps(steps: list[dict[str, Any]]) -> None:
    """Each ended by its deadline, and none spoiled the model."""
    ends_s = [step["wall_s"] for step in steps]
    longest_s = max(after - before for before, after in pairwise(ends_s))
    assert longest_s < STEP_TIMEOUT_S + STEP_SLACK_S
    assert all(math.isfinite(step["train_bits_per_byte"]) for step in steps)


def test_training_goes_on_without_its_coordinator_and_its_counters_add_up(training: Training) -> None:
    coordinator, trainer = training.swarm.coordinator, training.trainer

    steps = training.after(10, cause=coordinator.kill)
    code = trainer.end(signal.SIGTERM)

    assert code == 0, trainer.log()
    _check_steps(steps)
    assert all(step["skipped"] is None for step in steps)
    summary = json.loads((training.swarm.processes.folder / "trainer" / "summary.json").read_text())
    calls, pairs, backwards = summary["calls"], summary["pairs"], summary["backwards"]
    assert calls["sent"] == calls["answered"] + calls["lost"]
    assert pairs["sent"] == pairs["answered"] + pairs["lost"] == 2 * 2 * 64 * 32 * summary["steps"]
    assert pairs["lost"] == sum(summary["lost_by_reason"].values())
    assert backwards["sent"] == backwards["applied"] + backwards["lost"] + backwards["stale"]
    assert pairs["lost"] + backwards["lost"] > 0  # peers were killed while it trained
    assert summary["train_bits_per_byte_last"] < summary["train_bits_per_byte_first"]


def test_a_peer_leaves_in_time_though_the_coordinator_is_dead(training: Training) -> None:
    for peer in training.swarm.peers:
        assert peer.end(signal.SIGTERM, timeout_s=10) == 0, peer.log()


def _newest_snapshot(folder: Path) -> list[dict[str, Any]] | None:
    generations = sorted((folder / "experts").glob("generation-*.json"))
    return json.loads(generations[-1].read_text())["content"]["experts"] if generations else None
