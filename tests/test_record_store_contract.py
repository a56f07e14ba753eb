"""What every record store promises: the one on hivemind's DHT and the one in memory."""

import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio

from experts.settings import ExpertShape
from experts.uid import RunId
from peer.envelope import Rejection, seal
from peer.errors import RecordsUnavailable
from peer.hivemind_store import HivemindStore
from peer.identity import Identity
from peer.manifest import RunManifest
from peer.memory_store import MemoryBoard, MemoryStore
from peer.records import Kind, PeerRecord, RecordStore, RunRecord, TrainerRecord
from peer.sealed_store import SealedStore
from peer.supervisor import DhtSettings, DhtSupervisor
from protos.swarm_pb2 import SignedManifest
from tests.dht_traces import watched

pytestmark = pytest.mark.asyncio(loop_scope="module")

OWNER = Identity.generate()
MANIFEST = RunManifest(owner=OWNER.peer_id, expert=ExpertShape(dim=128, hidden=256))
RUN = MANIFEST.run_id
MANY = 16384
"""Experts, so that the DHT spreads their hosts' records over all the keys it may."""
Plant = Callable[[Kind, str, bytes, float], Awaitable[object]]


@dataclass
class Swarm:
    """Two members, and a hand that writes anything."""

    seat: Callable[[int, Identity], SealedStore]
    plant: Plant

    def member(self, index: int, identity: Identity | None = None) -> SealedStore:
        return self.seat(index, identity or Identity.generate())


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["memory", pytest.param("hivemind", marks=pytest.mark.process)]
)
async def swarm(request: pytest.FixtureRequest) -> AsyncIterator[Swarm]:
    if request.param == "memory":
        board = MemoryBoard()

        async def plant_in_memory(kind: Kind, subkey: str, value: bytes, expires: float) -> object:
            return board.write(kind, subkey, value, expires)

        yield Swarm(lambda _, identity: MemoryStore(identity, RUN, board), plant_in_memory)
        return
    with pytest.MonkeyPatch.context() as monkeypatch, watched(monkeypatch):
        first, second = supervisors = [DhtSupervisor.spawn(), DhtSupervisor.spawn()]
        try:
            await first.start(DhtSettings(RUN, MANY), timeout_s=30)
            await second.start(DhtSettings(RUN, MANY, initial_peers=first.addresses()), timeout_s=30)
            yield Swarm(lambda index, identity: HivemindStore(identity, RUN, supervisors[index]), first.store)
        finally:
            for supervisor in supervisors:
                await supervisor.close()


def peer_record(identity: Identity, *, state: str = "online", queued_rows: int = 0) -> PeerRecord:
    return PeerRecord.model_validate(
        {
            "peer_id": identity.peer_id,
            "state": state,
            "address": "127.0.0.1:7",
            "certificate_der_b64": "",
            "queued_rows": queued_rows,
        }
    )


async def test_two_members_see_each_others_records(swarm: Swarm) -> None:
    ours, theirs, now = Identity.generate(), Identity.generate(), time.time()
    one, other = swarm.member(0, ours), swarm.member(1, theirs)

    assert await one.put(peer_record(ours), lifetime_s=15, now_unix_s=now)
    assert await other.put(peer_record(theirs, queued_rows=3), lifetime_s=15, now_unix_s=now)

    for member in (one, other):
        seen = await member.peers(now_unix_s=now)
        assert seen[ours.peer_id] == peer_record(ours)
        assert seen[theirs.peer_id] == peer_record(theirs, queued_rows=3)


async def test_kinds_do_not_mix(swarm: Swarm) -> None:
    ours, now = Identity.generate(), time.time()
    one, other = swarm.member(0, ours), swarm.member(1)
    trainer = TrainerRecord(peer_id=ours.peer_id, state="online", step=3)

    await one.put(trainer, lifetime_s=15, now_unix_s=now)

    assert (await other.trainers(now_unix_s=now))[ours.peer_id] == trainer
    assert ours.peer_id not in await other.peers(now_unix_s=now)


async def test_a_renewal_replaces_what_it_renews(swarm: Swarm) -> None:
    ours, now = Identity.generate(), time.time()
    one, other = swarm.member(0, ours), swarm.member(1)

    await one.put(peer_record(ours, queued_rows=1), lifetime_s=15, now_unix_s=now)
    await one.put(peer_record(ours, queued_rows=2), lifetime_s=15, now_unix_s=now + 0.5)

    assert (await other.peers(now_unix_s=now))[ours.peer_id].queued_rows == 2


async def test_an_earlier_expiry_is_refused(swarm: Swarm) -> None:
    ours, now = Identity.generate(), time.time()
    one, other = swarm.member(0, ours), swarm.member(1)
    await one.put(peer_record(ours, queued_rows=1), lifetime_s=20, now_unix_s=now)

    accepted = await one.put(peer_record(ours, queued_rows=2), lifetime_s=10, now_unix_s=now)

    assert not accepted
    assert (await other.peers(now_unix_s=now))[ours.peer_id].queued_rows == 1


