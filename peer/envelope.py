"""How a record travels: sealed by its author, bound to one run, one kind, one author and one expiry.

Pure: bytes in, a validated record or the reason why not. Knows neither the DHT nor the clock.
"""

import base64
import binascii
import struct
from enum import StrEnum

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from experts.uid import RunId
from peer.identity import Domain, Identity, peer_id_of, verify
from peer.manifest import RunManifest
from peer.records import AnyRecord, Kind, PeerRecord, RunRecord, Signed, TrainerRecord
from peer.transport import PeerId
from protos.swarm_pb2 import SignedManifest, SignedRecord

MAX_ENVELOPE_BYTES = 128 << 10
"""A peer with a thousand experts fits. Every member's record comes back in one answer, which may have 4 MiB."""
CLOCK_SKEW_S = 3.0
"""What hivemind allows between two members' clocks."""
MAX_LIFETIME_S: dict[Kind, float] = {"peer": 60.0, "trainer": 60.0, "run": 3600.0}
"""Nobody can announce itself for longer than this ahead."""

_MODELS: dict[Kind, type[PeerRecord | TrainerRecord | RunRecord]] = {
    "peer": PeerRecord,
    "trainer": TrainerRecord,
    "run": RunRecord,
}


class Rejection(StrEnum):
    """Why an envelope is refused."""

    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    OTHER_AUTHOR = "other_author"  # stored under, or speaking for, somebody who did not sign it
    OTHER_KIND = "other_kind"
    OTHER_RUN = "other_run"
    LIVES_TOO_LONG = "lives_too_long"
    FORGED = "forged"
    NOT_THE_OWNER = "not_the_owner"  # a run record whose manifest is not this run's, or by somebody else
    EXPIRED = "expired"


def kind_of(record: AnyRecord) -> Kind:
    """The one kind whose key holds records of this type."""
    return next(kind for kind, model in _MODELS.items() if type(record) is model)


def seal(identity: Identity, record: AnyRecord, *, run_id: RunId, expires_at_unix_s: float) -> bytes:
    """A serialised SignedRecord. ValueError when the record is larger than the swarm accepts."""
    envelope = SignedRecord(
        public_key=identity.public_key,
        kind=kind_of(record),
        run_id=run_id,
        expires_at_unix_s=expires_at_unix_s,
        body_json=record.model_dump_json(exclude_defaults=True).encode(),
    )
    envelope.signature = identity.sign(Domain.RECORD, *_signed_fields(envelope))
    data = envelope.SerializeToString()
    if len(data) > MAX_ENVELOPE_BYTES:
        raise ValueError(f"a {envelope.kind} record of {len(data)} bytes is more than {MAX_ENVELOPE_BYTES}")
    return data


def open_envelope(data: bytes, *, kind: Kind, subkey: str, run_id: RunId, now_unix_s: float) -> Signed | Rejection:
    """The record that `subkey` stored as `kind` in this run, or why it is none.

    EXPIRED is said last: whatever is only expired was valid until then.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        return Rejection.TOO_LARGE
    try:
        envelope = SignedRecord.FromString(data)
        peer_id = peer_id_of(envelope.public_key)
    except (DecodeError, ValueError):
        return Rejection.MALFORMED
    if peer_id != subkey:
        return Rejection.OTHER_AUTHOR
    if envelope.kind != kind:
        return Rejection.OTHER_KIND
    if envelope.run_id != run_id:
        return Rejection.OTHER_RUN
    if not envelope.expires_at_unix_s - now_unix_s <= MAX_LIFETIME_S[kind] + CLOCK_SKEW_S:  # so that NaN fails it too
        return Rejection.LIVES_TOO_LONG
    if not verify(peer_id, envelope.signature, Domain.RECORD, *_signed_fields(envelope)):
        return Rejection.FORGED
    record = _read_body(envelope.body_json, kind=kind, author=peer_id, run_id=run_id)
    if isinstance(record, Rejection):
        return record
    if envelope.expires_at_unix_s <= now_unix_s:
        return Rejection.EXPIRED
    return Signed(peer_id, record, envelope.expires_at_unix_s)


def _read_body(body_json: bytes, *, kind: Kind, author: PeerId, run_id: RunId) -> AnyRecord | Rejection:
    try:
        record = _MODELS[kind].model_validate_json(body_json)
    except ValidationError:
        return Rejection.MALFORMED
    if isinstance(record, RunRecord):
        return record if _is_by_owner(record, author=author, run_id=run_id) else Rejection.NOT_THE_OWNER
    return record if record.peer_id == author else Rejection.OTHER_AUTHOR


def _is_by_owner(record: RunRecord, *, author: PeerId, run_id: RunId) -> bool:
    """The run id is the manifest's hash and the manifest names its owner, so nobody else can publish another one."""
    try:
        signed = SignedManifest.FromString(base64.b64decode(record.signed_manifest_b64, validate=True))
        manifest = RunManifest.model_validate_json(signed.manifest_json)
    except (binascii.Error, DecodeError, ValidationError):
        return False
    return manifest.run_id == run_id and manifest.owner == author


def _signed_fields(envelope: SignedRecord) -> tuple[bytes, ...]:
    return (
        envelope.public_key,
        envelope.kind.encode(),
        envelope.run_id.encode(),
        struct.pack(">d", envelope.expires_at_unix_s),
        envelope.body_json,
    )
