"""Keys, names, signatures, the state folder; certificates and call credentials."""

import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from peer.certificates import SERVER_NAME, Certificate, sha256_of
from peer.credentials import CLOCK_SKEW_S, LIFETIME_S, CredentialChecker, CredentialIssuer, issue
from peer.errors import BadConfiguration, FolderInUse
from peer.identity import Domain, Identity, StateFolder, peer_id_of, public_key_of, verify
from peer.transport import CallRefused, Endpoint, PeerId, Refusal
from protos.swarm_pb2 import CallCredential

NOW_UNIX_S = 1_800_000_000.0


def test_a_peer_id_is_the_public_key_in_52_lower_case_characters() -> None:
    identity = Identity.generate()

    assert len(identity.peer_id) == 52
    assert identity.peer_id == identity.peer_id.lower()
    assert public_key_of(identity.peer_id) == identity.public_key
    assert peer_id_of(identity.public_key) == identity.peer_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 51,
        "a" * 53,
        "1" * 52,
        "é" * 52,
        Identity.generate().peer_id.upper(),
        Identity.generate().peer_id + "=",
        "a" * 51 + "b",
    ],
)
def test_whatever_is_not_the_one_spelling_of_a_key_is_not_a_peer_id(text: str) -> None:
    with pytest.raises(ValueError, match="not a peer id"):
        public_key_of(text)


def test_a_signature_holds_for_its_signer_domain_and_fields_only() -> None:
    identity, other = Identity.generate(), Identity.generate()

    signature = identity.sign(Domain.RECORD, b"ab", b"c")

    assert verify(identity.peer_id, signature, Domain.RECORD, b"ab", b"c")
    assert not verify(other.peer_id, signature, Domain.RECORD, b"ab", b"c")
    assert not verify(identity.peer_id, signature, Domain.MANIFEST, b"ab", b"c")
    assert not verify(identity.peer_id, signature, Domain.RECORD, b"a", b"bc")
    assert not verify(identity.peer_id, signature, Domain.RECORD, b"abc")
    assert not verify(identity.peer_id, signature[:-1], Domain.RECORD, b"ab", b"c")
    assert not verify(PeerId("nobody"), signature, Domain.RECORD, b"ab", b"c")


def test_an_identity_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    previous = os.umask(0)
    try:
        first = Identity.load_or_create(folder)
    finally:
        os.umask(previous)

    second = Identity.load_or_create(folder)

    assert first.peer_id == second.peer_id
    assert (folder / "identity.key").stat().st_mode & 0o777 == 0o600
    assert (folder / "identity.key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert [path.name for path in folder.iterdir()] == ["identity.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_that_others_can_read_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    Identity.load_or_create(tmp_path)
    (tmp_path / "identity.key").chmod(mode)

    with pytest.raises(ValueError, match=r"chmod 600 .*identity\.key"):
        Identity.load_or_create(tmp_path)


def test_a_start_that_was_cut_short_while_writing_its_key_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "identity.new").write_bytes(b"-----BEGIN PRI")

    identity = Identity.load_or_create(tmp_path)

    assert Identity.load_or_create(tmp_path).peer_id == identity.peer_id


def _pem_of_another_kind_of_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize("content", [b"", b"not a key", _pem_of_another_kind_of_key()], ids=["empty", "text", "p256"])
def test_a_file_that_holds_no_ed25519_key_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(ValueError, match="new identity"):
        Identity.load_or_create(tmp_path)

    assert path.read_bytes() == content


def test_a_state_folder_has_one_daemon_and_the_second_learns_its_pid(tmp_path: Path) -> None:
    with (
        StateFolder(tmp_path / "new"),
        pytest.raises(FolderInUse, match=rf"held by process {os.getpid()}; .*another folder"),
    ):
        StateFolder(tmp_path / "new")


