"""A trainer goes on exactly where a whole checkpoint says, and never from half of one."""

import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.settings import ExpertShape
from peer.manifest import ModelSettings, RunManifest, TrunkOptimizerSettings
from tests.full_disk import largest_file_bytes
from tests.tiny_trunk import tiny_trunk
from trainer.checkpoint import (
    KEPT,
    CheckpointNotSaved,
    CheckpointUnusable,
    TrainerState,
    holds_checkpoint,
    load_newest,
    random_state,
    restore_random_state,
    save,
)
from trainer.data import ByteDataset
from trainer.evaluate import bits_per_byte
from trainer.model import TransformerLM
from trainer.trunk_optimizer import TrunkOptimizer

RUN = RunManifest(expert=ExpertShape(dim=8, hidden=8), model=ModelSettings(dim=8))
BEYOND = torch.finfo(torch.float32).max


def state(step: int = 7) -> TrainerState:
    return TrainerState(
        step=step,
        tokens=step * 100,
        trainer_shard=1,
        data_fingerprint="abc",
        trunk={"w": torch.full((4, 4), float(step)), "count": torch.tensor(step)},
        optimizer={"w/exp_avg": torch.tensor([BEYOND, -0.0, 1e-45])},
        random={"cpu": torch.arange(8, dtype=torch.uint8)},
    )


def same_tensors(ours: TrainerState, theirs: TrainerState) -> bool:
    pairs = [(getattr(ours, part), getattr(theirs, part)) for part in ("trunk", "optimizer", "random")]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def change_manifest(checkpoint: Path, **fields: object) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_was_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path / "new" / "folder", state(), run=RUN)

    loaded = load_newest(tmp_path / "new" / "folder", run=RUN)

    assert same_tensors(loaded, state())
    assert replace(loaded, trunk={}, optimizer={}, random={}) == replace(state(), trunk={}, optimizer={}, random={})


def test_the_newest_three_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, state(step), run=RUN)

    assert len(list(tmp_path.iterdir())) == KEPT == 3
    assert load_newest(tmp_path, run=RUN).step == 5


def test_the_newest_is_the_last_saved_even_when_its_step_is_lower(tmp_path: Path) -> None:
    for step in (300, 400, 10):
        save(tmp_path, state(step), run=RUN)

    assert load_newest(tmp_path, run=RUN).step == 10


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "identity.key").write_text("mine")
    (tmp_path / "checkpoint-notes.txt").write_text("mine too")

    for step in range(5):
        save(tmp_path, state(step), run=RUN)

    assert (tmp_path / "identity.key").exists()
    assert (tmp_path / "checkpoint-notes.txt").exists()


def test_what_a_killed_trainer_left_half_written_is_ignored_then_swept(tmp_path: Path) -> None:
    save(tmp_path, state(1), run=RUN)
    unfinished = tmp_path / ".checkpoint-000002.x8k2"
    unfinished.mkdir()
    (unfinished / "trunk.safetensors").write_bytes(b"half")

    step_before = load_newest(tmp_path, run=RUN).step
    save(tmp_path, state(2), run=RUN)

    assert step_before == 1
    assert not unfinished.exists()


# --- damage ---------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (lambda c: flip_a_bit(c / "optimizer.safetensors"), "optimizer.safetensors is not what was written"),
    "truncation": (lambda c: os.truncate(c / "trunk.safetensors", 50), "trunk.safetensors is not what was written"),
    "zero length": (lambda c: os.truncate(c / "random.safetensors", 0), "random.safetensors is not what was written"),
    "missing part": (lambda c: (c / "trunk.safetensors").unlink(), "lacks trunk.safetensors: No such file"),
    "missing manifest": (lambda c: (c / "manifest.json").unlink(), "lacks manifest.json: No such file"),
    "empty manifest": (lambda c: os.truncate(c / "manifest.json", 0), "has a damaged manifest.json"),
    "cut manifest": (lambda c: os.truncate(c / "manifest.json", 40), "has a damaged manifest.json"),
    "no text": (lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"), "has a damaged manifest.json"),
    "negative step": (lambda c: change_manifest(c, step=-1), "has a damaged manifest.json"),
    "no object": (lambda c: (c / "manifest.json").write_text("[1]"), "has format version None, this software reads 1"),
    "wrong version": (lambda c: change_manifest(c, format_version=2), "has format version 2, this software reads 1"),
    "no digest": (lambda c: change_manifest(c, sha256={}), "trunk.safetensors is not what was written"),
}


@pytest.mark.hostile
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_named_when_it_is_the_only_one(
    tmp_path: Path, damage: str
) -> None:
    do_damage, sentence = DAMAGES[damage]
    older = save(tmp_path, state(1), run=RUN)
    newest = save(tmp_path, state(2), run=RUN)
    do_damage(newest)

    fallen_back_to = load_newest(tmp_path, run=RUN).step
    older.rename(tmp_path / "moved-away")

    assert fallen_back_to == 1
    with pytest.raises(CheckpointUnusable, match=f"checkpoint-000002 .*{sentence}.*start without --resume"):
        load_newest(tmp_path, run=RUN)


