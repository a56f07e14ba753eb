"""First contact: from `HOST:PORT[/KEY]` to a run that its owner signed and the members that know the rest.

Whoever answers proves its identity over our nonce and its certificate; the manifest is proved by the owner it names.
With a KEY nobody else can answer; without one the first answer is believed, as with any address somebody gave you.
"""

import asyncio
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from peer.addresses import split_address
from peer.certificates import sha256_of
from peer.errors import CouldNotJoin, MalformedMessage, ManifestMismatch, RemoteError, WrongKey
from peer.identity import Domain, Identity, peer_id_of, public_key_of, verify
from peer.manifest import PROTOCOL_VERSION, RunManifest
from peer.transport import Endpoint, PeerId, Transport
from protos.swarm_pb2 import InfoReply, InfoRequest, SignedManifest

NONCE_BYTES = 16
_MAX_MANIFEST_BYTES = 64 << 10
_MAX_DHT_ADDRESSES = 64
_MAX_TEXT_CHARS = 256

_Failure = RemoteError | WrongKey | MalformedMessage | ManifestMismatch


@dataclass(frozen=True)
class JoinAddress:
    """Where to ask, and whose answer to believe (None: anybody's)."""

    address: str
    peer_id: PeerId | None = None

    def __str__(self) -> str:
        return self.address if self.peer_id is None else f"{self.address}/{self.peer_id}"


@dataclass(frozen=True)
class Introduction:
    """What first contact proved."""

    peer_id: PeerId
    address: str
    certificate_der: bytes
    manifest: RunManifest
    signed_manifest: bytes
    dht_addresses: tuple[str, ...]
    software_version: str

    def endpoint(self) -> Endpoint:
        """Whoever introduced us, to be called."""
        return Endpoint(self.peer_id, self.address, self.certificate_der)


def parse_join(text: str) -> JoinAddress:
    """Read `HOST:PORT[/KEY]`. ValueError says what to write instead."""
    address, slash, key = text.strip().partition("/")
    split_address(address)
    if not slash:
        return JoinAddress(address)
    public_key_of(key)
    return JoinAddress(address, PeerId(key))


def sign_manifest(identity: Identity, manifest: RunManifest) -> bytes:
    """A serialised SignedManifest. ValueError unless this identity is the owner that the manifest names."""
    if manifest.owner != identity.peer_id:
        raise ValueError(f"the manifest's owner is {manifest.owner or 'not set'}, not {identity.peer_id}")
    manifest_json = manifest.canonical_json()
    signature = identity.sign(Domain.MANIFEST, manifest_json)
    return SignedManifest(manifest_json=manifest_json, signature=signature).SerializeToString()


def verify_manifest(signed_manifest: bytes) -> RunManifest:
    """The manifest, as its owner signed it. Raises ManifestMismatch naming the field, or MalformedMessage."""
    if len(signed_manifest) > _MAX_MANIFEST_BYTES:
        raise MalformedMessage(f"a manifest of {len(signed_manifest)} bytes; at most {_MAX_MANIFEST_BYTES} are read")
    try:
        message = SignedManifest.FromString(signed_manifest)
        fields: Any = json.loads(message.manifest_json)
    except (DecodeError, ValueError, RecursionError):
        raise MalformedMessage("the manifest does not decode") from None
    owner = fields.get("owner") if isinstance(fields, dict) else None
    if not isinstance(owner, str) or not verify(
        PeerId(owner), message.signature, Domain.MANIFEST, message.manifest_json
    ):
        raise MalformedMessage("the manifest is not signed by the owner it names")
    if fields.get("protocol_version") != PROTOCOL_VERSION:
        raise ManifestMismatch(
            f"protocol_version: ours {PROTOCOL_VERSION}, theirs {fields.get('protocol_version')}; "
            "install the version of swarmoe that the swarm runs"
        )
    try:
        manifest = RunManifest.model_validate_json(message.manifest_json)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise ManifestMismatch(f"{where}: {first['msg']}; the swarm may run another version of swarmoe") from None
    if manifest.canonical_json() != message.manifest_json:
        raise ManifestMismatch("the manifest reads differently here; the swarm runs another version of swarmoe")
    return manifest


