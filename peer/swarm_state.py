"""The swarm at one moment, as people and programs read it: `/api/state` and `swarmoe status --json` print this model.

Pure: a directory snapshot in, facts out. Refuses to know what changed since the last one.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict

from experts.uid import ExpertUid
from peer.chi import bits_per_token, chi_of
from peer.manifest import RunManifest
from peer.records import PeerFlag, PeerRecord, PeerState, TrainerRecord
from peer.snapshot import DirectorySnapshot, Replica
from peer.transport import PeerId


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
    up_bits_per_s: float | None
    """Measured at its start, as the two below; none: not measured."""
    down_bits_per_s: float | None
    latency_ms: float | None
    flops_per_s: float | None
    """What its device achieves on experts of this run, forward and backward; on its latest calls, if it had any."""
    device_tokens_per_s: float | None
    """Through one of them."""


class PeerChi(_Facts):
    """How busy a peer's link lets its device be."""

    peer_id: str
    needed_bits_per_s: float
    """W*: what the device could use, each way."""
    chi: float
    utilisation: float
    """min(1, chi)"""


class ExpertKindFacts(_Facts):
    """Experts of one kind and shape, and what links make of them."""

    kind: str
    dim: int
    hidden: int
    bits_per_token: float
    """On the wire each way: a token's trip through one of them, forward and backward."""
    peers: tuple[PeerChi, ...]
    """Those that measured both."""
    median_needed_bits_per_s: float | None
    median_chi: float | None
    median_utilisation: float | None


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
    expert_kinds: tuple[ExpertKindFacts, ...]
    """Of the run; it has one."""
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
        expert_kinds=(_kind_facts(snapshot.peers, manifest),),
        trainers=tuple(_trainer_facts(trainer) for _, trainer in sorted(snapshot.trainers.items())),
        uncovered=tuple(str(uid) for uid in snapshot.uncovered(uids)),
    )


def _kind_facts(peers: Mapping[PeerId, PeerRecord], manifest: RunManifest) -> ExpertKindFacts:
    shape = manifest.expert
    chis = [
        PeerChi(peer_id=peer_id, needed_bits_per_s=chi.needed_bits_per_s, chi=chi.value, utilisation=chi.utilisation)
        for peer_id, peer in sorted(peers.items())
        if (chi := chi_of(peer.rates, manifest.wire, dim=shape.dim)) is not None
    ]
    return ExpertKindFacts(
        kind=shape.kind,
        dim=shape.dim,
        hidden=shape.hidden,
        bits_per_token=bits_per_token(manifest.wire, dim=shape.dim),
        peers=tuple(chis),
        median_needed_bits_per_s=median(chi.needed_bits_per_s for chi in chis) if chis else None,
        median_chi=median(chi.chi for chi in chis) if chis else None,
        median_utilisation=median(chi.utilisation for chi in chis) if chis else None,
    )


def _peer_facts(peer: PeerRecord, *, known: frozenset[str]) -> PeerFacts:
    link, speed = peer.rates.link, peer.rates.device
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
        up_bits_per_s=link.up_bits_per_s if link is not None else None,
        down_bits_per_s=link.down_bits_per_s if link is not None else None,
        latency_ms=link.latency_ms if link is not None else None,
        flops_per_s=speed.flops_per_s if speed is not None else None,
        device_tokens_per_s=speed.tokens_per_s if speed is not None else None,
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
