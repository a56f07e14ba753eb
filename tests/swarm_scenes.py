"""Records of imagined swarms, for tests that read or show them."""

import base64
import hashlib
from collections.abc import Sequence

from experts.settings import ExpertShape
from peer.chi import needed_bits_per_s
from peer.manifest import RunManifest
from peer.rates import MeasuredDevice, MeasuredLink, Rates
from peer.records import HostedExpert, PeerFlag, PeerRecord, PeerState, Signed, TrainerRecord
from peer.snapshot import take_snapshot
from peer.swarm_state import SwarmState, swarm_state
from peer.transport import PeerId

SIX_EXPERTS = RunManifest(name="six", moe_layers=2, experts_per_layer=3, expert=ExpertShape(dim=128, hidden=16))


def peer_id(name: str) -> PeerId:
    """A well-formed id that is the same for the same name."""
    return PeerId(base64.b32encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=").lower())


def peer(
    name: str,
    *uids: str,
    state: PeerState = "online",
    flags: tuple[PeerFlag, ...] = (),
    claimed_at_unix_s: float = 1.0,
    device: str = "cpu",
    queued_rows: int = 0,
    rates: Rates | None = None,
) -> PeerRecord:
    experts = tuple(
        HostedExpert(uid=uid, version=7, claimed_at_unix_s=claimed_at_unix_s, rows_served=5) for uid in uids
    )
    return PeerRecord(
        peer_id=peer_id(name),
        state=state,
        flags=flags,
        address="192.0.2.7:4701",
        certificate_der_b64="",
        experts=experts,
        device=device,
        queued_rows=queued_rows,
        rates=rates or Rates(),
        throughput_tokens_per_s=1500.0,
        software_version="0.1.0",
    )


def rates(chi: float, *, manifest: RunManifest = SIX_EXPERTS, tokens_per_s: float = 1e4) -> Rates:
    """Of a peer whose link carries so much of what its device could use, upwards; ten times as much comes down."""
    bits_per_s = chi * needed_bits_per_s(tokens_per_s, manifest.wire, dim=manifest.expert.dim)
    return Rates(
        link=MeasuredLink(up_bits_per_s=bits_per_s, down_bits_per_s=10 * bits_per_s, latency_ms=23.0),
        device=MeasuredDevice(tokens_per_s=tokens_per_s, flops_per_s=4e10),
    )


def trainer(name: str, *, step: int = 0, loss: float | None = None, state: PeerState = "online") -> TrainerRecord:
    return TrainerRecord(peer_id=peer_id(name), state=state, step=step, loss=loss, tokens_per_s=400.0)


def scene(
    *peers: PeerRecord,
    trainers: Sequence[TrainerRecord] = (),
    at_unix_s: float = 100.0,
    manifest: RunManifest = SIX_EXPERTS,
) -> SwarmState:
    snapshot = take_snapshot(_signed(peers), _signed(trainers), {}, now_unix_s=at_unix_s)
    return swarm_state(snapshot, manifest)


def _signed(records: Sequence[PeerRecord | TrainerRecord]) -> dict[PeerId, Signed]:
    return {record.peer_id: Signed(record.peer_id, record, expires_at_unix_s=1e12) for record in records}
