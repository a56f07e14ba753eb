"""Sealing and opening records."""

import base64
import struct
from dataclasses import replace

import pytest

from experts.settings import ExpertShape
from experts.uid import RunId
from peer.envelope import MAX_ENVELOPE_BYTES, Rejection, open_envelope, seal
from peer.identity import Domain, Identity
from peer.manifest import RunManifest
from peer.records import AnyRecord, HostedExpert, Kind, PeerRecord, RunRecord, Signed, TrainerRecord
from protos.swarm_pb2 import SignedManifest, SignedRecord

RUN = RunId("5" * 32)
NOW = 1_000_000.0


@pytest.fixture(scope="module")
def author() -> Identity:
    return Identity.generate()


@pytest.fixture(scope="module")
def stranger() -> Identity:
    return Identity.generate()


def trainer_record(identity: Identity) -> TrainerRecord:
    return TrainerRecord(peer_id=identity.peer_id, state="online", step=7, loss=2.5)


def sealed(identity: Identity, record: AnyRecord | None = None, *, run_id: RunId = RUN, lives_s: float = 15.0) -> bytes:
    return seal(identity, record or trainer_record(identity), run_id=run_id, expires_at_unix_s=NOW + lives_s)


def opened(data: bytes, author: Identity, *, kind: Kind = "trainer", now_unix_s: float = NOW) -> Signed | Rejection:
    return open_envelope(data, kind=kind, subkey=author.peer_id, run_id=RUN, now_unix_s=now_unix_s)


def altered(data: bytes, **fields: object) -> bytes:
    envelope = SignedRecord.FromString(data)
    for name, value in fields.items():
        setattr(envelope, name, value)
    return envelope.SerializeToString()


def test_what_was_sealed_opens_with_its_author_and_expiry(author: Identity) -> None:
    record = PeerRecord(
        peer_id=author.peer_id,
        state="online",
        address="127.0.0.1:7",
        certificate_der_b64=base64.b64encode(b"certificate").decode(),
        experts=(HostedExpert(uid="0.3", version=4, claimed_at_unix_s=NOW - 1),),
    )

    result = opened(sealed(author, record), author, kind="peer")

    assert result == Signed(author.peer_id, record, NOW + 15.0)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"body_json": b'{"peer_id":"x"}'}, Rejection.FORGED),
        ({"signature": b""}, Rejection.FORGED),
        ({"expires_at_unix_s": NOW + 20.0}, Rejection.FORGED),
        ({"expires_at_unix_s": NOW + 3600.0}, Rejection.LIVES_TOO_LONG),
        ({"expires_at_unix_s": float("inf")}, Rejection.LIVES_TOO_LONG),
        ({"expires_at_unix_s": float("nan")}, Rejection.LIVES_TOO_LONG),
        ({"kind": "peer"}, Rejection.OTHER_KIND),
        ({"kind": ""}, Rejection.OTHER_KIND),
        ({"run_id": "6" * 32}, Rejection.OTHER_RUN),
        ({"public_key": b"short"}, Rejection.MALFORMED),
        ({"public_key": bytes(32)}, Rejection.OTHER_AUTHOR),
        ({"body_json": b"[" * MAX_ENVELOPE_BYTES}, Rejection.TOO_LARGE),
    ],
)
def test_an_altered_envelope_is_refused_with_the_reason(
    author: Identity, change: dict[str, object], reason: Rejection
) -> None:
    data = altered(sealed(author), **change)

    assert opened(data, author) is reason


@pytest.mark.hostile
@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"plain text", b"\x0a\x20" + bytes(31)])
def test_bytes_that_are_no_envelope_are_refused(author: Identity, data: bytes) -> None:
    assert opened(data, author) is Rejection.MALFORMED


@pytest.mark.hostile
def test_a_record_replayed_under_another_subkey_is_refused(author: Identity, stranger: Identity) -> None:
    assert opened(sealed(author), stranger) is Rejection.OTHER_AUTHOR


@pytest.mark.hostile
def test_nobody_speaks_for_somebody_else(author: Identity, stranger: Identity) -> None:
    data = sealed(stranger, trainer_record(author))

    assert opened(data, stranger) is Rejection.OTHER_AUTHOR


