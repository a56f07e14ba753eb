import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.coordinator import RUN_LIFETIME_S, STALE_AFTER_S, Coordinator, Opened, coordinating
from coordinator.run_folder import MEMBERS_FILE, own_run, remember_members, remembered_members
from peer.bootstrap import JoinAddress, introduce, parse_join, sign_manifest, verify_manifest
from peer.errors import BadConfiguration, CouldNotListen, ManifestMismatch, RequestRejected
from peer.identity import Identity
from peer.memory_store import MemoryBoard, MemoryStore
from peer.memory_transport import MemoryNetwork
from peer.probing import measure_link
from peer.records import RECORD_LIFETIME_S, PeerRecord
from peer.run_folder import RUN_FILE
from peer.transport import Endpoint, Method
from protos.swarm_pb2 import InfoRequest
from tests.swarm_scenes import SIX_EXPERTS, peer


@dataclass
class Swarm:
    """One owner, one member, and what they share."""

    owner: Identity = field(default_factory=Identity.generate)
    member: Identity = field(default_factory=Identity.generate)
    board: MemoryBoard = field(default_factory=MemoryBoard)
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    remembered: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.manifest = SIX_EXPERTS.model_copy(update={"owner": self.owner.peer_id})

    def store(self, identity: Identity) -> MemoryStore:
        return MemoryStore(identity, self.manifest.run_id, self.board)

    async def remember(self, joins: tuple[str, ...]) -> None:
        self.remembered.append(joins)

    async def announce(self, record: PeerRecord, *, now_unix_s: float) -> None:
        """Have the member put this record under its own name."""
        own = record.model_copy(update={"peer_id": self.member.peer_id})
        assert await self.store(self.member).put(own, lifetime_s=RECORD_LIFETIME_S, now_unix_s=now_unix_s)

    def coordinator(self, clock: Callable[[], float]) -> Coordinator:
        return Coordinator(
            self.manifest,
            self.store(self.owner),
            join=f"192.0.2.9:4700/{self.owner.peer_id}",
            signed_manifest=sign_manifest(self.owner, self.manifest),
            remember=self.remember,
            clock=clock,
        )

    def coordinating(self, http: str = "127.0.0.1:0") -> AbstractAsyncContextManager[Opened]:
        transport = self.network.transport(self.owner)
        return coordinating(
            self.owner,
            self.manifest,
            store=self.store(self.owner),
            transport=transport,
            certificate_der=transport.certificate_der,
            listen="127.0.0.1:0",
            http=http,
            remember=self.remember,
        )


@pytest.fixture
async def swarm() -> Swarm:
    return Swarm()


async def no_frames() -> AsyncIterator[Any]:
    return
    yield


async def test_a_joiner_is_told_the_run_and_where_the_dht_is(swarm: Swarm) -> None:
    async with swarm.coordinating() as opened:
        told = await introduce(swarm.network.transport(swarm.member), [parse_join(opened.join)], timeout_s=5)

    assert told.manifest == swarm.manifest
    assert told.peer_id == swarm.owner.peer_id
    assert told.dht_addresses == tuple(swarm.store(swarm.owner).addresses())


@pytest.mark.parametrize("method", [Method.FORWARD, Method.BACKWARD])
async def test_a_coordinator_refuses_calls_with_a_sentence(swarm: Swarm, method: Method) -> None:
    async with swarm.coordinating() as opened:
        transport = swarm.network.transport(swarm.member)
        _, certificate_der = await transport.info(
            parse_join(opened.join).address, InfoRequest(nonce=b"0" * 16), timeout_s=5
        )
        endpoint = Endpoint(swarm.owner.peer_id, parse_join(opened.join).address, certificate_der)

        with pytest.raises(RequestRejected, match="hosts no experts"):
            async for _ in transport.call(endpoint, method, no_frames(), timeout_s=5):
                pass


