"""What a coordinator keeps on disk besides its key: the run it owns, and where it last saw members of it."""

import json
from contextlib import suppress
from pathlib import Path

import structlog
from pydantic import TypeAdapter

from experts.atomic_files import write_atomically
from peer.bootstrap import JoinAddress, parse_join
from peer.manifest import RunManifest
from peer.run_folder import keep_run
from peer.transport import PeerId

log = structlog.get_logger(__name__)

MEMBERS_FILE = "members.json"

_JOINS = TypeAdapter(tuple[str, ...])


def own_run(folder: Path, manifest: RunManifest, *, owner: PeerId) -> RunManifest:
    """The manifest in its owner's name, kept in the folder from the first start on.

    Raises ManifestMismatch when the folder holds another run, BadConfiguration when what it holds is no run.
    """
    ours = manifest.model_copy(update={"owner": owner})
    keep_run(folder, ours)
    return ours


def remember_members(folder: Path, joins: tuple[str, ...]) -> None:
    """Keep `HOST:PORT/KEY` of members, so that a restart finds the swarm again. Blocks for a disk write."""
    try:
        write_atomically(folder / MEMBERS_FILE, json.dumps(joins).encode())
    except OSError as error:
        log.warning("members.not_remembered", reason=str(error), consequence="a restart may not find the swarm again")


def remembered_members(folder: Path) -> tuple[JoinAddress, ...]:
    """Where members were; empty when none is known. A file that does not read is as good as none: it is a hint."""
    try:
        texts = _JOINS.validate_json((folder / MEMBERS_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return ()
    joins: list[JoinAddress] = []
    for text in texts:
        with suppress(ValueError):  # one bad line is no reason to forget the others
            joins.append(parse_join(text))
    return tuple(joins)
