"""How a caller proves who it is: call metadata signed for one server, its certificate of the day and a short time.

Pure: the clock is an argument. gRPC cannot check client certificates it has not been given, so this takes their place.
A credential travels only inside TLS to the one server it names; that server can do nothing with it elsewhere.
"""

import secrets
from collections import OrderedDict
from typing import TypeVar

from google.protobuf.message import DecodeError

from peer.certificates import sha256_of
from peer.identity import Domain, Identity, peer_id_of, public_key_of, verify
from peer.transport import CallRefused, Endpoint, PeerId, Refusal
from protos.swarm_pb2 import CallCredential

METADATA_KEY = "swarmoe-auth-bin"
LIFETIME_S = 600
CLOCK_SKEW_S = 60
"""How far two clocks may disagree. Wide, because a replay gains nothing."""
NONCE_BYTES = 16
_MAX_CREDENTIAL_BYTES = 512
_MAX_CACHED = 1024

K = TypeVar("K")
V = TypeVar("V")


def issue(identity: Identity, endpoint: Endpoint, *, now_unix_s: float) -> bytes:
    """A credential for calls to this endpoint in the next `LIFETIME_S` seconds."""
    credential = CallCredential(
        public_key=identity.public_key,
        server_public_key=public_key_of(endpoint.peer_id),
        certificate_sha256=sha256_of(endpoint.certificate_der),
        expires_at_unix_s=int(now_unix_s) + LIFETIME_S,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    credential.signature = identity.sign(Domain.CALL, *_signed_fields(credential))
    return credential.SerializeToString()


class CredentialIssuer:
    """One caller's credentials, each used for half its life: signing once per connection, not per call."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._issued: OrderedDict[Endpoint, tuple[float, bytes]] = OrderedDict()

    def credential(self, endpoint: Endpoint, *, now_unix_s: float) -> bytes:
        issued_at_unix_s, data = self._issued.get(endpoint, (float("-inf"), b""))
        if not 0 <= now_unix_s - issued_at_unix_s < LIFETIME_S / 2:
            data = issue(self._identity, endpoint, now_unix_s=now_unix_s)
            _remember(self._issued, endpoint, (now_unix_s, data))
        return data


class CredentialChecker:
    """One server's gate. A credential that passed is remembered, so a caller's next calls cost a dictionary look-up."""

    def __init__(self, server_peer_id: PeerId, certificate_sha256: bytes) -> None:
        self._server_public_key = public_key_of(server_peer_id)
        self._certificate_sha256 = certificate_sha256
        self._passed: OrderedDict[bytes, tuple[PeerId, int]] = OrderedDict()

    def check(self, data: bytes | None, *, now_unix_s: float) -> PeerId:
        """Who is calling, proven. Raises CallRefused(UNAUTHENTICATED) with the reason."""
        if not data:
            raise _refused(f"the call has no identity: send {METADATA_KEY}")
        if (passed := self._passed.get(data)) is not None:
            peer_id, expires_at_unix_s = passed
            _check_time(expires_at_unix_s, now_unix_s)
            return peer_id
        credential = _parse(data)
        _check_time(credential.expires_at_unix_s, now_unix_s)
        if credential.server_public_key != self._server_public_key:
            raise _refused("the credential is for another peer: read this peer's record again")
        if credential.certificate_sha256 != self._certificate_sha256:
            raise _refused("the credential names another certificate: this peer has restarted, read its record again")
        caller = peer_id_of(credential.public_key)
        if not verify(caller, credential.signature, Domain.CALL, *_signed_fields(credential)):
            raise _refused("the credential is forged: its signature is not by the key it names")
        _remember(self._passed, data, (caller, credential.expires_at_unix_s))
        return caller

    def passes_until_unix_s(self, data: bytes) -> float:
        """Until when a credential goes on passing that has just passed."""
        _, expires_at_unix_s = self._passed[data]
        return expires_at_unix_s + CLOCK_SKEW_S


def _parse(data: bytes) -> CallCredential:
    if len(data) > _MAX_CREDENTIAL_BYTES:
        raise _refused("the credential is malformed: too long")
    try:
        credential = CallCredential.FromString(data)
    except DecodeError:
        raise _refused("the credential is malformed: it does not decode") from None
    if len(credential.public_key) != 32 or len(credential.nonce) != NONCE_BYTES:
        raise _refused("the credential is malformed: a key has 32 bytes, a nonce 16")
    return credential


def _check_time(expires_at_unix_s: int, now_unix_s: float) -> None:
    left_s = expires_at_unix_s - now_unix_s
    if left_s < -CLOCK_SKEW_S:
        raise _refused(f"the credential expired {-left_s:.0f} s ago: compare the two clocks")
    if left_s > LIFETIME_S + CLOCK_SKEW_S:
        raise _refused(f"the credential expires in {left_s:.0f} s, more than {LIFETIME_S} s: compare the two clocks")


def _signed_fields(credential: CallCredential) -> tuple[bytes, ...]:
    return (
        credential.public_key,
        credential.server_public_key,
        credential.certificate_sha256,
        credential.expires_at_unix_s.to_bytes(8, "big", signed=True),
        credential.nonce,
    )


def _remember(cache: OrderedDict[K, V], key: K, value: V) -> None:
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > _MAX_CACHED:
        cache.popitem(last=False)


def _refused(message: str) -> CallRefused:
    return CallRefused(Refusal.UNAUTHENTICATED, message)
