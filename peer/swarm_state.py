"""The swarm at one moment, as people and programs read it: `/api/state` and `swarmoe status --json` print this model.

Pure: records in, facts out. Refuses to know where the records came from, and what changed since the last look.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from experts.uid import ExpertUid
from peer.manifest import RunManifest
from peer.records import HostedExpert, PeerFlag, PeerRecord, PeerState, TrainerRecord


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


def swarm_state(
    manifest: RunManifest, *, peers: Iterable[PeerRecord], trainers: Iterable[TrainerRecord], at_unix_s: float
) -> SwarmState:
    """What these records say about this run. Uids that the run does not have are left out, whoever claims them."""
    uids = [str(uid) for uid in manifest.uids()]
    peers = sorted(peers, key=lambda peer: peer.peer_id)
    serving = _serving(peers, known=frozenset(uids))
    return SwarmState(
        run=manifest.run_id,
        name=manifest.name,
        at_unix_s=at_unix_s,
        peers=tuple(_peer_facts(peer, known=frozenset(uids)) for peer in peers),
        experts=tuple(_expert_facts(uid, serving) for uid in uids),
        trainers=tuple(_trainer_facts(trainer) for trainer in sorted(trainers, key=lambda trainer: trainer.peer_id)),
        uncovered=tuple(uid for uid in uids if uid not in serving),
    )


def _serving(
    peers: Iterable[PeerRecord], *, known: frozenset[str]
) -> Mapping[str, list[tuple[HostedExpert, PeerRecord]]]:
    """For each expert that somebody serves: who, the earliest claim first; of equal ones the lower peer id."""
    serving: defaultdict[str, list[tuple[HostedExpert, PeerRecord]]] = defaultdict(list)
    for peer in peers:
        if peer.state == "online":
            for expert in peer.experts:
                if expert.uid in known:
                    serving[expert.uid].append((expert, peer))
    for replicas in serving.values():
        replicas.sort(key=lambda replica: (replica[0].claimed_at_unix_s, replica[1].peer_id))
    return serving


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


def _expert_facts(uid: str, serving: Mapping[str, list[tuple[HostedExpert, PeerRecord]]]) -> ExpertFacts:
    replicas = serving.get(uid, [])
    lease, primary = replicas[0] if replicas else (None, None)
    return ExpertFacts(
        uid=uid,
        replicas=tuple(peer.peer_id for _, peer in replicas),
        primary=None if primary is None else primary.peer_id,
        version=None if lease is None else lease.version,
        load=0 if primary is None else primary.queued_rows,
        rows_served=sum(expert.rows_served for expert, _ in replicas),
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
