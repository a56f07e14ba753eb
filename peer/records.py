"""What members say about themselves in the DHT. Holding one of these models is the proof that it validated.

Signing and checking is `envelope`'s; storing is a `RecordStore`'s.
"""

import base64
import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from experts.uid import UID_PATTERN
from peer.addresses import MAX_ADDRESS_CHARS, split_address
from peer.rates import Rates
from peer.transport import Endpoint, PeerId

RECORD_LIFETIME_S = 15.0
RENEW_EVERY_S = 5.0

PeerState = Literal["joining", "syncing", "online", "draining", "offline"]
PeerFlag = Literal["relayed", "paused", "quarantined"]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
"""Exact as a float too: what reads records may do arithmetic in either."""
Rate = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
UnixSeconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]


def _dialable(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, Field(max_length=MAX_ADDRESS_CHARS), AfterValidator(_dialable)]
"""HOST:PORT and nothing else: gRPC would take `unix:/path` and more from whoever announced it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer member may say more


class HostedExpert(_Record):
    """One line of a peer's record."""

    uid: Annotated[str, Field(pattern=UID_PATTERN)]
    version: Count
    claimed_at_unix_s: UnixSeconds
    """When this peer claimed it; of two claims the lower (claim time, peer id) keeps it."""
    bias: Annotated[float, Field(ge=-100, le=100)] = 0.0
    """Added to probabilities, which lie between 0 and 1."""
    share: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Wanted load, relative to the other experts'."""
    rows_served: Count = 0


class PeerRecord(_Record):
    """A peer: where it is, what it serves, how busy it is. `offline` is the tombstone."""

    peer_id: PeerId
    state: PeerState
    flags: tuple[PeerFlag, ...] = ()
    address: Address
    certificate_der_b64: Annotated[str, Field(max_length=4096)]
    experts: Annotated[tuple[HostedExpert, ...], Field(max_length=4096)] = ()
    device: Annotated[str, Field(max_length=32)] = "cpu"
    queued_rows: Count = 0
    rates: Rates = Rates()
    throughput_tokens_per_s: Rate = 0.0
    software_version: Annotated[str, Field(max_length=64)] = ""

    @field_validator("certificate_der_b64")
    @classmethod
    def _decodes(cls, certificate_der_b64: str) -> str:
        base64.b64decode(certificate_der_b64, validate=True)  # binascii.Error is a ValueError
        return certificate_der_b64

    def endpoint(self) -> Endpoint:
        return Endpoint(self.peer_id, self.address, base64.b64decode(self.certificate_der_b64))


class TrainerRecord(_Record):
    """A trainer: how far it is."""

    peer_id: PeerId
    state: PeerState
    step: Count
    loss: float | None = None
    """Bits per byte of the last step; none before the first."""
    tokens_per_s: Rate = 0.0
    answered_share: Annotated[float, Field(ge=0, le=1)] = 1.0

    @field_validator("loss")
    @classmethod
    def _finite_or_none(cls, loss: float | None) -> float | None:
        return loss if loss is not None and math.isfinite(loss) else None


class RunRecord(_Record):
    """The signed manifest, as its owner published it."""

    signed_manifest_b64: str


AnyRecord = PeerRecord | TrainerRecord | RunRecord
Kind = Literal["peer", "trainer", "run"]


@dataclass(frozen=True)
class Signed:
    """A record whose author's signature, run and expiry were checked: made by `envelope.open_envelope` alone."""

    peer_id: PeerId
    record: AnyRecord
    expires_at_unix_s: float


class RecordStore(Protocol):
    """Signed, expiring records, many per kind, one per member and kind. Eventually consistent; there is no delete.

    `HivemindStore` and `MemoryStore` pass one contract suite. Every method belongs to one event loop.
    """

    async def put(self, record: AnyRecord, *, lifetime_s: float, now_unix_s: float) -> bool:
        """Sign and store our own record; False when the DHT refused (it holds as late an expiry) or is unavailable."""
        ...

    async def read(self, kind: Kind, *, now_unix_s: float) -> dict[PeerId, Signed]:
        """Every valid, unexpired record of a kind. Forged, malformed and expired ones are dropped and counted.

        This and the three below raise RecordsUnavailable.
        """
        ...

    async def peers(self, *, now_unix_s: float) -> dict[PeerId, PeerRecord]: ...

    async def trainers(self, *, now_unix_s: float) -> dict[PeerId, TrainerRecord]: ...

    async def run(self, *, now_unix_s: float) -> RunRecord | None: ...

    def addresses(self) -> list[str]:
        """Multiaddresses at which this member's DHT node can be reached."""
        ...

    async def close(self) -> None:
        """Leave the DHT. Idempotent."""
        ...