async def test_a_coordinator_lets_a_joiner_measure_the_way_to_it(swarm: Swarm) -> None:
    async with swarm.coordinating() as opened:
        transport = swarm.network.transport(swarm.member)
        told = await introduce(transport, [parse_join(opened.join)], timeout_s=5)

        link = await measure_link(transport, told.endpoint())

    assert link.bits_per_s > 0


async def test_the_run_is_in_the_records_signed_by_its_owner(swarm: Swarm) -> None:
    async with swarm.coordinating():
        found = await swarm.store(swarm.member).run(now_unix_s=time.time())

    assert found is not None
    assert verify_manifest(base64.b64decode(found.signed_manifest_b64)) == swarm.manifest


async def test_the_run_lives_an_hour_from_when_it_was_last_published(swarm: Swarm) -> None:
    now = 1000.0
    coordinator = swarm.coordinator(lambda: now)
    await coordinator.publish_run()
    now = 1060.0
    await coordinator.publish_run()

    reader = swarm.store(swarm.member)

    assert await reader.run(now_unix_s=1060.0 + RUN_LIFETIME_S - 1) is not None
    assert await reader.run(now_unix_s=1060.0 + RUN_LIFETIME_S + 1) is None


async def test_whoever_announces_is_in_the_state_over_http(swarm: Swarm) -> None:
    async with swarm.coordinating() as opened, httpx.AsyncClient(base_url=f"http://{opened.http_address}") as http:
        before = (await http.get("/api/state")).json()
        await swarm.announce(peer("", "0.0", "0.1"), now_unix_s=time.time())
        await opened.coordinator.look()
        after = (await http.get("/api/state")).json()
        health = (await http.get("/healthz")).json()
        metrics = (await http.get("/metrics")).text

    assert before["run"] == swarm.manifest.run_id
    assert before["peers"] == []
    assert [known["peer_id"] for known in after["peers"]] == [swarm.member.peer_id]
    assert after["uncovered"] == ["0.2", "1.0", "1.1", "1.2"]
    assert health == {"status": "ok", "detail": "peers: 1, experts served: 2 of 6"}
    assert 'swarmoe_peers{state="online"} 1.0' in metrics


async def test_a_watcher_is_greeted_with_everything_and_then_told_what_changed(swarm: Swarm) -> None:
    async with (
        swarm.coordinating() as opened,
        httpx.AsyncClient(base_url=f"http://{opened.http_address}") as http,
        http.stream("GET", "/events") as stream,
    ):
        lines = stream.aiter_lines()
        hello = await _next_event(lines)
        await swarm.announce(peer("", "0.0"), now_unix_s=time.time())
        await opened.coordinator.look()
        update = await _next_event(lines)

    assert hello[0] == "hello"
    assert hello[1]["join"] == opened.join
    assert hello[1]["state"]["peers"] == []
    assert update[0] == "update"
    assert [event["name"] for event in update[1]["events"]] == ["peer.joined", "experts.covered"]


async def test_a_look_that_sees_nothing_new_tells_nobody(swarm: Swarm) -> None:
    now = 1000.0
    coordinator = swarm.coordinator(lambda: now)
    await swarm.announce(peer("", "0.0"), now_unix_s=now)
    await coordinator.look()
    heard = coordinator.http_content().feed.listen().messages(beat_every_s=0.01)
    await anext(heard)

    now = 1001.0
    await coordinator.look()

    assert (await anext(heard)).startswith(b"event: beat")


async def test_a_dead_peer_is_gone_when_its_record_expires(swarm: Swarm) -> None:
    now = 1000.0
    coordinator = swarm.coordinator(lambda: now)
    await swarm.announce(peer("", "0.0"), now_unix_s=now)
    await coordinator.look()

    now += RECORD_LIFETIME_S + 1
    await coordinator.look()

    state = json.loads(coordinator.http_content().state_json())
    assert state["peers"] == []
    assert "0.0" in state["uncovered"]