def sign_info(
    identity: Identity,
    request: InfoRequest,
    *,
    certificate_der: bytes,
    signed_manifest: bytes,
    dht_addresses: Sequence[str],
    software_version: str,
) -> InfoReply:
    """The answer to one Info request. The addresses and the version are vouched for by the TLS session it signs for."""
    signature = identity.sign(Domain.INFO, *_info_fields(request.nonce, certificate_der, signed_manifest))
    return InfoReply(
        public_key=identity.public_key,
        signature=signature,
        software_version=software_version,
        signed_manifest=signed_manifest,
        dht_addresses=dht_addresses,
    )


def verify_info(reply: InfoReply, *, join: JoinAddress, nonce: bytes, certificate_der: bytes) -> Introduction:
    """Raises WrongKey when somebody else answered, MalformedMessage when this is no member's answer, ManifestMismatch
    when its version is another.
    """
    try:
        peer_id = peer_id_of(reply.public_key)
    except ValueError as error:
        raise MalformedMessage(f"whoever answers has no identity: {error}") from None
    if join.peer_id is not None and peer_id != join.peer_id:
        raise WrongKey(f"{peer_id} answers there, not the key given; check the address or drop the key")
    if not verify(peer_id, reply.signature, Domain.INFO, *_info_fields(nonce, certificate_der, reply.signed_manifest)):
        raise MalformedMessage(f"the answer is not signed by {peer_id}: something stands in between")
    texts = [reply.software_version, *reply.dht_addresses]
    if len(texts) > _MAX_DHT_ADDRESSES or max(map(len, texts)) > _MAX_TEXT_CHARS:
        raise MalformedMessage("the answer lists more than anybody needs")
    return Introduction(
        peer_id=peer_id,
        address=join.address,
        certificate_der=certificate_der,
        manifest=verify_manifest(reply.signed_manifest),
        signed_manifest=reply.signed_manifest,
        dht_addresses=tuple(reply.dht_addresses),
        software_version=reply.software_version,
    )


async def introduce(transport: Transport, joins: Sequence[JoinAddress], *, timeout_s: float) -> Introduction:
    """Ask all addresses at once and take the first good answer.

    Raises ManifestMismatch when somebody answers for a version we do not speak, else CouldNotJoin with each address's
    reason, as WrongKey when somebody else than expected answers, within `timeout_s`.
    """
    failures: list[tuple[JoinAddress, _Failure]] = []
    async with asyncio.TaskGroup() as group:
        attempts = [group.create_task(_ask(transport, join, timeout_s)) for join in joins]
        for attempt in asyncio.as_completed(attempts):
            join, answer = await attempt
            if isinstance(answer, Introduction):
                for loser in attempts:
                    loser.cancel()
                return answer
            failures.append((join, answer))
    for _, failure in failures:
        if isinstance(failure, ManifestMismatch):
            raise failure
    reasons = "; ".join(f"{join.address}: {failure.args[0]}" for join, failure in failures)
    kind = WrongKey if any(isinstance(failure, WrongKey) for _, failure in failures) else CouldNotJoin
    raise kind(f"nobody let us in: {reasons}" if reasons else "no address to join was given")


async def _ask(
    transport: Transport, join: JoinAddress, timeout_s: float
) -> tuple[JoinAddress, Introduction | _Failure]:
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        reply, certificate_der = await transport.info(join.address, InfoRequest(nonce=nonce), timeout_s=timeout_s)
        return join, verify_info(reply, join=join, nonce=nonce, certificate_der=certificate_der)
    except (RemoteError, WrongKey, MalformedMessage, ManifestMismatch) as failure:
        return join, failure


def _info_fields(nonce: bytes, certificate_der: bytes, signed_manifest: bytes) -> tuple[bytes, ...]:
    return nonce, sha256_of(certificate_der), sha256_of(signed_manifest)
