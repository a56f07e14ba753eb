"""A crash or a full disk leaves what was there before."""

from pathlib import Path

import pytest

from experts.atomic_files import sha256_hex, write_atomically, write_folder_atomically
from tests.full_disk import largest_file_bytes


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    write_atomically(path, b"new and longer")

    assert path.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    with largest_file_bytes(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, b"x" * 5000)

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "000001"

    write_folder_atomically(folder, {"a": b"1", "b": b"2"})

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_did_not_fit_is_not_there_at_all(tmp_path: Path) -> None:
    with largest_file_bytes(1000), pytest.raises(OSError, match="File too large"):
        write_folder_atomically(tmp_path / "000001", {"fits": b"1", "does_not": b"x" * 5000})

    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_never_overwritten(tmp_path: Path) -> None:
    write_folder_atomically(tmp_path / "000001", {"a": b"1"})

    with pytest.raises(OSError, match="not empty"):
        write_folder_atomically(tmp_path / "000001", {"a": b"2"})

    assert (tmp_path / "000001" / "a").read_bytes() == b"1"


def test_the_digest_is_sha_256_in_hex() -> None:
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