@pytest.mark.hostile
@pytest.mark.parametrize("body", [b"", b"null", b"{}", b'{"step":-1}', b"[" * 5000, b'{"step":1e999}'])
def test_a_signed_body_that_does_not_validate_is_malformed(author: Identity, body: bytes) -> None:
    envelope = SignedRecord(
        public_key=author.public_key, kind="trainer", run_id=RUN, expires_at_unix_s=NOW + 15.0, body_json=body
    )
    fields = (envelope.public_key, b"trainer", RUN.encode(), struct.pack(">d", NOW + 15.0), body)
    envelope.signature = author.sign(Domain.RECORD, *fields)

    assert opened(envelope.SerializeToString(), author) is Rejection.MALFORMED


@pytest.mark.hostile
def test_a_signature_made_for_another_purpose_is_worth_nothing(author: Identity) -> None:
    data = sealed(author)
    envelope = SignedRecord.FromString(data)
    fields = (envelope.public_key, b"trainer", RUN.encode(), struct.pack(">d", NOW + 15.0), envelope.body_json)

    assert opened(altered(data, signature=author.sign(Domain.CALL, *fields)), author) is Rejection.FORGED


def test_a_record_is_expired_at_its_expiry_and_not_before(author: Identity) -> None:
    data = sealed(author, lives_s=15.0)

    assert isinstance(opened(data, author, now_unix_s=NOW + 14.99), Signed)
    assert opened(data, author, now_unix_s=NOW + 15.0) is Rejection.EXPIRED


def test_a_record_that_no_member_would_accept_is_not_sealed(author: Identity) -> None:
    experts = tuple(HostedExpert(uid=f"0.{index}", version=10**15, claimed_at_unix_s=NOW) for index in range(4000))
    record = PeerRecord(peer_id=author.peer_id, state="online", address="a:1", certificate_der_b64="", experts=experts)

    with pytest.raises(ValueError, match="more than"):
        sealed(author, record)


def test_a_thousand_experts_fit(author: Identity) -> None:
    experts = tuple(
        HostedExpert(uid=f"0.{index}", version=10**6, claimed_at_unix_s=NOW + 0.123) for index in range(1000)
    )
    record = PeerRecord(peer_id=author.peer_id, state="online", address="a:1", certificate_der_b64="", experts=experts)

    assert isinstance(opened(sealed(author, record), author, kind="peer"), Signed)


def run_record(manifest: RunManifest) -> RunRecord:
    signed = SignedManifest(manifest_json=manifest.canonical_json(), signature=b"checked by whoever joins")
    return RunRecord(signed_manifest_b64=base64.b64encode(signed.SerializeToString()).decode())


def test_the_owner_publishes_the_run_and_nobody_else_does(author: Identity, stranger: Identity) -> None:
    manifest = RunManifest(owner=author.peer_id, expert=ExpertShape(dim=128, hidden=256))
    record, run_id = run_record(manifest), manifest.run_id

    def published_by(identity: Identity, run_id: RunId) -> Signed | Rejection:
        data = seal(identity, record, run_id=run_id, expires_at_unix_s=NOW + 600)
        return open_envelope(data, kind="run", subkey=identity.peer_id, run_id=run_id, now_unix_s=NOW)

    assert published_by(author, run_id) == Signed(author.peer_id, record, NOW + 600)
    assert published_by(stranger, run_id) is Rejection.NOT_THE_OWNER
    assert published_by(author, RunId("0" * 32)) is Rejection.NOT_THE_OWNER


@pytest.mark.hostile
@pytest.mark.parametrize("text", ["", "****", base64.b64encode(b"\xff\xff").decode(), base64.b64encode(b"").decode()])
def test_a_run_record_without_a_manifest_is_refused(author: Identity, text: str) -> None:
    data = sealed(author, RunRecord(signed_manifest_b64=text))

    assert opened(data, author, kind="run") is Rejection.NOT_THE_OWNER


def test_two_moments_of_one_record_are_two_envelopes(author: Identity) -> None:
    first, second = sealed(author, lives_s=15.0), sealed(author, lives_s=20.0)

    earlier, later = opened(first, author), opened(second, author)

    assert isinstance(earlier, Signed)
    assert later == replace(earlier, expires_at_unix_s=NOW + 20.0)