@pytest.mark.hostile
def test_a_checkpoint_of_another_run_is_refused_and_the_field_that_differs_is_named(tmp_path: Path) -> None:
    save(tmp_path, state(), run=RUN)
    other = RUN.model_copy(update={"seed": 5})

    with pytest.raises(CheckpointUnusable, match=r"belongs to run \w+, not \w+ \(seed: ours 5, theirs 0\)"):
        load_newest(tmp_path, run=other)


@pytest.mark.hostile
def test_a_checkpoint_of_another_version_of_the_manifest_says_so(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, state(), run=RUN)
    change_manifest(checkpoint, run_id="0" * 32, run={"protocol_version": 99})

    with pytest.raises(CheckpointUnusable, match=r"belongs to run 0{32}, .*of another version"):
        load_newest(tmp_path, run=RUN)


@pytest.mark.hostile
def test_an_empty_or_missing_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointUnusable, match="it holds no checkpoint; start without --resume"):
            load_newest(folder, run=RUN)
        assert not holds_checkpoint(folder)


@pytest.mark.hostile
def test_a_checkpoint_that_cannot_be_used_is_not_taken_for_none(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, state(), run=RUN)
    (checkpoint / "trunk.safetensors").unlink()

    assert holds_checkpoint(tmp_path)


@pytest.mark.hostile
def test_a_file_where_the_folder_should_be_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointUnusable, match=r"cannot read .*file: Not a directory"):
        load_newest(tmp_path / "file", run=RUN)


# --- a disk that refuses --------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Generator[None]:
    """Root may write anywhere; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.hostile
def test_a_full_disk_costs_the_new_checkpoint_and_no_old_one(tmp_path: Path) -> None:
    for step in range(1, 4):
        save(tmp_path, state(step), run=RUN)
    large = replace(state(4), trunk={"w": torch.zeros(100, 100)})

    with largest_file_bytes(8000), pytest.raises(CheckpointNotSaved, match=r"cannot write .*: File too large"):
        save(tmp_path, large, run=RUN)

    assert len(list(tmp_path.iterdir())) == 3
    assert same_tensors(load_newest(tmp_path, run=RUN), state(3))


@pytest.mark.hostile
def test_a_read_only_folder_is_said_and_nothing_in_it_is_lost(tmp_path: Path) -> None:
    save(tmp_path, state(1), run=RUN)
    tmp_path.chmod(0o500)

    with nobody(), pytest.raises(CheckpointNotSaved, match=r"cannot write a checkpoint to .*: Permission denied"):
        save(tmp_path, state(2), run=RUN)

    tmp_path.chmod(0o700)
    assert load_newest(tmp_path, run=RUN).step == 1


# --- resuming -------------------------------------------------------------------------------------------------


class Training:
    """A trunk, its optimizer and its data, with noise from the global generator in each step."""

    def __init__(self, data: ByteDataset) -> None:
        self.model: TransformerLM = tiny_trunk()
        settings = TrunkOptimizerSettings(warmup_steps=0, decay_steps=20)
        self.optimizer = TrunkOptimizer(
            dict(self.model.named_parameters()), routers=self.model.router_parameters(), settings=settings
        )
        self.data = data

    def run(self, steps: range) -> None:
        for step in steps:
            tokens_BS, targets_BS = self.data.batch(step, 0, trainer_shard=0, sequences=2, seed=0)
            loss, num_tokens = self.model.loss_sum(tokens_BS, targets_BS)
            noisy_loss = loss / num_tokens * torch.rand(())
            self.optimizer.update(torch.autograd.grad(noisy_loss, self.optimizer.parameters), step=step)

    def state(self, step: int) -> TrainerState:
        return replace(
            state(step),
            trunk=self.model.state_dict(),
            optimizer=self.optimizer.state_tensors(),
            random=random_state(),
        )

    def restore(self, saved: TrainerState) -> None:
        self.model.load_state_dict(dict(saved.trunk))
        self.optimizer.load_state_tensors(saved.optimizer)
        restore_random_state(saved.random)


@pytest.fixture
def data(tmp_path: Path) -> ByteDataset:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(index * 7 % 256 for index in range(2000)))
    return ByteDataset.open(path, context=8)


def test_a_resumed_trainer_does_exactly_what_one_that_never_stopped_does(tmp_path: Path, data: ByteDataset) -> None:
    torch.manual_seed(11)
    steady = Training(data)
    steady.run(range(3))
    save(tmp_path, steady.state(3), run=RUN)
    steady.run(range(3, 6))
    torch.manual_seed(12)
    resumed = Training(data)

    saved = load_newest(tmp_path, run=RUN)
    resumed.restore(saved)
    resumed.run(range(saved.step, 6))

    ours, theirs = resumed.state(6), steady.state(6)
    assert same_tensors(ours, theirs)
    windows: tuple[Tensor, Tensor] = data.validation_windows(4)
    assert bits_per_byte(resumed.model, windows, sequences=4, eval_calls=nullcontext) == bits_per_byte(
        steady.model, windows, sequences=4, eval_calls=nullcontext
    )
