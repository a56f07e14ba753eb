"""A trainer's checkpoints: trunk, optimizer, random state and data position, each folder whole or not there.

Tensors are safetensors, the rest is one JSON manifest with a SHA-256 for each file; there is no pickle. Experts are not
in it: they are as the swarm has them.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import structlog
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from experts.atomic_files import sha256_hex, write_folder_atomically
from peer.errors import CheckpointUnusable, SwarmError
from peer.manifest import RunManifest

FORMAT_VERSION = 1
KEPT = 3
"""Checkpoints that stay: what damaged the newest may have reached the one before."""

_NAME = re.compile(r"checkpoint-(\d{6,})")
_UNFINISHED = re.compile(r"\.checkpoint-\d{6,}\..*")
_PARTS = ("trunk", "optimizer", "random")

log = structlog.get_logger(__name__)


class CheckpointNotSaved(SwarmError):
    """The disk refused. Training goes on; the older checkpoints stand."""


@dataclass(frozen=True)
class TrainerState:
    """All that a trainer needs to go on as if it had never stopped. Tensors are on the CPU after loading."""

    step: int
    """Steps done; the next one's number, counted from 0."""
    tokens: int
    """Tokens trained on."""
    trainer_shard: int
    """With `step` the data position: batches are a pure function of both."""
    data_fingerprint: str
    """Of the text that position is meant in."""
    trunk: Mapping[str, Tensor]
    """`TransformerLM.state_dict()`, routers and their buffers included."""
    optimizer: Mapping[str, Tensor]
    """`TrunkOptimizer.state_tensors()`"""
    random: Mapping[str, Tensor]
    """`random_state()`"""


class _CheckpointManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    run_id: str
    run: dict[str, Any]
    """The run's manifest in full: what was trained, for people and for comparison."""
    step: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]
    trainer_shard: Annotated[int, Field(ge=0)]
    data_fingerprint: str
    sha256: dict[str, str]


class _Unusable(Exception):
    """One checkpoint cannot be used, for this reason: try the one before."""


def save(folder: Path, state: TrainerState, *, run: RunManifest) -> Path:
    """Write a checkpoint into `folder` and drop all but the newest three. Blocks until it is on the disk.

    Raises CheckpointNotSaved; whatever was there before still is. One trainer at a time to a folder.
    """
    files = {f"{part}.safetensors": _to_bytes(getattr(state, part)) for part in _PARTS}
    manifest = _CheckpointManifest(
        run_id=run.run_id,
        run=run.model_dump(mode="json"),
        step=state.step,
        tokens=state.tokens,
        trainer_shard=state.trainer_shard,
        data_fingerprint=state.data_fingerprint,
        sha256={name: sha256_hex(data) for name, data in files.items()},
    )
    files["manifest.json"] = manifest.model_dump_json(indent=2).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep_unfinished(folder)
        existing = _newest_first(folder)
        number = _number(existing[0]) + 1 if existing else 1
        written = folder / f"checkpoint-{number:06}"
        write_folder_atomically(written, files)
    except OSError as error:
        raise CheckpointNotSaved(f"cannot write a checkpoint to {folder}: {error.strerror}") from error
    for old in existing[KEPT - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return written


def holds_checkpoint(folder: Path) -> bool:
    """Usable or not: whether somebody has saved one. Raises CheckpointUnusable when the folder cannot be read."""
    return bool(_candidates(folder))


def load_newest(folder: Path, *, run: RunManifest) -> TrainerState:
    """The newest checkpoint of `folder` that is whole and belongs to `run`; newer ones are skipped with a warning.

    Raises CheckpointUnusable, saying what is wrong with each.
    """
    skipped: list[str] = []
    for candidate in _candidates(folder):
        try:
            return _load(candidate, run)
        except _Unusable as reason:
            skipped.append(f"{candidate.name} {reason}")
            log.warning("checkpoint.skipped", checkpoint=str(candidate), reason=str(reason))
    what = "; ".join(skipped) or "it holds no checkpoint"
    raise CheckpointUnusable(
        f"nothing to resume from in {folder}: {what}; start without --resume, or give another folder"
    )


def random_state() -> dict[str, Tensor]:
    """The state of torch's global generators, for `TrainerState.random`."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` read; generators of devices that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)


def _candidates(folder: Path) -> list[Path]:
    try:
        return _newest_first(folder)
    except OSError as error:
        raise CheckpointUnusable(f"cannot read {folder}: {error.strerror}; give another --checkpoint-dir") from error


def _load(checkpoint: Path, run: RunManifest) -> TrainerState:
    manifest = _read_manifest(checkpoint, run)
    trunk, optimizer, random = (_read_part(checkpoint, f"{part}.safetensors", manifest) for part in _PARTS)
    return TrainerState(
        step=manifest.step,
        tokens=manifest.tokens,
        trainer_shard=manifest.trainer_shard,
        data_fingerprint=manifest.data_fingerprint,
        trunk=trunk,
        optimizer=optimizer,
        random=random,
    )


def _read_manifest(checkpoint: Path, run: RunManifest) -> _CheckpointManifest:
    try:
        tree = json.loads(_read(checkpoint / "manifest.json"))
        version = tree["format_version"] if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise _Unusable(f"has format version {version}, this software reads {FORMAT_VERSION}")
        manifest = _CheckpointManifest.model_validate(tree)
    except (ValueError, KeyError) as error:
        raise _Unusable("has a damaged manifest.json") from error
    if manifest.run_id != run.run_id:
        raise _Unusable(f"belongs to run {manifest.run_id}, not {run.run_id} ({_first_difference(run, manifest.run)})")
    return manifest


def _first_difference(run: RunManifest, other: dict[str, Any]) -> str:
    try:
        differences = run.differences(RunManifest.model_validate(other))
    except ValidationError:
        return "of another version"
    return ", ".join(differences[:3]) or "no field differs"


def _read_part(checkpoint: Path, name: str, manifest: _CheckpointManifest) -> dict[str, Tensor]:
    data = _read(checkpoint / name)
    if sha256_hex(data) != manifest.sha256.get(name):
        raise _Unusable(f"is damaged: {name} is not what was written")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise _Unusable(f"is damaged: {name} is not safetensors") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _Unusable(f"lacks {path.name}: {error.strerror}") from error


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _newest_first(folder: Path) -> list[Path]:
    """By order of saving, not by step: whoever starts anew in an old folder resumes from the new run of the two."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.exists() else []
    return sorted(found, key=_number, reverse=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _sweep_unfinished(folder: Path) -> None:
    """What a killed trainer left half written."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
