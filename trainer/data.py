"""Text as bytes: a file or a folder, cut into what is trained on and what is held out. Knows no model.

The last 5 % of each file are held out. What remains of all files, in order of their paths, is one long stream, and so
is what is held out. Windows are cut from a stream at any byte, so that they may run from one file into the next.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.errors import BadConfiguration

HELD_OUT_SHARE = 0.05
MAPPED_FILES = 64
"""Files mapped at once; a folder may hold more than a process may open."""

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = (_PACKAGE.parent / "data" / "austen.txt", _PACKAGE / "austen.txt")
"""Where the text is in a checkout, and where the wheel has it."""


class DataUnusable(BadConfiguration):
    """The text to train on is missing, empty or too short; says what to do. Exit 2."""


class ByteDataset:
    """Byte windows of S + 1 = context + 1, each giving S tokens and their S targets, one byte later."""

    def __init__(self, root: Path, files: Sequence[tuple[Path, int]], *, context: int) -> None:
        """`files` are paths with sizes in bytes. Raises DataUnusable when either stream is shorter than one window."""
        self._context = context
        held_out = [(path, size, round(size * (1 - HELD_OUT_SHARE))) for path, size in files]
        self._train = _Stream(_Piece(path, 0, cut) for path, _, cut in held_out)
        self._validation = _Stream(_Piece(path, cut, size) for path, size, cut in held_out)
        if min(self._train.size_bytes, self._validation.size_bytes) < context + 1:
            raise DataUnusable(
                f"{root} holds {sum(size for _, size in files)} bytes, too little for a context of {context}: "
                f"give at least {round((context + 2) / HELD_OUT_SHARE)} bytes, or make model.context smaller"
            )
        listing = "\n".join(f"{path.relative_to(root).as_posix()} {size}" for path, size in files)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()[:16]
        """Names and sizes of the files: tells a resumed trainer that its data position means the same text."""

    @classmethod
    def open(cls, path: Path, *, context: int) -> Self:
        """A file, or all regular files below a folder except hidden ones. Raises DataUnusable."""
        try:
            return cls(path, _regular_files(path), context=context)
        except OSError as error:
            raise DataUnusable(
                f"cannot read {error.filename or path}: {error.strerror}; pass another --data"
            ) from error

    @property
    def train_bytes(self) -> int:
        return self._train.size_bytes

    @property
    def validation_bytes(self) -> int:
        return self._validation.size_bytes

    def batch(
        self, step: int, micro_batch: int, *, trainer_shard: int, sequences: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, S), int64, drawn from the training stream with replacement.

        A pure function of its arguments: a trainer that resumes at a step sees what it would have seen.
        `trainer_shard` numbers the run's trainers, so that each draws its own windows.
        """
        name = f"swarmoe batch {seed} {trainer_shard} {step} {micro_batch}"
        rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
        starts = rng.integers(self._train.size_bytes - self._context, size=sequences)
        return self._windows(self._train, starts.tolist())

    def validation_windows(self, limit: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets (W, S), int64: at most `limit` disjoint windows, spread evenly over what is held out."""
        span = self._context + 1
        count = min(limit, self._validation.size_bytes // span)
        stride = self._validation.size_bytes // count
        return self._windows(self._validation, range(0, count * stride, stride))

    def _windows(self, stream: "_Stream", starts: Iterable[int]) -> tuple[Tensor, Tensor]:
        windows_BW = np.stack([stream.read(start, self._context + 1) for start in starts])
        bytes_BW = torch.from_numpy(windows_BW).long()
        return bytes_BW[:, :-1].contiguous(), bytes_BW[:, 1:].contiguous()


def default_data_path() -> Path:
    """The text that ships. Raises DataUnusable where somebody has removed it."""
    for path in _SHIPPED:
        if path.is_file():
            return path
    raise DataUnusable("this installation came without text: pass --data PATH, a file or a folder of files")


@dataclass(frozen=True)
class _Piece:
    path: Path
    start: int
    stop: int


class _Stream:
    """Pieces of files, one after the other, read by position."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self._pieces = [piece for piece in pieces if piece.stop > piece.start]
        self._starts = [0, *accumulate(piece.stop - piece.start for piece in self._pieces)]
        self._map = lru_cache(MAPPED_FILES)(_map_bytes)

    @property
    def size_bytes(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        parts: list[NDArray[np.uint8]] = []
        index = bisect_right(self._starts, start) - 1
        while count > 0:
            piece = self._pieces[index]
            first = piece.start + start - self._starts[index]
            part = self._map(piece.path)[first : min(first + count, piece.stop)]
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        return np.concatenate(parts)


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _regular_files(path: Path) -> list[tuple[Path, int]]:
    if not path.exists():
        raise DataUnusable(f"there is no file or folder {path}; pass --data PATH, a file or a folder of files")
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    visible = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [(file, file.stat().st_size) for file in visible if file.is_file()]
    if not any(size for _, size in files):
        raise DataUnusable(f"{path} holds no bytes to train on; pass --data PATH, a file or a folder of files")
    for file, _ in files:
        file.open("rb").close()  # now rather than in the middle of a run
    return files