async def test_a_tombstone_with_a_later_expiry_wins(swarm: Swarm) -> None:
    ours, now = Identity.generate(), time.time()
    one, other = swarm.member(0, ours), swarm.member(1)
    await one.put(peer_record(ours), lifetime_s=15, now_unix_s=now)

    accepted = await one.put(peer_record(ours, state="offline"), lifetime_s=16, now_unix_s=now)

    assert accepted
    assert (await other.peers(now_unix_s=now))[ours.peer_id].state == "offline"


async def test_an_expired_record_is_dropped_and_counted(swarm: Swarm) -> None:
    ours, now = Identity.generate(), time.time()
    one, other = swarm.member(0, ours), swarm.member(1)
    await one.put(peer_record(ours), lifetime_s=15, now_unix_s=now)
    assert ours.peer_id in await other.peers(now_unix_s=now + 14.9)

    seen = await other.peers(now_unix_s=now + 15.0)

    assert ours.peer_id not in seen
    assert other.rejected[Rejection.EXPIRED] > 0


async def test_what_is_read_says_when_it_expires(swarm: Swarm) -> None:
    ours, now = Identity.generate(), time.time()
    await swarm.member(0, ours).put(peer_record(ours), lifetime_s=15, now_unix_s=now)

    signed = (await swarm.member(1).read("peer", now_unix_s=now))[ours.peer_id]

    assert signed.expires_at_unix_s == now + 15


@pytest.mark.hostile
async def test_what_its_author_did_not_sign_for_this_run_is_never_read(swarm: Swarm) -> None:
    victim, now = Identity.generate(), time.time()
    expires = now + 15
    good = seal(victim, peer_record(victim), run_id=RUN, expires_at_unix_s=expires)
    thieves = [Identity.generate() for _ in range(3)]
    planted = {
        victim.peer_id: good[:-1] + bytes([good[-1] ^ 1]),
        thieves[0].peer_id: good,
        thieves[1].peer_id: b"plain",
        thieves[2].peer_id: seal(
            thieves[2], peer_record(thieves[2]), run_id=RunId("f" * 32), expires_at_unix_s=expires
        ),
    }

    for subkey, value in planted.items():
        await swarm.plant("peer", subkey, value, expires)

    for member in (swarm.member(0), swarm.member(1)):
        assert not planted.keys() & (await member.peers(now_unix_s=now)).keys()


async def test_the_owners_run_record_is_read_by_all_and_nobody_elses(swarm: Swarm) -> None:
    now, stranger = time.time(), Identity.generate()
    signed = SignedManifest(manifest_json=MANIFEST.canonical_json(), signature=b"")
    record = RunRecord(signed_manifest_b64=base64.b64encode(signed.SerializeToString()).decode())
    reader = swarm.member(1)

    await swarm.member(0, stranger).put(record, lifetime_s=600, now_unix_s=now)
    before = await reader.run(now_unix_s=now)
    await swarm.member(0, OWNER).put(record, lifetime_s=600, now_unix_s=now)

    assert before is None
    assert await reader.run(now_unix_s=now) == record


async def test_nobody_announces_itself_for_long(swarm: Swarm) -> None:
    ours = Identity.generate()

    with pytest.raises(ValueError, match="lives up to 60 s"):
        await swarm.member(0, ours).put(peer_record(ours), lifetime_s=61, now_unix_s=time.time())


async def test_a_member_has_an_address_to_join_through(swarm: Swarm) -> None:
    store: RecordStore = swarm.member(0)

    assert all(address.startswith("/") for address in store.addresses())
    assert store.addresses()


async def test_a_slow_board_shows_a_record_to_its_author_first() -> None:
    board, ours, now = MemoryBoard(), Identity.generate(), 1000.0
    one, other = MemoryStore(ours, RUN, board), MemoryStore(Identity.generate(), RUN, board)
    board.is_slow = True

    assert await one.put(peer_record(ours), lifetime_s=15, now_unix_s=now)
    seen_at_once = [ours.peer_id in await member.peers(now_unix_s=now) for member in (one, other)]
    board.spread()

    assert seen_at_once == [True, False]
    assert ours.peer_id in await other.peers(now_unix_s=now)


async def test_a_lost_store_is_told_yes() -> None:
    board, ours, now = MemoryBoard(), Identity.generate(), 1000.0
    one = MemoryStore(ours, RUN, board)
    board.stores_to_lose[ours.peer_id] = 1

    assert await one.put(peer_record(ours), lifetime_s=15, now_unix_s=now)
    assert await one.peers(now_unix_s=now) == {}


async def test_a_failing_board_says_so() -> None:
    board = MemoryBoard()
    board.reads_to_fail = 1
    one = MemoryStore(Identity.generate(), RUN, board)

    with pytest.raises(RecordsUnavailable):
        await one.peers(now_unix_s=1000.0)
