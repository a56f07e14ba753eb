"""Experts on disk: one safetensors file per expert and content, and per generation one manifest that names them.

A generation is complete once its manifest has its name, and every file it names is written before: a crash at any
instant leaves the older generations as they were. Knows nothing of banks. One writer per folder.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor

from experts.atomic_files import sha256_hex, write_atomically
from experts.state import Clock, ExpertState
from experts.uid import ExpertUid, RunId

FORMAT_VERSION = 1
KEPT_GENERATIONS = 3
_MANIFEST_NAME = re.compile(r"generation-(\d{8})\.json")
_EXPERTS_FOLDER = "experts"
_WEIGHT, _MOMENT = "weight/", "moment/"
"""Prefixes of tensor names inside a file."""


class SnapshotUnusable(Exception):
    """The folder holds snapshots, and none of them can be used. The message says what to do."""


class SnapshotNotWritten(OSError):
    """A snapshot could not be written; the older ones stand. The message says what to do."""


class _Saved(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    uid: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    version: Annotated[int, Field(ge=0)]
    rows_learned: Annotated[int, Field(ge=0)]

    @property
    def file_name(self) -> str:
        return f"{self.uid}-{self.sha256[:32]}.safetensors"


class _Generation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    run_id: str
    experts: tuple[_Saved, ...]


@dataclass(frozen=True)
class Restored:
    """What a folder gave back."""

    states: Mapping[ExpertUid, ExpertState]
    """Empty when nothing was ever saved."""
    problems: tuple[str, ...]
    """Why newer generations were passed over, newest first."""


class _Corrupt(Exception):
    """One generation cannot be read; an older one may."""


class SnapshotFolder:
    """The last generations of one run's experts. Methods block on the disk; any thread, one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, states: Mapping[ExpertUid, ExpertState], run_id: RunId) -> None:
        """Write a new generation of exactly these experts; content already there is not written again.

        Raises SnapshotNotWritten (disk full, read-only); the older generations stand.
        """
        try:
            (self._path / _EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
            saved = tuple(self._write_expert(uid, state) for uid, state in sorted(states.items()))
            numbers = self._numbers()
            content = _Generation(run_id=run_id, experts=saved).model_dump()
            manifest = {"content": content, "sha256": sha256_hex(_canonical(content))}
            write_atomically(self._manifest_path(max(numbers, default=0) + 1), json.dumps(manifest, indent=1).encode())
            self._prune()
        except OSError as error:
            raise SnapshotNotWritten(
                error.errno,
                f"could not save the experts to {self._path}: {error.strerror}; free some space there or use another"
                " state folder; until then a restart goes on from the last snapshot that was written",
            ) from error

    def load_newest(self, run_id: RunId) -> Restored:
        """The experts of the newest generation that is whole.

        Raises SnapshotUnusable when there are generations but none is whole, when the newest whole one is of another
        run or format (falling back past it would lose work that is not damaged), or when the folder cannot be read.
        """
        try:
            numbers = self._numbers()
        except OSError as error:
            raise SnapshotUnusable(f"{self._path} cannot be read ({error.strerror}); check its permissions") from error
        problems: list[str] = []
        for number in numbers:
            try:
                return Restored(self._read(number, run_id), tuple(problems))
            except _Corrupt as corrupt:
                problems.append(f"{self._manifest_path(number).name}: {corrupt}")
        if problems:
            raise SnapshotUnusable(
                f"no snapshot in {self._path} is whole ({'; '.join(problems)}); restore the folder from a copy, or"
                " remove it to start these experts afresh"
            )
        return Restored({}, ())

    def _write_expert(self, uid: ExpertUid, state: ExpertState) -> _Saved:
        tensors = {_WEIGHT + name: tensor for name, tensor in state.weights.items()}
        tensors |= {_MOMENT + name: tensor for name, tensor in state.moments.items()}
        data = bytes_from_tensors(tensors)
        saved = _Saved(
            uid=str(uid),
            sha256=sha256_hex(data),
            version=state.clock.version,
            rows_learned=state.clock.rows_learned,
        )
        path = self._path / _EXPERTS_FOLDER / saved.file_name
        if not (path.exists() and sha256_hex(path.read_bytes()) == saved.sha256):  # it may have rotted since
            write_atomically(path, data)
        return saved

    def _read(self, number: int, run_id: RunId) -> dict[ExpertUid, ExpertState]:
        generation = self._read_manifest(number)
        if generation.run_id != run_id:
            raise SnapshotUnusable(
                f"{self._path} holds experts of run {generation.run_id}, not of {run_id}; use a state folder of its"
                " own for each run"
            )
        return {ExpertUid.parse(saved.uid): self._read_expert(saved) for saved in generation.experts}

    def _read_manifest(self, number: int) -> _Generation:
        try:
            manifest = json.loads(self._manifest_path(number).read_bytes())
            content, sha256 = manifest["content"], manifest["sha256"]
            format_version = content["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Corrupt(f"the manifest cannot be read ({error})") from error
        if sha256_hex(_canonical(content)) != sha256:
            raise _Corrupt("the manifest does not match its checksum")
        if format_version != FORMAT_VERSION:
            raise SnapshotUnusable(
                f"{self._path} was written in format {format_version}, and this version reads {FORMAT_VERSION}; use the"
                " version that wrote it, or another state folder"
            )
        try:
            return _Generation.model_validate(content)
        except ValidationError as error:
            raise _Corrupt(f"the manifest is not one ({error.error_count()} bad fields)") from error

    def _read_expert(self, saved: _Saved) -> ExpertState:
        try:
            data = (self._path / _EXPERTS_FOLDER / saved.file_name).read_bytes()
        except OSError as error:
            raise _Corrupt(f"expert {saved.uid} cannot be read ({error.strerror})") from error
        if sha256_hex(data) != saved.sha256:
            raise _Corrupt(f"expert {saved.uid} does not match its checksum ({len(data)} bytes)")
        try:
            tensors = tensors_from_bytes(data)
        except safetensors.SafetensorError as error:
            raise _Corrupt(f"expert {saved.uid} is not a safetensors file ({error})") from error
        clock = Clock(saved.version, saved.rows_learned)
        return ExpertState(_with_prefix(tensors, _WEIGHT), _with_prefix(tensors, _MOMENT), clock)

    def _prune(self) -> None:
        """Drop all but the newest generations, and files that none of these names."""
        numbers = self._numbers()
        for number in numbers[KEPT_GENERATIONS:]:
            self._manifest_path(number).unlink()
        named: set[str] = set()
        for number in numbers[:KEPT_GENERATIONS]:
            try:
                named |= {saved.file_name for saved in self._read_manifest(number).experts}
            except (_Corrupt, SnapshotUnusable):
                continue  # names nothing that could be read back
        for path in (self._path / _EXPERTS_FOLDER).iterdir():
            if path.name not in named:
                path.unlink()
        for path in self._path.glob(".generation-*"):  # cut off while it was written
            path.unlink()

    def _numbers(self) -> list[int]:
        """Generations that have a manifest, newest first."""
        if not self._path.is_dir():
            return []
        matches = (_MANIFEST_NAME.fullmatch(path.name) for path in self._path.iterdir())
        return sorted((int(match[1]) for match in matches if match is not None), reverse=True)

    def _manifest_path(self, number: int) -> Path:
        return self._path / f"generation-{number:08d}.json"


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
