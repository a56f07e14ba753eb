"""A trainer's run: exact when resumed, honest about what was skipped, and over when it should be."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.bank import ExpertState
from experts.uid import ExpertUid
from peer.manifest import RunManifest
from tests.swarm import MemorySwarm, local_experts, local_states, local_training_loop, tiny_run, training_loop
from trainer import session as session_module
from trainer.checkpoint import load_newest
from trainer.evaluate import bits_per_byte
from trainer.local_experts import LocalExperts
from trainer.loop import TrainingLoop
from trainer.progress import Progress
from trainer.reports import StepReport
from trainer.scope import evaluating
from trainer.session import Surroundings, TrainingSession
from trainer.summary import TrainerSummary


@dataclass
class Told:
    """What a session says and hears."""

    reports: list[StepReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    stop_after: int | None = None

    def step(self, report: StepReport) -> None:
        """As a screen."""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None: ...

    @property
    def losses(self) -> list[float | None]:
        return [report.train_bits_per_byte for report in self.reports]

    def surroundings(self) -> Surroundings:
        return Surroundings(
            is_stopped=lambda: self.stop_after is not None and len(self.reports) >= self.stop_after,
            experts_alive=lambda: 12,
            wait_for_experts=lambda timeout_s: bool(self.waited_s.append(timeout_s)),
            tell=self.reports.append,
        )


def session(loop: TrainingLoop, folder: Path, told: Told, *, steps: int, manifest: RunManifest) -> TrainingSession:
    return TrainingSession(
        loop,
        manifest,
        folder=folder,
        shard=7,
        steps=steps,
        progress=Progress(told, None),
        surroundings=told.surroundings(),
    )


def trunk_of(loop: TrainingLoop) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loop.model.state_dict().items()}


def carried(states: dict[ExpertUid, ExpertState], manifest: RunManifest) -> LocalExperts:
    experts = local_experts(manifest)
    for uid, state in states.items():
        experts._bank.load(uid, state)
    return experts


# ---- resuming


@pytest.mark.parametrize("preset", ["mixtral", "deepseek_v3", "gshard"])
def test_five_steps_and_five_more_in_a_new_process_are_ten_steps_bit_for_bit(tmp_path: Path, preset: str) -> None:
    manifest = tiny_run(router={"preset": preset, "top_k": 2})
    straight, first, second = Told(), Told(stop_after=5), Told()
    with local_training_loop(manifest) as loop:
        session(loop, tmp_path / "straight", straight, steps=10, manifest=manifest).run()
        expected = trunk_of(loop)

    experts = local_experts(manifest)
    with local_training_loop(manifest, experts) as loop:
        session(loop, tmp_path / "parts", first, steps=10, manifest=manifest).run()
    random_at_five = torch.get_rng_state()
    torch.manual_seed(99)  # a new process draws from elsewhere
    experts = carried(local_states(experts), manifest)
    with local_training_loop(manifest, experts) as loop:
        resumed = session(loop, tmp_path / "parts", second, steps=10, manifest=manifest)
        resumed.resume(load_newest(tmp_path / "parts", run=manifest))
        assert torch.equal(torch.get_rng_state(), random_at_five)
        summary = resumed.run()
        trunk = trunk_of(loop)

    assert first.losses + second.losses == straight.losses
    assert trunk.keys() == expected.keys()
    assert all(torch.equal(trunk[name], expected[name]) for name in expected)
    assert (summary.steps, summary.tokens) == (10, 10 * 64)
    assert [report.tokens for report in second.reports] == [report.tokens for report in straight.reports[5:]]


def test_the_resume_line_says_what_is_exact_and_what_is_not(tmp_path: Path) -> None:
    manifest, told = tiny_run(), Told()
    with local_training_loop(manifest) as loop:
        session(loop, tmp_path, told, steps=1, manifest=manifest).run()
        again = session(loop, tmp_path, told, steps=2, manifest=manifest)

        again.resume(load_newest(tmp_path, run=manifest))

    assert "resumed at step 1: trunk, optimiser, random state and data position exactly" in told.notes[-1]
    assert "experts as the swarm has them now (12 of 12 served)" in told.notes[-1]


def test_other_text_than_the_checkpoints_is_said(tmp_path: Path) -> None:
    manifest, told = tiny_run(), Told()
    with local_training_loop(manifest) as loop:
        session(loop, tmp_path, told, steps=1, manifest=manifest).run()
        loop.data.fingerprint = "another text"

        session(loop, tmp_path, told, steps=2, manifest=manifest).resume(load_newest(tmp_path, run=manifest))

    assert any("the text is not the one" in note for note in told.notes)


def test_resuming_after_the_last_step_trains_no_further(tmp_path: Path) -> None:
    manifest, told = tiny_run(), Told()
    with local_training_loop(manifest) as loop:
        session(loop, tmp_path, Told(), steps=2, manifest=manifest).run()
        again = session(loop, tmp_path, told, steps=2, manifest=manifest)
        again.resume(load_newest(tmp_path, run=manifest))
        before = trunk_of(loop)

        summary = again.run()

        assert told.reports == []
        assert summary.train_bits_per_byte_last is None
        assert summary.val_bits_per_byte is not None
        assert all(torch.equal(value, before[name]) for name, value in trunk_of(loop).items())


# ---- the end


def test_it_ends_with_a_checkpoint_a_validation_and_a_summary(tmp_path: Path) -> None:
    manifest, told = tiny_run(), Told()
    with local_training_loop(manifest) as loop:
        summary = session(loop, tmp_path, told, steps=3, manifest=manifest).run()

        windows = loop.data.validation_windows(session_module.VALIDATION_WINDOWS)
        held_out = bits_per_byte(loop.model, windows, sequences=4, eval_calls=lambda: evaluating(60.0))

    assert load_newest(tmp_path, run=manifest).step == 3
    assert summary.val_bits_per_byte == held_out
    assert (summary.steps, summary.steps_skipped, summary.tokens) == (3, 0, 192)
    assert summary.train_bits_per_byte_first == told.losses[0]
    assert summary.train_bits_per_byte_last == told.losses[-1]
    assert summary.gave_up is None
    assert summary.first_step_unix_s <= summary.last_step_unix_s


def test_a_stop_is_honoured_after_the_step_in_hand_and_loses_nothing(tmp_path: Path) -> None:
    manifest, told = tiny_run(), Told(stop_after=2)
    with local_training_loop(manifest) as loop:
        summary = session(loop, tmp_path, told, steps=10, manifest=manifest).run()

    assert summary.steps == len(told.reports) == 2
    assert summary.val_bits_per_byte is None
    assert load_newest(tmp_path, run=manifest).step == 2


def test_checkpoints_and_validations_come_regularly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CHECKPOINT_EVERY_STEPS", 2)
    monkeypatch.setattr(session_module, "VALIDATE_EVERY_STEPS", 2)
    manifest, told = tiny_run(), Told()
    with local_training_loop(manifest) as loop:
        session(loop, tmp_path, told, steps=5, manifest=manifest).run()

    assert [note.partition(":")[0] for note in told.notes] == [
        "held-out text after 2 steps",
        "held-out text after 4 steps",
        "held-out text after 5 steps",
    ]
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]) == 3


def test_a_disk_that_refuses_ends_no_training(tmp_path: Path) -> None:
    manifest, told, blocked = tiny_run(), Told(), tmp_path / "a file"
    blocked.write_text("not a folder")
    with local_training_loop(manifest) as loop:
        summary = session(loop, blocked, told, steps=2, manifest=manifest).run()

    assert summary.steps == 2
    assert any("training goes on, the older checkpoints stand" in note for note in told.notes)


# ---- with peers that come and go


@pytest.fixture
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm(virtual=True) as swarm:
        swarm.spread_over(3)
        yield swarm


def test_a_skipped_step_is_counted_teaches_nobody_and_is_followed_by_a_pause(
    swarm: MemorySwarm, tmp_path: Path
) -> None:
    told = Told(stop_after=4)

    def silence_at_step_two(report: StepReport) -> None:
        told.reports.append(report)
        for peer in swarm.peers:
            if report.step == 1:
                swarm.faults.take_down(peer.peer_id)
            else:
                swarm.faults.bring_up(peer.peer_id)
                swarm.announce(peer)

    around = told.surroundings()
    around = Surroundings(around.is_stopped, around.experts_alive, around.wait_for_experts, silence_at_step_two)
    with training_loop(swarm) as loop:
        run = TrainingSession(
            loop,
            swarm.manifest,
            folder=tmp_path,
            shard=7,
            steps=10,
            progress=Progress(told, None),
            surroundings=around,
        )
        summary = run.run()

    assert [report.skipped is not None for report in told.reports] == [False, True, False, False]
    assert (summary.steps, summary.steps_skipped, summary.tokens) == (4, 1, 3 * 64)
    assert len(told.waited_s) == 1
    skipped, after = told.reports[1], told.reports[2]
    assert (skipped.tokens, skipped.tokens_per_s, skipped.answered_share) == (64, 0.0, 0.0)
    assert skipped.pairs_lost > 0
    assert (after.answered_share, after.pairs_lost, after.tokens) == (1.0, 0, 128)
    assert summary.pairs["sent"] == summary.pairs["answered"] + summary.pairs["lost"]
    assert summary.lost_by_reason["unreachable"] == summary.pairs["lost"]
    assert summary.bytes_up > 0


def test_when_nothing_answers_for_too_long_it_gives_up_says_why_and_keeps_what_it_has(
    swarm: MemorySwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "GIVE_UP_AFTER_S", 0.0)
    told = Told()
    for peer in swarm.peers:
        swarm.faults.take_down(peer.peer_id)
    with training_loop(swarm) as loop:
        summary = session(loop, tmp_path, told, steps=10, manifest=swarm.manifest).run()

    assert summary.steps == summary.steps_skipped == 1
    assert "no step succeeded" in summary.gave_up
    assert "pairs came back" in summary.gave_up
    assert summary.val_bits_per_byte is None
    assert summary.train_bits_per_byte_first is None
    assert load_newest(tmp_path, run=swarm.manifest).step == 1


def test_validation_is_in_no_counter_and_teaches_nobody(swarm: MemorySwarm, tmp_path: Path) -> None:
    with training_loop(swarm) as loop:
        trained = session(loop, tmp_path, Told(), steps=1, manifest=swarm.manifest)
        summary: TrainerSummary = trained.run()
        versions = swarm.versions()

        trained._validate()

    assert summary.val_bits_per_byte is not None
    assert summary.calls["sent"] == 6
    assert loop.ledger.read().as_report() == {
        name: getattr(summary, name)
        for name in ("calls", "pairs", "lost_by_reason", "backwards", "bytes_up", "bytes_down")
    }
    assert swarm.versions() == versions
    assert max(versions.values()) == 1