def test_a_state_folder_is_free_again_once_closed(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.close()
    folder.close()

    with StateFolder(tmp_path) as again:
        assert again.path == tmp_path


def test_a_killed_daemon_leaves_its_state_folder_free(tmp_path: Path) -> None:
    hold = f"""
import pathlib
from peer.identity import StateFolder
folder = StateFolder(pathlib.Path({str(tmp_path)!r}))
print("held", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUse, match=f"held by process {daemon.pid};"):
            StateFolder(tmp_path)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    StateFolder(tmp_path).close()


def test_a_certificate_is_fresh_p256_and_its_own_root() -> None:
    certificate, other = Certificate.generate(), Certificate.generate()

    parsed = x509.load_der_x509_certificate(certificate.der)

    assert isinstance(parsed.public_key(), ec.EllipticCurvePublicKey)
    assert parsed.subject.rfc4514_string() == f"CN={SERVER_NAME}"
    parsed.verify_directly_issued_by(parsed)
    assert certificate.sha256 == sha256_of(ssl.PEM_cert_to_DER_cert(certificate.pem.decode()))
    assert certificate.sha256 != other.sha256
    assert "PRIVATE" not in repr(certificate)


class Gate:
    """A server's checker and a caller who may pass it."""

    def __init__(self) -> None:
        self.server, self.caller = Identity.generate(), Identity.generate()
        self.endpoint = Endpoint(self.server.peer_id, "192.0.2.1:1", b"certificate")
        self.checker = CredentialChecker(self.server.peer_id, sha256_of(b"certificate"))

    def credential(self) -> CallCredential:
        return CallCredential.FromString(issue(self.caller, self.endpoint, now_unix_s=NOW_UNIX_S))

    def refusal_of(self, data: bytes | None, *, now_unix_s: float = NOW_UNIX_S) -> str:
        with pytest.raises(CallRefused) as error:
            self.checker.check(data, now_unix_s=now_unix_s)
        assert error.value.refusal is Refusal.UNAUTHENTICATED
        return str(error.value)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_a_credential_proves_its_caller_again_and_again(gate: Gate) -> None:
    data = issue(gate.caller, gate.endpoint, now_unix_s=NOW_UNIX_S)

    for later_s in (0, 1, LIFETIME_S, LIFETIME_S + CLOCK_SKEW_S):
        assert gate.checker.check(data, now_unix_s=NOW_UNIX_S + later_s) == gate.caller.peer_id


def test_clocks_may_differ_by_the_skew_and_no_more(gate: Gate) -> None:
    data = issue(gate.caller, gate.endpoint, now_unix_s=NOW_UNIX_S)

    assert gate.checker.check(data, now_unix_s=NOW_UNIX_S - CLOCK_SKEW_S) == gate.caller.peer_id
    assert "compare the two clocks" in gate.refusal_of(data, now_unix_s=NOW_UNIX_S - CLOCK_SKEW_S - 1)
    assert "expired 61 s ago" in gate.refusal_of(data, now_unix_s=NOW_UNIX_S + LIFETIME_S + CLOCK_SKEW_S + 1)


def test_a_remembered_credential_still_expires(gate: Gate) -> None:
    data = issue(gate.caller, gate.endpoint, now_unix_s=NOW_UNIX_S)
    gate.checker.check(data, now_unix_s=NOW_UNIX_S)

    assert "expired" in gate.refusal_of(data, now_unix_s=NOW_UNIX_S + 2 * LIFETIME_S)


def test_a_caller_signs_once_for_half_a_credentials_life(gate: Gate) -> None:
    issuer = CredentialIssuer(gate.caller)

    first = issuer.credential(gate.endpoint, now_unix_s=NOW_UNIX_S)

    assert issuer.credential(gate.endpoint, now_unix_s=NOW_UNIX_S + LIFETIME_S / 2 - 1) == first
    assert issuer.credential(gate.endpoint, now_unix_s=NOW_UNIX_S + LIFETIME_S / 2) != first
    assert issuer.credential(gate.endpoint, now_unix_s=NOW_UNIX_S - 3600) != first, "the clock was set back"


@pytest.mark.hostile
def test_no_identity_and_no_sense_are_refused(gate: Gate) -> None:
    assert "no identity" in gate.refusal_of(None)
    assert "no identity" in gate.refusal_of(b"")
    assert "malformed" in gate.refusal_of(b"\xff" * 40)
    assert "too long" in gate.refusal_of(b"x" * 10_000)
    assert "malformed" in gate.refusal_of(CallCredential(public_key=b"short").SerializeToString())


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"public_key": Identity.generate().public_key}, "forged"),
        ({"signature": bytes(64)}, "forged"),
        ({"signature": b""}, "forged"),
        ({"nonce": bytes(16)}, "forged"),
        ({"expires_at_unix_s": int(NOW_UNIX_S) + LIFETIME_S - 1}, "forged"),
        ({"expires_at_unix_s": -(2**63)}, "expired"),
        ({"expires_at_unix_s": 2**63 - 1}, "clocks"),
        ({"server_public_key": Identity.generate().public_key}, "for another peer"),
        ({"certificate_sha256": bytes(32)}, "another certificate"),
    ],
)
def test_a_credential_with_one_field_changed_is_refused_for_it(
    gate: Gate, change: dict[str, bytes | int], reason: str
) -> None:
    credential = gate.credential()
    for name, value in change.items():
        setattr(credential, name, value)

    assert reason in gate.refusal_of(credential.SerializeToString())


def test_a_state_folder_that_is_a_file_or_holds_no_key_is_a_mistake_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "identity.key").write_text("what is this")
    (tmp_path / "identity.key").chmod(0o600)

    with pytest.raises(BadConfiguration, match="cannot hold our state"):
        StateFolder(tmp_path / "file")
    with StateFolder(tmp_path) as folder, pytest.raises(BadConfiguration, match="not a private key"):
        folder.identity()
