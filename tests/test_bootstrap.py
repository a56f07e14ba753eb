"""First contact believes what is proved and says why not otherwise."""

import asyncio
import json

import pytest

from experts.settings import ExpertShape
from peer.bootstrap import (
    Introduction,
    JoinAddress,
    introduce,
    parse_join,
    sign_info,
    sign_manifest,
    verify_info,
    verify_manifest,
)
from peer.errors import CouldNotJoin, MalformedMessage, ManifestMismatch, WrongKey
from peer.identity import Domain, Identity
from peer.manifest import RunManifest
from peer.memory_transport import MemoryNetwork
from peer.transport import CallRefused, PeerId, Refusal
from protos.swarm_pb2 import InfoReply, InfoRequest, SignedManifest
from tests.transport_worlds import TestServicer, echo
from tests.virtual_clock import run_virtual

OWNER = Identity.generate()
MANIFEST = RunManifest(owner=OWNER.peer_id, expert=ExpertShape(dim=128, hidden=64))
SIGNED_MANIFEST = sign_manifest(OWNER, MANIFEST)
NONCE = b"n" * 16
CERTIFICATE = b"certificate"
KEY = OWNER.peer_id


@pytest.mark.parametrize(
    ("text", "address", "key"),
    [
        ("192.0.2.7:4000", "192.0.2.7:4000", None),
        (f"example.org:4000/{KEY}", "example.org:4000", KEY),
        (f" [2001:db8::7]:4000/{KEY}\n", "[2001:db8::7]:4000", KEY),
        ("[fe80::1%eth0]:65535", "[fe80::1%eth0]:65535", None),
    ],
)
def test_a_join_is_an_address_and_perhaps_a_key(text: str, address: str, key: str | None) -> None:
    join = parse_join(text)

    assert join == JoinAddress(address, None if key is None else PeerId(key))
    assert parse_join(str(join)) == join


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("", "write HOST:PORT"),
        ("example.org", "write HOST:PORT"),
        (":4000", "write HOST:PORT"),
        ("2001:db8::7:4000", "write HOST:PORT"),
        ("a b:4000", "write HOST:PORT"),
        ("http://example.org:4000", "write HOST:PORT"),
        ("example.org:0", "1 to 65535"),
        ("example.org:65536", "1 to 65535"),
        ("example.org:4000/", "not a peer id"),
        ("example.org:4000/KEY", "not a peer id"),
        (f"example.org:4000/{KEY}/x", "not a peer id"),
    ],
)
def test_anything_else_is_no_join_and_the_error_says_what_to_write(text: str, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        parse_join(text)


def test_a_signed_manifest_comes_back_as_it_was() -> None:
    assert verify_manifest(SIGNED_MANIFEST) == MANIFEST


def test_only_the_owner_signs() -> None:
    with pytest.raises(ValueError, match="owner is"):
        sign_manifest(Identity.generate(), MANIFEST)


def _signed(fields: object) -> bytes:
    manifest_json = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    signature = OWNER.sign(Domain.MANIFEST, manifest_json)
    return SignedManifest(manifest_json=manifest_json, signature=signature).SerializeToString()


def _fields(**changes: object) -> dict[str, object]:
    return json.loads(MANIFEST.canonical_json()) | changes


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (_fields(protocol_version=2), "protocol_version: ours 1, theirs 2"),
        (_fields(protocol_version=None), "protocol_version: ours 1, theirs None"),
        (_fields(steps=0), "steps: "),
        (_fields(new_setting=1), "new_setting: "),
        ({key: value for key, value in _fields().items() if key != "seed"}, "reads differently"),
    ],
)
def test_a_manifest_of_another_version_is_a_mismatch_naming_the_field(fields: object, reason: str) -> None:
    with pytest.raises(ManifestMismatch, match=reason):
        verify_manifest(_signed(fields))


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("signed_manifest", "reason"),
    [
        (b"", "does not decode"),
        (b"\xff\xff", "does not decode"),
        (SignedManifest(manifest_json=b"[" * 50_000).SerializeToString(), "does not decode"),
        (SignedManifest(manifest_json=b"\xff").SerializeToString(), "does not decode"),
        (bytes(1 << 20), "at most 65536"),
        (_signed([]), "not signed by the owner"),
        (_signed({}), "not signed by the owner"),
        (_signed(_fields(owner=7)), "not signed by the owner"),
        (_signed(_fields(owner="nobody")), "not signed by the owner"),
        (_signed(_fields(owner=Identity.generate().peer_id)), "not signed by the owner"),
        (SIGNED_MANIFEST[:-1] + bytes([SIGNED_MANIFEST[-1] ^ 1]), "not signed by the owner"),
    ],
)
def test_a_manifest_that_is_none_or_not_the_owners_is_malformed(signed_manifest: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        verify_manifest(signed_manifest)


def _info(identity: Identity = OWNER, *, certificate_der: bytes = CERTIFICATE, nonce: bytes = NONCE) -> InfoReply:
    return sign_info(
        identity,
        InfoRequest(nonce=nonce),
        certificate_der=certificate_der,
        signed_manifest=SIGNED_MANIFEST,
        dht_addresses=["/ip4/192.0.2.7/tcp/4001/p2p/Qm"],
        software_version="0.1.0",
    )


def _verify(reply: InfoReply, key: PeerId | None = None) -> Introduction:
    return verify_info(reply, join=JoinAddress("host:1", key), nonce=NONCE, certificate_der=CERTIFICATE)


def test_an_introduction_holds_what_was_proved() -> None:
    peer = Identity.generate()

    introduction = _verify(_info(peer), peer.peer_id)

    assert introduction == Introduction(
        peer_id=peer.peer_id,
        address="host:1",
        certificate_der=CERTIFICATE,
        manifest=MANIFEST,
        signed_manifest=SIGNED_MANIFEST,
        dht_addresses=("/ip4/192.0.2.7/tcp/4001/p2p/Qm",),
        software_version="0.1.0",
    )


@pytest.mark.hostile
def test_another_identity_than_the_key_given_is_not_believed() -> None:
    with pytest.raises(WrongKey, match="not the key given"):
        _verify(_info(Identity.generate()), OWNER.peer_id)


@pytest.mark.hostile
def test_an_answer_of_another_time_certificate_or_content_is_not_believed() -> None:
    tampered = _info()
    tampered.signed_manifest = _signed(_fields(seed=1))
    unsigned = _info()
    unsigned.public_key = Identity.generate().public_key

    for reply in (_info(nonce=b"earlier" + bytes(9)), _info(certificate_der=b"proxy"), tampered, unsigned):
        with pytest.raises(MalformedMessage, match="not signed by"):
            _verify(reply)
    with pytest.raises(MalformedMessage, match="no identity"):
        _verify(InfoReply())


@pytest.mark.hostile
def test_an_answer_with_more_addresses_than_anybody_needs_is_not_believed() -> None:
    many, long = _info(), _info()
    many.dht_addresses.extend(["/ip4/192.0.2.7/tcp/1"] * 1000)
    long.dht_addresses.append("x" * 1000)

    for reply in (many, long):
        with pytest.raises(MalformedMessage, match="more than anybody needs"):
            _verify(reply)


class _Introducer(TestServicer):
    """A member that answers Info as it should, or with something else."""

    def __init__(self, identity: Identity, certificate_der: bytes, instead: InfoReply | None = None) -> None:
        super().__init__(echo)
        self._identity = identity
        self._certificate_der = certificate_der
        self._instead = instead

    async def info(self, request: InfoRequest) -> InfoReply:
        if self._instead is not None:
            return self._instead
        return _info(self._identity, certificate_der=self._certificate_der, nonce=request.nonce)


class _Swarm:
    def __init__(self) -> None:
        self._network = MemoryNetwork()
        self.joiner = self._network.transport(Identity.generate())

    async def member(self, instead: InfoReply | None = None) -> JoinAddress:
        identity = Identity.generate()
        transport = self._network.transport(identity)
        server = await transport.serve(_Introducer(identity, transport.certificate_der, instead), "host:0")
        return JoinAddress(server.address, identity.peer_id)


def test_a_joiner_is_introduced_by_whoever_is_there() -> None:
    async def scenario() -> None:
        swarm = _Swarm()
        good = await swarm.member()

        introduction = await introduce(swarm.joiner, [JoinAddress("gone:1"), good], timeout_s=5)

        assert (introduction.peer_id, introduction.address) == (good.peer_id, good.address)
        assert introduction.manifest == MANIFEST

    run_virtual(scenario())


def test_a_member_that_hangs_does_not_hold_up_one_that_answers() -> None:
    async def scenario() -> float:
        swarm = _Swarm()

        class Hanging(TestServicer):
            async def info(self, request: InfoRequest) -> InfoReply:
                await asyncio.Event().wait()
                return InfoReply()

        hanging = await swarm.joiner.serve(Hanging(echo), "host:0")
        good = await swarm.member()
        began_s = asyncio.get_running_loop().time()

        introduction = await introduce(swarm.joiner, [JoinAddress(hanging.address), good], timeout_s=5)

        assert introduction.address == good.address
        return asyncio.get_running_loop().time() - began_s

    assert run_virtual(scenario()) == 0.0


def test_nobody_there_lists_every_address_with_its_reason() -> None:
    async def scenario() -> str:
        swarm = _Swarm()
        impostor = JoinAddress((await swarm.member()).address, OWNER.peer_id)
        silent = await swarm.member(instead=InfoReply())
        with pytest.raises(CouldNotJoin) as error:
            await introduce(swarm.joiner, [JoinAddress("gone:1"), impostor, silent], timeout_s=5)
        return str(error.value)

    message = run_virtual(scenario())

    assert "gone:1: cannot connect: nobody listens there" in message
    assert "not the key given" in message
    assert "no identity" in message


def test_somebody_else_at_the_address_is_an_error_of_its_own() -> None:
    async def scenario() -> None:
        swarm = _Swarm()
        impostor = JoinAddress((await swarm.member()).address, OWNER.peer_id)
        with pytest.raises(WrongKey):
            await introduce(swarm.joiner, [JoinAddress("gone:1"), impostor], timeout_s=5)

    run_virtual(scenario())


def test_no_address_at_all_says_so() -> None:
    async def scenario() -> None:
        with pytest.raises(CouldNotJoin, match="no address"):
            await introduce(_Swarm().joiner, [], timeout_s=5)

    run_virtual(scenario())


def test_another_version_is_a_mismatch_even_when_others_do_not_answer() -> None:
    async def scenario() -> None:
        swarm = _Swarm()
        identity = Identity.generate()
        transport = swarm.joiner

        class Newer(TestServicer):
            async def info(self, request: InfoRequest) -> InfoReply:
                return sign_info(
                    identity,
                    request,
                    certificate_der=transport.certificate_der,
                    signed_manifest=_signed(_fields(protocol_version=2)),
                    dht_addresses=[],
                    software_version="9",
                )

        newer = await transport.serve(Newer(echo), "host:0")
        with pytest.raises(ManifestMismatch, match="protocol_version: ours 1, theirs 2"):
            await introduce(transport, [JoinAddress("gone:1"), JoinAddress(newer.address)], timeout_s=5)

    run_virtual(scenario())


def test_a_refused_info_is_a_reason_too() -> None:
    async def scenario() -> None:
        swarm = _Swarm()

        class Refusing(TestServicer):
            async def info(self, request: InfoRequest) -> InfoReply:
                raise CallRefused(Refusal.OVERLOADED, "starting up")

        refusing = await swarm.joiner.serve(Refusing(echo), "host:0")
        with pytest.raises(CouldNotJoin, match="starting up"):
            await introduce(swarm.joiner, [JoinAddress(refusing.address)], timeout_s=5)

    run_virtual(scenario())
