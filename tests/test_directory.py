"""The directory: snapshots, expiry, failing refreshes, waiting."""

import asyncio
import base64
from dataclasses import FrozenInstanceError

import pytest

from experts.uid import ExpertUid, RunId
from peer.directory import Directory
from peer.identity import Identity
from peer.memory_store import MemoryBoard, MemoryStore
from peer.records import HostedExpert, PeerFlag, PeerRecord, PeerState, TrainerRecord

RUN = RunId("5" * 32)
NOW = 1_000_000.0
UIDS = [ExpertUid(0, index) for index in range(4)]
CERTIFICATE = b"certificate"


class Member:
    """One that announces itself on the board."""

    def __init__(self, board: MemoryBoard) -> None:
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.store = MemoryStore(self.identity, RUN, board)

    async def announce(
        self,
        *uids: ExpertUid,
        state: PeerState = "online",
        flags: tuple[PeerFlag, ...] = (),
        claimed_at_unix_s: float = NOW,
        now_unix_s: float = NOW,
        lifetime_s: float = 15.0,
    ) -> None:
        record = PeerRecord(
            peer_id=self.peer_id,
            state=state,
            flags=flags,
            address="127.0.0.1:7",
            certificate_der_b64=base64.b64encode(CERTIFICATE).decode(),
            experts=tuple(
                HostedExpert(uid=str(uid), version=4, claimed_at_unix_s=claimed_at_unix_s, bias=0.5, share=2.0)
                for uid in uids
            ),
            queued_rows=9,
        )
        assert await self.store.put(record, lifetime_s=lifetime_s, now_unix_s=now_unix_s)


@pytest.fixture
def board() -> MemoryBoard:
    return MemoryBoard()


@pytest.fixture
def directory(board: MemoryBoard) -> Directory:
    return Directory(MemoryStore(Identity.generate(), RUN, board))


def test_before_the_first_refresh_nothing_is_known(directory: Directory) -> None:
    snapshot = directory.snapshot()

    assert snapshot.peers == {}
    assert snapshot.replicas(UIDS[0]) == ()
    assert snapshot.primary(UIDS[0]) is None
    assert snapshot.uncovered(UIDS) == UIDS


async def test_a_replica_is_what_its_peer_announced(board: MemoryBoard, directory: Directory) -> None:
    member = Member(board)
    await member.announce(UIDS[1])

    (replica,) = (await directory.refresh_once(NOW)).replicas(UIDS[1])

    assert (replica.endpoint.peer_id, replica.endpoint.address) == (member.peer_id, "127.0.0.1:7")
    assert replica.endpoint.certificate_der == CERTIFICATE
    assert (replica.version, replica.bias, replica.share, replica.queued_rows) == (4, 0.5, 2.0, 9)
    assert replica.latency_s is None


async def test_the_earliest_claim_is_the_primary_then_the_lowest_peer_id(
    board: MemoryBoard, directory: Directory
) -> None:
    late, *early = sorted((Member(board) for _ in range(3)), key=lambda member: member.peer_id)
    await late.announce(UIDS[0], claimed_at_unix_s=NOW)
    for member in early:
        await member.announce(UIDS[0], claimed_at_unix_s=NOW - 1)

    snapshot = await directory.refresh_once(NOW)

    assert [replica.endpoint.peer_id for replica in snapshot.replicas(UIDS[0])] == [
        early[0].peer_id,
        early[1].peer_id,
        late.peer_id,
    ]
    assert snapshot.primary(UIDS[0]) == snapshot.replicas(UIDS[0])[0]


@pytest.mark.parametrize(
    ("state", "flags", "is_called", "is_claim"),
    [
        ("online", (), True, True),
        ("online", ("relayed",), True, True),
        ("online", ("paused",), False, True),
        ("online", ("quarantined",), False, True),
        ("joining", (), False, True),
        ("syncing", (), False, True),
        ("draining", (), False, False),
        ("offline", (), False, False),
    ],
)
async def test_only_who_is_online_is_called_and_who_leaves_claims_nothing(
    board: MemoryBoard,
    directory: Directory,
    state: PeerState,
    flags: tuple[PeerFlag, ...],
    is_called: bool,
    is_claim: bool,
) -> None:
    await Member(board).announce(UIDS[0], state=state, flags=flags)

    snapshot = await directory.refresh_once(NOW)

    assert bool(snapshot.replicas(UIDS[0])) is is_called
    assert bool(snapshot.claims(UIDS[0])) is is_claim
    assert snapshot.uncovered(UIDS) == (UIDS[1:] if is_called else UIDS)


async def test_a_tombstone_removes_its_peer_before_it_expires(board: MemoryBoard, directory: Directory) -> None:
    member = Member(board)
    await member.announce(UIDS[0])
    await directory.refresh_once(NOW)

    await member.announce(state="offline", lifetime_s=16.0)

    assert (await directory.refresh_once(NOW + 1)).peers == {}


