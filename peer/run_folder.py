"""Ties a state folder to the run it was first used for: what is saved in it belongs to that run alone."""

from pathlib import Path

from pydantic import ValidationError

from experts.atomic_files import write_atomically
from peer.errors import BadConfiguration, ManifestMismatch
from peer.manifest import RunManifest

RUN_FILE = "run.json"


def keep_run(folder: Path, manifest: RunManifest) -> None:
    """Remember the folder's run at its first use, and insist on it afterwards. Blocks for a disk write.

    Raises ManifestMismatch naming the fields that differ, BadConfiguration when what the folder holds is no run.
    """
    path = folder / RUN_FILE
    if not path.exists():
        write_atomically(path, manifest.canonical_json())
        return
    try:
        kept = RunManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadConfiguration(f"{path} is no run of this version; move it away to start afresh") from error
    if differences := kept.differences(manifest):
        raise ManifestMismatch(
            f"{folder} holds the run {kept.name} ({kept.run_id}), which is another one: {'; '.join(differences)} "
            "(ours: the folder's). Go on with that run, or give another folder"
        )