async def test_health_fails_when_nobody_looks_any_more(swarm: Swarm) -> None:
    now = 1000.0
    coordinator = swarm.coordinator(lambda: now)
    await coordinator.look()
    content = coordinator.http_content()
    assert content.health().ok

    now += STALE_AFTER_S + 1

    assert not content.health().ok
    assert "16 s ago" in content.health().detail


async def test_records_that_cannot_be_read_change_nothing(swarm: Swarm) -> None:
    now = 1000.0
    coordinator = swarm.coordinator(lambda: now)
    await swarm.announce(peer("", "0.0"), now_unix_s=now)
    await coordinator.look()

    swarm.board.reads_to_fail = 2
    await coordinator.look()

    assert len(json.loads(coordinator.http_content().state_json())["peers"]) == 1


async def test_members_are_remembered_when_they_change_and_an_empty_swarm_forgets_none(swarm: Swarm) -> None:
    now = 1000.0
    coordinator = swarm.coordinator(lambda: now)
    await swarm.announce(peer("", "0.0"), now_unix_s=now)
    await coordinator.look()
    await coordinator.look()

    now += RECORD_LIFETIME_S + 1
    await coordinator.look()

    assert swarm.remembered == [(f"192.0.2.7:4701/{swarm.member.peer_id}",)]


async def test_a_taken_page_port_leaves_nothing_open(swarm: Swarm) -> None:
    async with swarm.coordinating() as opened:
        with pytest.raises(CouldNotListen):
            async with swarm.coordinating(http=opened.http_address):
                pass

        other = await introduce(swarm.network.transport(swarm.member), [parse_join(opened.join)], timeout_s=5)
        assert other.peer_id == swarm.owner.peer_id


def test_a_folder_keeps_its_run(tmp_path: Path) -> None:
    owner = Identity.generate().peer_id

    first = own_run(tmp_path, SIX_EXPERTS, owner=owner)

    assert first.owner == owner
    assert own_run(tmp_path, SIX_EXPERTS, owner=owner) == first


def test_another_run_on_a_folder_is_refused_naming_the_fields(tmp_path: Path) -> None:
    owner = Identity.generate().peer_id
    own_run(tmp_path, SIX_EXPERTS, owner=owner)

    with pytest.raises(ManifestMismatch, match=r"seed: ours 0, theirs 7") as raised:
        own_run(tmp_path, SIX_EXPERTS.model_copy(update={"seed": 7}), owner=owner)

    assert "another folder" in str(raised.value)
    assert "experts_per_layer" not in str(raised.value)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"name": "six"}'])
def test_a_torn_run_file_is_said_and_kept(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / RUN_FILE).write_bytes(torn)

    with pytest.raises(BadConfiguration, match=RUN_FILE):
        own_run(tmp_path, SIX_EXPERTS, owner=Identity.generate().peer_id)

    assert (tmp_path / RUN_FILE).read_bytes() == torn


def test_members_are_found_again_in_the_folder(tmp_path: Path) -> None:
    member = Identity.generate().peer_id

    remember_members(tmp_path, (f"192.0.2.7:4701/{member}",))

    assert remembered_members(tmp_path) == (JoinAddress("192.0.2.7:4701", member),)


@pytest.mark.parametrize("text", ["", "7", '["nonsense"]', '["192.0.2.7:1/short"]'])
def test_a_torn_members_file_is_no_hint(tmp_path: Path, text: str) -> None:
    assert remembered_members(tmp_path) == ()

    (tmp_path / MEMBERS_FILE).write_text(text)

    assert remembered_members(tmp_path) == ()


async def _next_event(lines: AsyncIterator[str]) -> tuple[str, dict[str, Any]]:
    name, data = "", ""
    async with asyncio.timeout(5):
        async for line in lines:
            if not line:
                return name, json.loads(data)
            key, _, value = line.partition(": ")
            name, data = (value, data) if key == "event" else (name, data + value)
    raise AssertionError("the stream ended")