async def test_what_is_known_outlives_failing_refreshes_until_it_expires(
    board: MemoryBoard, directory: Directory
) -> None:
    await Member(board).announce(UIDS[0])
    await directory.refresh_once(NOW)
    board.reads_to_fail = 100

    before = await directory.refresh_once(NOW + 14.9)
    after = await directory.refresh_once(NOW + 15.0)

    assert before.replicas(UIDS[0])
    assert not after.replicas(UIDS[0])


async def test_a_member_missing_from_one_reading_is_still_there(board: MemoryBoard, directory: Directory) -> None:
    await Member(board).announce(UIDS[0])
    await directory.refresh_once(NOW)
    board.held.clear()

    assert (await directory.refresh_once(NOW + 5)).replicas(UIDS[0])


async def test_an_older_record_does_not_replace_a_newer_one(board: MemoryBoard, directory: Directory) -> None:
    member = Member(board)
    await member.announce(UIDS[0])
    stale = dict(board.held)
    await member.announce(UIDS[1], now_unix_s=NOW + 5)
    await directory.refresh_once(NOW + 5)
    board.held.update(stale)

    snapshot = await directory.refresh_once(NOW + 6)

    assert snapshot.replicas(UIDS[1])
    assert not snapshot.replicas(UIDS[0])


async def test_trainers_are_seen_until_they_leave(board: MemoryBoard, directory: Directory) -> None:
    member = Member(board)
    trainer = TrainerRecord(peer_id=member.peer_id, state="online", step=3)
    await member.store.put(trainer, lifetime_s=15, now_unix_s=NOW)
    seen = await directory.refresh_once(NOW)

    gone = TrainerRecord(peer_id=member.peer_id, state="offline", step=4)
    await member.store.put(gone, lifetime_s=16, now_unix_s=NOW)

    assert seen.trainers == {member.peer_id: trainer}
    assert (await directory.refresh_once(NOW)).trainers == {}


async def test_latencies_are_averaged_and_forgotten_with_their_peer(board: MemoryBoard, directory: Directory) -> None:
    member = Member(board)
    await member.announce(UIDS[0])
    for seconds in (0.1, 0.2, float("nan"), -1.0, float("inf")):
        directory.observe_latency(member.peer_id, seconds)

    (replica,) = (await directory.refresh_once(NOW)).replicas(UIDS[0])
    await directory.refresh_once(NOW + 20)
    await member.announce(UIDS[0], now_unix_s=NOW + 20)
    (returned,) = (await directory.refresh_once(NOW + 20)).replicas(UIDS[0])

    assert replica.latency_s == pytest.approx(0.12)
    assert returned.latency_s is None


async def test_a_snapshot_never_changes(board: MemoryBoard, directory: Directory) -> None:
    member = Member(board)
    await member.announce(UIDS[0])
    snapshot = await directory.refresh_once(NOW)
    await directory.refresh_once(NOW + 20)

    assert snapshot.replicas(UIDS[0])
    assert snapshot is not directory.snapshot()
    with pytest.raises(TypeError):
        snapshot.peers[member.peer_id] = snapshot.peers[member.peer_id]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(FrozenInstanceError):
        snapshot.taken_at_unix_s = 0.0  # pyright: ignore[reportAttributeAccessIssue]


async def test_a_waiter_wakes_with_the_view_it_waited_for(board: MemoryBoard, directory: Directory) -> None:
    waiting = asyncio.ensure_future(directory.wait_until(lambda view: not view.uncovered(UIDS[:2]), timeout_s=5))
    await Member(board).announce(UIDS[0])
    await directory.refresh_once(NOW)
    await Member(board).announce(UIDS[1])

    snapshot = await directory.refresh_once(NOW)

    assert await waiting is snapshot


async def test_a_waiter_for_what_is_so_does_not_wait(directory: Directory) -> None:
    assert await directory.wait_until(lambda view: not view.peers, timeout_s=0) is directory.snapshot()


async def test_a_waiter_for_what_never_comes_gets_none_in_time(directory: Directory) -> None:
    assert await directory.wait_until(lambda view: bool(view.peers), timeout_s=0.001) is None


async def test_running_refreshes_by_the_given_clock_until_cancelled(board: MemoryBoard) -> None:
    directory = Directory(MemoryStore(Identity.generate(), RUN, board), refresh_every_s=0.001, clock=lambda: NOW)
    board.reads_to_fail = 2
    await Member(board).announce(UIDS[0])

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(directory.run())
        snapshot = await directory.wait_until(lambda view: bool(view.peers), timeout_s=5)
        running.cancel()

    assert snapshot is not None
    assert snapshot.taken_at_unix_s == NOW


@pytest.mark.hostile
async def test_a_peer_that_lists_an_expert_twice_is_one_replica(board: MemoryBoard, directory: Directory) -> None:
    await Member(board).announce(UIDS[0], UIDS[0])

    snapshot = await directory.refresh_once(NOW)

    assert len(snapshot.replicas(UIDS[0])) == 1
    assert len(snapshot.claims(UIDS[0])) == 1
