"""What a coordinator keeps on disk besides its key: the run it owns, and where it last saw members of it."""

import json
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from experts.atomic_files import write_atomically
from peer.bootstrap import JoinAddress, parse_join
from peer.errors import BadConfiguration, ManifestMismatch
from peer.manifest import RunManifest
from peer.transport import PeerId

log = structlog.get_logger(__name__)

RUN_FILE = "run.json"
MEMBERS_FILE = "members.json"

_JOINS = TypeAdapter(tuple[str, ...])


def own_run(folder: Path, manifest: RunManifest, *, owner: PeerId) -> RunManifest:
    """The manifest in its owner's name, kept in the folder from the first start on.

    Raises ManifestMismatch when the folder holds another run, BadConfiguration when what it holds is no run.
    """
    ours = manifest.model_copy(update={"owner": owner})
    path = folder / RUN_FILE
    if not path.exists():
        write_atomically(path, ours.canonical_json())
        return ours
    try:
        kept = RunManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadConfiguration(f"{path} is no run of this version; move it away to start a new run") from error
    if differences := ours.differences(kept):
        raise ManifestMismatch(
            f"{folder} holds the run {kept.name} ({kept.run_id}), which is another one: {'; '.join(differences)} "
            "(theirs: the folder's). Start that run, or give another --state-dir"
        )
    return kept


def remember_members(folder: Path, joins: tuple[str, ...]) -> None:
    """Keep `HOST:PORT/KEY` of members, so that a restart finds the swarm again. Blocks for a disk write."""
    try:
        write_atomically(folder / MEMBERS_FILE, json.dumps(joins).encode())
    except OSError as error:
        log.warning("members.not_remembered", reason=str(error), consequence="a restart may not find the swarm again")


def remembered_members(folder: Path) -> tuple[JoinAddress, ...]:
    """Where members were; empty when none is known. A file that does not read is as good as none: it is a hint."""
    try:
        return tuple(map(parse_join, _JOINS.validate_json((folder / MEMBERS_FILE).read_bytes())))
    except (FileNotFoundError, ValueError):
        return ()
