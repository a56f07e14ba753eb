"""The same arguments always draw the same windows, and nothing held out is ever trained on."""

from pathlib import Path

import pytest
import torch

from trainer.data import ByteDataset, DataUnusable, default_data_path

CONTEXT = 8


def write_counting_file(path: Path, size: int, *, first: int = 0) -> Path:
    """Bytes that say where they are: first, first + 1, ... modulo 251."""
    path.write_bytes(bytes((first + index) % 251 for index in range(size)))
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> ByteDataset:
    return ByteDataset.open(write_counting_file(tmp_path / "a.txt", 2000), context=CONTEXT)


def draw(dataset: ByteDataset, step: int = 0, micro_batch: int = 0, *, trainer_shard: int = 0, seed: int = 0):
    return dataset.batch(step, micro_batch, trainer_shard=trainer_shard, sequences=4, seed=seed)


def test_targets_are_the_tokens_one_byte_later(dataset: ByteDataset) -> None:
    tokens_BS, targets_BS = draw(dataset)

    assert tokens_BS.shape == targets_BS.shape == (4, CONTEXT)
    assert tokens_BS.dtype == targets_BS.dtype == torch.int64
    assert torch.equal(targets_BS, (tokens_BS + 1) % 251)


def test_a_batch_depends_on_its_arguments_alone(tmp_path: Path, dataset: ByteDataset) -> None:
    draw(dataset, step=6)
    torch.manual_seed(123)

    tokens_BS, _ = draw(dataset, step=7, micro_batch=1, trainer_shard=2, seed=-3)
    again_BS, _ = draw(
        ByteDataset.open(tmp_path / "a.txt", context=CONTEXT), step=7, micro_batch=1, trainer_shard=2, seed=-3
    )

    assert torch.equal(tokens_BS, again_BS)


@pytest.mark.parametrize("change", [{"step": 1}, {"micro_batch": 1}, {"trainer_shard": 1}, {"seed": 1}])
def test_each_step_micro_batch_trainer_and_seed_draws_its_own_windows(
    dataset: ByteDataset, change: dict[str, int]
) -> None:
    tokens_BS, _ = draw(dataset)

    other_BS, _ = draw(dataset, **change)

    assert not torch.equal(tokens_BS, other_BS)


def test_every_training_byte_is_drawn_and_no_held_out_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(190)) + bytes([255] * 10))

    dataset = ByteDataset.open(path, context=CONTEXT)
    drawn = {byte for step in range(100) for window in draw(dataset, step) for byte in window.flatten().tolist()}

    assert drawn == set(range(190))
    assert (dataset.train_bytes, dataset.validation_bytes) == (190, 10)


def test_validation_windows_are_disjoint_and_spread_over_what_is_held_out(dataset: ByteDataset) -> None:
    tokens_WS, targets_WS = dataset.validation_windows(limit=3)
    all_WS, _ = dataset.validation_windows(limit=1000)

    held_out_start = 1900 % 251
    assert tokens_WS[:, 0].tolist() == [(held_out_start + offset) % 251 for offset in (0, 33, 66)]
    assert torch.equal(targets_WS, (tokens_WS + 1) % 251)
    assert len(all_WS) == 100 // (CONTEXT + 1)


def test_every_file_of_a_folder_gives_up_its_own_end(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"b" * 190 + b"Y" * 10)
    (tmp_path / "sub" / "a.txt").write_bytes(b"a" * 95 + b"X" * 5)
    (tmp_path / ".hidden").write_bytes(b"!" * 1000)

    dataset = ByteDataset.open(tmp_path, context=CONTEXT)
    held_out_WS, _ = dataset.validation_windows(limit=10)
    trained_on = {byte for step in range(50) for byte in draw(dataset, step)[0].flatten().tolist()}

    assert trained_on == set(b"ab")
    assert bytes(held_out_WS.flatten().tolist()) == b"Y" * 8
    assert (dataset.train_bytes, dataset.validation_bytes) == (285, 15)


def test_windows_run_from_one_file_into_the_next(tmp_path: Path) -> None:
    for index in range(120):
        write_counting_file(tmp_path / f"{index:03}.txt", 20, first=index * 19)

    dataset = ByteDataset.open(tmp_path, context=100)
    tokens_BS, targets_BS = draw(dataset)

    assert torch.equal(targets_BS, (tokens_BS + 1) % 251)


def test_more_files_than_may_be_open_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.MAPPED_FILES", 2)
    for index in range(10):
        write_counting_file(tmp_path / f"{index}.txt", 100, first=index * 95)

    dataset = ByteDataset.open(tmp_path, context=32)

    assert all(torch.equal(targets, (tokens + 1) % 251) for tokens, targets in (draw(dataset, s) for s in range(20)))


def test_the_fingerprint_tells_other_text_from_the_same(tmp_path: Path) -> None:
    first = ByteDataset.open(write_counting_file(tmp_path / "a.txt", 2000), context=CONTEXT).fingerprint
    same = ByteDataset.open(tmp_path / "a.txt", context=CONTEXT).fingerprint

    other = ByteDataset.open(write_counting_file(tmp_path / "a.txt", 2001), context=CONTEXT).fingerprint

    assert first == same != other


@pytest.mark.hostile
def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataUnusable, match=r"there is no file or folder .*nowhere.txt; pass --data PATH"):
        ByteDataset.open(tmp_path / "nowhere.txt", context=CONTEXT)


@pytest.mark.hostile
def test_an_empty_file_and_an_empty_folder_hold_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()

    for path in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(DataUnusable, match="holds no bytes to train on; pass --data PATH"):
            ByteDataset.open(path, context=CONTEXT)


@pytest.mark.hostile
def test_a_text_too_short_for_the_context_says_how_much_is_needed(tmp_path: Path) -> None:
    path = write_counting_file(tmp_path / "a.txt", 150)

    with pytest.raises(DataUnusable, match="150 bytes, too little for a context of 8: give at least 200 bytes"):
        ByteDataset.open(path, context=CONTEXT)
    assert ByteDataset.open(write_counting_file(path, 200), context=CONTEXT).validation_bytes == 10


@pytest.mark.hostile
def test_what_is_neither_file_nor_folder_is_refused() -> None:
    with pytest.raises(DataUnusable, match="/dev/zero holds no bytes"):
        ByteDataset.open(Path("/dev/zero"), context=CONTEXT)


def test_the_checkout_brings_its_own_text() -> None:
    dataset = ByteDataset.open(default_data_path(), context=256)

    assert dataset.train_bytes + dataset.validation_bytes == 4_025_023


def test_without_the_shipped_text_one_is_told_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data._SHIPPED", (tmp_path / "austen.txt",))

    with pytest.raises(DataUnusable, match="pass --data PATH"):
        default_data_path()
