"""One immutable moment of the swarm: who is there, who serves which expert. Pure; any thread may read it.

A training step takes one and never waits for another.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from experts.uid import ExpertUid
from peer.claims import Claim
from peer.records import HostedExpert, PeerRecord, PeerState, Signed, TrainerRecord
from peer.transport import Endpoint, PeerId

_CLAIMING: frozenset[PeerState] = frozenset({"joining", "syncing", "online"})
"""A draining peer's experts are free to claim: it will not be back for them."""


@dataclass(frozen=True)
class Replica:
    """One expert on one peer that takes calls."""

    uid: ExpertUid
    endpoint: Endpoint
    version: int
    claimed_at_unix_s: float
    bias: float
    share: float
    rows_served: int
    queued_rows: int
    """Of the whole peer."""
    throughput_tokens_per_s: float
    """Of the whole peer."""
    latency_s: float | None
    """Moving average of what we measured; none before our first call."""

    @property
    def claim(self) -> Claim:
        return Claim(self.claimed_at_unix_s, self.endpoint.peer_id)


@dataclass(frozen=True)
class DirectorySnapshot:
    """Members that have not said goodbye and whose records have not expired."""

    taken_at_unix_s: float
    peers: Mapping[PeerId, PeerRecord]
    """In any state but offline."""
    trainers: Mapping[PeerId, TrainerRecord]
    replicas_by_uid: Mapping[ExpertUid, tuple[Replica, ...]]
    claims_by_uid: Mapping[ExpertUid, tuple[Claim, ...]]
    expiries: Mapping[PeerId, float]
    """When each peer's record expires, on the wall clock: a later one is a newer sign of life."""

    def replicas(self, uid: ExpertUid) -> tuple[Replica, ...]:
        """Who can be called for it: online, neither paused nor quarantined; lowest (claim time, peer id) first."""
        return self.replicas_by_uid.get(uid, ())

    def primary(self, uid: ExpertUid) -> Replica | None:
        """Who takes the backward steps: the earliest claim."""
        return next(iter(self.replicas(uid)), None)

    def claims(self, uid: ExpertUid) -> tuple[Claim, ...]:
        """Who means to serve it, those not online yet included; earliest first."""
        return self.claims_by_uid.get(uid, ())

    def uncovered(self, uids: Iterable[ExpertUid]) -> list[ExpertUid]:
        """Those nobody can be called for."""
        return [uid for uid in uids if uid not in self.replicas_by_uid]


def take_snapshot(
    peers: Mapping[PeerId, Signed],
    trainers: Mapping[PeerId, Signed],
    latencies_s: Mapping[PeerId, float],
    *,
    now_unix_s: float,
) -> DirectorySnapshot:
    """Read the records of one moment."""
    present = {
        peer_id: signed.record
        for peer_id, signed in peers.items()
        if isinstance(signed.record, PeerRecord) and signed.record.state != "offline"
    }
    replicas: defaultdict[ExpertUid, list[Replica]] = defaultdict(list)
    claims: defaultdict[ExpertUid, list[Claim]] = defaultdict(list)
    for peer_id, record in present.items():
        hosted = {ExpertUid.parse(line.uid): line for line in record.experts}
        if record.state in _CLAIMING:
            for uid, line in hosted.items():
                claims[uid].append(Claim(line.claimed_at_unix_s, peer_id))
        if record.state == "online" and not {"paused", "quarantined"} & set(record.flags):
            endpoint = record.endpoint()
            for uid, line in hosted.items():
                replicas[uid].append(_replica(uid, line, record, endpoint, latencies_s.get(peer_id)))
    return DirectorySnapshot(
        taken_at_unix_s=now_unix_s,
        peers=MappingProxyType(present),
        trainers=MappingProxyType(
            {
                peer_id: signed.record
                for peer_id, signed in trainers.items()
                if isinstance(signed.record, TrainerRecord) and signed.record.state != "offline"
            }
        ),
        replicas_by_uid=MappingProxyType({uid: _by_claim(those) for uid, those in replicas.items()}),
        claims_by_uid=MappingProxyType({uid: tuple(sorted(those)) for uid, those in claims.items()}),
        expiries=MappingProxyType({peer_id: peers[peer_id].expires_at_unix_s for peer_id in present}),
    )


def _by_claim(replicas: Sequence[Replica]) -> tuple[Replica, ...]:
    return tuple(sorted(replicas, key=lambda replica: replica.claim))


def _replica(
    uid: ExpertUid, line: HostedExpert, record: PeerRecord, endpoint: Endpoint, latency_s: float | None
) -> Replica:
    return Replica(
        uid=uid,
        endpoint=endpoint,
        version=line.version,
        claimed_at_unix_s=line.claimed_at_unix_s,
        bias=line.bias,
        share=line.share,
        rows_served=line.rows_served,
        queued_rows=record.queued_rows,
        throughput_tokens_per_s=record.throughput_tokens_per_s,
        latency_s=latency_s,
    )
