"""Snapshots survive what happens to disks: the newest whole generation comes back, with why no newer one did."""

import errno
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from experts.atomic_files import sha256_hex
from experts.snapshots import KEPT_GENERATIONS, SnapshotFolder, SnapshotNotWritten, SnapshotUnusable
from experts.state import Clock, ExpertState
from experts.uid import ExpertUid, RunId

RUN = RunId("a" * 32)
A, B = ExpertUid(0, 0), ExpertUid(1, 12)


def expert(version: int) -> ExpertState:
    """A state that differs from version to version."""
    generator = torch.Generator().manual_seed(version)
    weight = torch.randn(3, 4, generator=generator)
    return ExpertState(
        {"up.weight": weight}, {"exp_avg.up.weight": weight * 2, "exp_avg_sq.up.weight": weight**2}, Clock(version, 9)
    )


def same(first: ExpertState, second: ExpertState) -> bool:
    pairs = ((first.weights, second.weights), (first.moments, second.moments))
    return first.clock == second.clock and all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) for one, two in pairs
    )


def expert_files(path: Path, uid: ExpertUid) -> list[Path]:
    """Oldest first."""
    return sorted((path / "experts").glob(f"{uid}-*"), key=lambda file: file.stat().st_mtime_ns)


def manifests(path: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path.glob("generation-*.json"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with two generations of two experts, versions 1 and 2."""
    folder = SnapshotFolder(tmp_path)
    folder.save({A: expert(1), B: expert(11)}, RUN)
    folder.save({A: expert(2), B: expert(12)}, RUN)
    return tmp_path


def assert_generation(path: Path, version: int, *reasons: str) -> None:
    restored = SnapshotFolder(path).load_newest(RUN)
    assert restored.states.keys() == {A, B}
    assert same(restored.states[A], expert(version))
    assert same(restored.states[B], expert(version + 10))
    assert len(restored.problems) == len(reasons)
    assert all(reason in problem for reason, problem in zip(reasons, restored.problems, strict=True))


def test_what_was_saved_comes_back(saved: Path) -> None:
    assert_generation(saved, 2)


def test_a_folder_nothing_was_saved_in_is_no_problem(tmp_path: Path) -> None:
    restored = SnapshotFolder(tmp_path / "not made yet").load_newest(RUN)

    assert (dict(restored.states), restored.problems) == ({}, ())


def test_a_generation_without_experts_comes_back_empty(saved: Path) -> None:
    SnapshotFolder(saved).save({}, RUN)

    assert SnapshotFolder(saved).load_newest(RUN).states == {}


def test_the_last_generations_are_kept_and_nothing_else(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    for version in range(KEPT_GENERATIONS + 2):
        folder.save({A: expert(version), B: expert(99)}, RUN)

    assert [file.name[-7:] for file in manifests(tmp_path)] == ["03.json", "04.json", "05.json"]
    assert len(expert_files(tmp_path, A)) == KEPT_GENERATIONS
    assert len(expert_files(tmp_path, B)) == 1


def test_an_expert_that_did_not_change_is_not_written_again(saved: Path) -> None:
    before = {file.name: file.stat().st_ino for file in (saved / "experts").iterdir()}

    SnapshotFolder(saved).save({A: expert(3), B: expert(12)}, RUN)

    after = {file.name: file.stat().st_ino for file in (saved / "experts").iterdir()}
    assert len(after.keys() - before.keys()) == 1
    assert all(after[name] == inode for name, inode in before.items())


def test_an_unchanged_expert_whose_file_rotted_is_written_again(saved: Path) -> None:
    flip_a_bit(expert_files(saved, B)[-1])

    SnapshotFolder(saved).save({A: expert(2), B: expert(12)}, RUN)

    assert_generation(saved, 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lose(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip_a_bit, "checksum"), (truncate, "checksum"), (empty, "0 bytes"), (lose, "cannot be read")],
)
def test_a_damaged_expert_file_brings_the_older_generation_back(saved: Path, damage: object, reason: str) -> None:
    assert callable(damage)
    damage(expert_files(saved, B)[-1])

    assert_generation(saved, 1, reason)


def change_a_number(file: Path) -> None:
    file.write_text(file.read_text().replace('"version": 2', '"version": 3'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(change_a_number, "checksum"), (truncate, "cannot be read"), (empty, "cannot be read")],
)
def test_a_damaged_manifest_brings_the_older_generation_back(saved: Path, damage: object, reason: str) -> None:
    assert callable(damage)
    damage(manifests(saved)[-1])

    assert_generation(saved, 1, reason)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"content": 1, "sha256": ""}', '{"content": {}, "sha256": 1}', "\x00"]
)
def test_a_manifest_that_is_something_else_is_passed_over(saved: Path, text: str) -> None:
    (saved / "generation-00000003.json").write_text(text)

    assert_generation(saved, 2, "cannot be read")


@pytest.mark.hostile
def test_a_manifest_cannot_point_outside_the_folder(saved: Path) -> None:
    rewrite_manifest(manifests(saved)[-1], lambda content: content["experts"][0].update(uid="../../0.1"))

    assert_generation(saved, 1, "bad fields")


def test_when_no_generation_is_whole_it_says_so_and_what_to_do(saved: Path) -> None:
    for manifest in manifests(saved):
        empty(manifest)

    with pytest.raises(
        SnapshotUnusable, match=r"no snapshot in .* is whole .*00000002.*00000001.*; restore the folder"
    ):
        SnapshotFolder(saved).load_newest(RUN)


def test_another_runs_folder_is_refused(saved: Path) -> None:
    with pytest.raises(SnapshotUnusable, match=f"holds experts of run {RUN}, not of {'b' * 32}; use a state folder"):
        SnapshotFolder(saved).load_newest(RunId("b" * 32))


def test_a_newer_format_is_refused_not_passed_over(saved: Path) -> None:
    rewrite_manifest(manifests(saved)[-1], lambda content: content.update(format_version=2, more="fields"))

    with pytest.raises(SnapshotUnusable, match="written in format 2, and this version reads 1"):
        SnapshotFolder(saved).load_newest(RUN)


def rewrite_manifest(file: Path, change: object) -> None:
    """As a program that knows the checksum rule would."""
    assert callable(change)
    content = json.loads(file.read_text())["content"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    file.write_text(json.dumps({"content": content, "sha256": sha256_hex(canonical)}))


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """No file may grow further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [0, 100])
def test_a_full_disk_is_said_and_leaves_the_older_generations(saved: Path, size_bytes: int) -> None:
    before = {file.name for file in saved.rglob("*")}

    with files_end_at(size_bytes), pytest.raises(SnapshotNotWritten, match="free some space there") as raised:
        SnapshotFolder(saved).save({A: expert(3), B: expert(13)}, RUN)

    assert raised.value.errno == errno.EFBIG
    assert {file.name for file in saved.rglob("*")} == before
    assert_generation(saved, 2)


def test_a_disk_that_fills_between_the_files_leaves_the_older_generations_and_the_next_save_clears_up(
    saved: Path,
) -> None:
    large = ExpertState({"up.weight": torch.zeros(100, 100)}, {}, Clock(3, 9))
    folder = SnapshotFolder(saved)

    with files_end_at(10_000), pytest.raises(SnapshotNotWritten):
        folder.save({A: expert(3), B: large}, RUN)
    assert_generation(saved, 2)
    folder.save({A: expert(4), B: expert(14)}, RUN)

    assert_generation(saved, 4)
    assert len(list((saved / "experts").iterdir())) == 6


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere; run as nobody meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_folder_is_said_and_still_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # the parents of tmp_path are closed to others
        path = Path(name)
        SnapshotFolder(path).save({A: expert(2), B: expert(12)}, RUN)
        for file in path.rglob("*"):
            file.chmod(0o555)
        path.chmod(0o555)

        with unprivileged():
            with pytest.raises(SnapshotNotWritten, match="Permission denied; free some space there or use another"):
                SnapshotFolder(path).save({A: expert(3), B: expert(13)}, RUN)
            assert_generation(path, 2)

        for folder in (path, path / "experts"):
            folder.chmod(0o755)


def test_a_folder_that_may_not_be_listed_is_said() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o311)

        with unprivileged(), pytest.raises(SnapshotUnusable, match=r"cannot be read .*check its permissions"):
            SnapshotFolder(path).load_newest(RUN)


def test_a_crash_before_the_manifest_leaves_the_older_generation_and_no_litter_after_the_next_save(
    saved: Path,
) -> None:
    (saved / "experts" / ".0.0-cut.safetensors.x7").write_bytes(b"half")
    (saved / "experts" / f"{A}-{'0' * 32}.safetensors").write_bytes(b"whole, but named by no manifest")
    (saved / ".generation-00000003.json.x7").write_bytes(b"{")
    assert_generation(saved, 2)

    SnapshotFolder(saved).save({A: expert(3), B: expert(13)}, RUN)

    assert_generation(saved, 3)
    assert len(list((saved / "experts").iterdir())) == 6
    assert {file.name for file in saved.iterdir()} == {"experts", *(manifest.name for manifest in manifests(saved))}
