"""One immutable moment of the swarm: who is there, who serves which expert. Pure; any thread may read it.

A training step takes one and never waits for another.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from experts.uid import ExpertUid
from peer.claims import Claim
from peer.hosting import Hosting, LayerHosts, PeerLines, says_the_same
from peer.records import PeerRecord, Signed, TrainerRecord
from peer.transport import Endpoint, PeerId


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
    hosting: Hosting
    """The same object in the next snapshot as long as nobody says anything new about hosting."""
    endpoints: Mapping[PeerId, Endpoint]
    latencies_s: Mapping[PeerId, float]
    """Moving average of what we measured, of those we have called."""
    expiries: Mapping[PeerId, float]
    """When each peer's record expires, on the wall clock: a later one is a newer sign of life."""

    def replicas(self, uid: ExpertUid) -> tuple[Replica, ...]:
        """Who can be called for it: online, neither paused nor quarantined; lowest (claim time, peer id) first."""
        return tuple(self._replica(uid, peer_id, line) for peer_id, line in self.hosting.callable_lines(uid))

    def primary(self, uid: ExpertUid) -> Replica | None:
        """Who takes the backward steps: the earliest claim."""
        return next(iter(self.replicas(uid)), None)

    def claims(self, uid: ExpertUid) -> tuple[Claim, ...]:
        """Who means to serve it, those not online yet included; earliest first."""
        return self.hosting.claims(uid)

    def uncovered(self, uids: Iterable[ExpertUid]) -> list[ExpertUid]:
        """Those nobody can be called for."""
        return self.hosting.unserved(uids)

    def claimed(self, uids: Iterable[ExpertUid], *, besides: PeerId) -> set[ExpertUid]:
        """Those that somebody else than this peer means to serve."""
        return self.hosting.claimed(uids, besides=besides)

    def layer(self, layer: int, num_experts: int, *, without: Collection[PeerId] = ()) -> LayerHosts:
        """Whom to call for each expert of a layer, doing without some peers. Costs microseconds, also for thousands."""
        return self.hosting.layer(layer, num_experts, without=without)

    def _replica(self, uid: ExpertUid, peer_id: PeerId, position: int) -> Replica:
        record = self.peers[peer_id]
        line = record.experts[position]
        return Replica(
            uid=uid,
            endpoint=self.endpoints[peer_id],
            version=line.version,
            claimed_at_unix_s=line.claimed_at_unix_s,
            bias=line.bias,
            share=line.share,
            rows_served=line.rows_served,
            queued_rows=record.queued_rows,
            throughput_tokens_per_s=record.throughput_tokens_per_s,
            latency_s=self.latencies_s.get(peer_id),
        )


_NOTHING: Mapping[PeerId, Any] = MappingProxyType({})
EMPTY = DirectorySnapshot(0.0, _NOTHING, _NOTHING, Hosting({}), _NOTHING, _NOTHING, _NOTHING)
"""Before anything is known."""


def take_snapshot(
    peers: Mapping[PeerId, Signed],
    trainers: Mapping[PeerId, Signed],
    latencies_s: Mapping[PeerId, float],
    *,
    now_unix_s: float,
    before: DirectorySnapshot = EMPTY,
) -> DirectorySnapshot:
    """Read the records of one moment. What has not changed since the moment `before` is taken from there."""
    present = {
        peer_id: signed.record
        for peer_id, signed in peers.items()
        if isinstance(signed.record, PeerRecord) and signed.record.state != "offline"
    }
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
        hosting=_hosting(present, before),
        endpoints=MappingProxyType({peer_id: _endpoint(record, before) for peer_id, record in present.items()}),
        latencies_s=MappingProxyType(dict(latencies_s)),
        expiries=MappingProxyType({peer_id: peers[peer_id].expires_at_unix_s for peer_id in present}),
    )


def _hosting(present: Mapping[PeerId, PeerRecord], before: DirectorySnapshot) -> Hosting:
    lines = {peer_id: _lines(record, before) for peer_id, record in present.items()}
    known = before.hosting.lines
    if lines.keys() == known.keys() and all(lines[peer_id] is known[peer_id] for peer_id in lines):
        return before.hosting
    return Hosting(lines)


def _lines(record: PeerRecord, before: DirectorySnapshot) -> PeerLines:
    was = before.peers.get(record.peer_id)
    if was is not None and (was is record or says_the_same(was, record)):
        return before.hosting.lines[record.peer_id]
    return PeerLines.of(record)


def _endpoint(record: PeerRecord, before: DirectorySnapshot) -> Endpoint:
    was = before.peers.get(record.peer_id)
    if was is not None and (was.address, was.certificate_der_b64) == (record.address, record.certificate_der_b64):
        return before.endpoints[record.peer_id]
    return record.endpoint()
