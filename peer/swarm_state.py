"""The swarm at one moment, as people and programs read it: `/api/state` and `swarmoe status --json` print this model.

Pure: a directory snapshot in, facts out. Refuses to know what changed since the last one.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from experts.uid import ExpertUid
from peer.manifest import RunManifest
from peer.records import PeerFlag, PeerRecord, PeerState, TrainerRecord
from peer.snapshot import DirectorySnapshot, Replica


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class PeerFacts(_Facts):
    """One peer."""

    peer_id: str
    state: PeerState
    flags: tuple[PeerFlag, ...]
    experts: tuple[str, ...]
    """The uids of this run it says it holds, in order."""
    endpoint: str
    throughput_tokens_per_s: float
    version: str
    """Of its software."""
    device: str
    queued_rows: int


class ExpertFacts(_Facts):
    """One expert of the run."""

    uid: str
    replicas: tuple[str, ...]
    """Peers that serve it now, the primary first."""
    primary: str | None
    version: int | None
    """Optimiser steps the primary has taken; none when nobody serves it."""
    load: int
    """Rows waiting at the primary, whichever expert they are for."""
    rows_served: int


class TrainerFacts(_Facts):
    """One trainer."""

    peer_id: str
    state: PeerState
    step: int
    loss: float | None
    """Bits per byte of its last step."""
    tokens_per_s: float
    answered_share: float


class SwarmState(_Facts):
    """Everything there is to know about a run from its records."""

    run: str
    """The run id."""
    name: str
    at_unix_s: float
    peers: tuple[PeerFacts, ...]
    experts: tuple[ExpertFacts, ...]
    """Every expert the manifest names, served or not, in order."""
    trainers: tuple[TrainerFacts, ...]
    uncovered: tuple[str, ...]
    """Experts that nobody serves."""


def swarm_state(snapshot: DirectorySnapshot, manifest: RunManifest) -> SwarmState:
    """What the directory saw of this run. Uids that the run does not have are left out, whoever claims them."""
    uids = manifest.uids()
    known = frozenset(map(str, uids))
    return SwarmState(
        run=manifest.run_id,
        name=manifest.name,
        at_unix_s=snapshot.taken_at_unix_s,
        peers=tuple(_peer_facts(peer, known=known) for _, peer in sorted(snapshot.peers.items())),
        experts=tuple(_expert_facts(uid, snapshot.replicas(uid)) for uid in uids),
        trainers=tuple(_trainer_facts(trainer) for _, trainer in sorted(snapshot.trainers.items())),
        uncovered=tuple(str(uid) for uid in snapshot.uncovered(uids)),
    )


def _peer_facts(peer: PeerRecord, *, known: frozenset[str]) -> PeerFacts:
    held = sorted({expert.uid for expert in peer.experts} & known, key=ExpertUid.parse)
    return PeerFacts(
        peer_id=peer.peer_id,
        state=peer.state,
        flags=peer.flags,
        experts=tuple(held),
        endpoint=peer.address,
        throughput_tokens_per_s=peer.throughput_tokens_per_s,
        version=peer.software_version,
        device=peer.device,
        queued_rows=peer.queued_rows,
    )


def _expert_facts(uid: ExpertUid, replicas: Sequence[Replica]) -> ExpertFacts:
    primary = replicas[0] if replicas else None
    return ExpertFacts(
        uid=str(uid),
        replicas=tuple(replica.endpoint.peer_id for replica in replicas),
        primary=None if primary is None else primary.endpoint.peer_id,
        version=None if primary is None else primary.version,
        load=0 if primary is None else primary.queued_rows,
        rows_served=sum(replica.rows_served for replica in replicas),
    )


def _trainer_facts(trainer: TrainerRecord) -> TrainerFacts:
    return TrainerFacts(
        peer_id=trainer.peer_id,
        state=trainer.state,
        step=trainer.step,
        loss=trainer.loss,
        tokens_per_s=trainer.tokens_per_s,
        answered_share=trainer.answered_share,
    )
