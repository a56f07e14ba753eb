"""A peer's place in the swarm: what it claims, what it gives up, what it says."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from experts.bank import ExpertState
from experts.snapshots import KEPT_GENERATIONS, SnapshotFolder
from experts.state import Clock
from experts.uid import ExpertUid
from peer.announcer import Announcer, Place
from peer.directory import Directory
from peer.expert_host import ExpertHost
from peer.identity import Identity
from peer.memory_store import MemoryBoard, MemoryStore
from peer.records import RECORD_LIFETIME_S
from peer.transport import Endpoint
from peer.vacancies import GRACE_S
from tests.swarm import CPU, tiny_run, uids
from tests.swarm_scenes import rates

RUN = tiny_run(moe_layers=1, experts_per_layer=4)
ALL = RUN.uids()
RATES = rates(0.3, manifest=RUN)


@dataclass
class Joiner:
    identity: Identity
    host: ExpertHost
    directory: Directory
    announcer: Announcer

    @property
    def claimed(self) -> list[str]:
        return sorted(map(str, self.announcer.claimed))

    @property
    def hosted(self) -> list[str]:
        return sorted(str(status.uid) for status in self.host.statuses)

    def state(self, uid: ExpertUid) -> ExpertState:
        return self.host._compute.bank.state(uid)

    async def look(self, *, in_s: float = 0.0) -> bool:
        """What the peer does every moment, on what is known now; the clock of its own patience is `in_s` later."""
        await self.directory.refresh_once(time.time())
        return await self.announcer.look(now_s=time.monotonic() + in_s)


class Scene:
    """Peers around one board."""

    def __init__(self) -> None:
        self.board = MemoryBoard()
        self.joiners: list[Joiner] = []
        self.observer = Directory(MemoryStore(Identity.generate(), RUN.run_id, self.board))

    def joiner(
        self,
        *,
        saved: Mapping[ExpertUid, ExpertState] | None = None,
        max_experts: int = 10,
        pinned: Sequence[ExpertUid] | None = None,
        identity: Identity | None = None,
        folder: SnapshotFolder | None = None,
    ) -> Joiner:
        identity = identity or Identity.generate()
        host = ExpertHost(RUN, device=CPU, snapshots=folder, max_experts=max_experts)
        host.start()
        store = MemoryStore(identity, RUN.run_id, self.board)
        directory = Directory(store, refresh_every_s=0.005)  # 0 would keep the compute thread from the GIL
        place = Place(
            endpoint=Endpoint(identity.peer_id, "192.0.2.7:4701", b"certificate"),
            device="cpu",
            software_version="test",
            uids=tuple(pinned or ALL),
            is_pinned=pinned is not None,
            max_experts=max_experts,
            rates=RATES,
        )
        announcer = Announcer(
            place, host=host, store=store, directory=directory, saved=saved or {}, rng=random.Random(0)
        )
        self.joiners.append(Joiner(identity, host, directory, announcer))
        return self.joiners[-1]

    async def take_places(self, *joiners: Joiner) -> None:
        """Side by side, each with a directory that keeps refreshing."""
        refreshing = [asyncio.ensure_future(joiner.directory.run()) for joiner in joiners]
        await asyncio.gather(*(joiner.announcer.take_place() for joiner in joiners))
        for task in refreshing:
            task.cancel()
        await asyncio.gather(*refreshing, return_exceptions=True)

    async def seen(self, *, in_s: float = 0.0) -> dict[str, list[str]]:
        """Who serves each expert, as everybody sees it."""
        snapshot = await self.observer.refresh_once(time.time() + in_s)
        return {str(uid): [replica.endpoint.peer_id for replica in snapshot.replicas(uid)] for uid in ALL}

    async def expire(self, joiner: Joiner) -> None:
        """Its record runs out: it was killed."""
        self.board.held.pop(("peer", joiner.identity.peer_id))
        for other in self.joiners:
            other.directory._known["peer"].pop(joiner.identity.peer_id, None)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    for joiner in scene.joiners:
        assert joiner.host.close(timeout_s=5.0)


def learnt(joiner: Joiner, uid: ExpertUid, *, version: int) -> ExpertState:
    """A state that no fresh expert has."""
    state = joiner.state(uid)
    weights = {name: tensor + 1.0 for name, tensor in state.weights.items()}
    return ExpertState(weights, state.moments, Clock(version, rows_learned=7 * version))


async def states_learnt(scene: Scene) -> dict[ExpertUid, ExpertState]:
    """What a peer that served everything had on its disk."""
    teacher = scene.joiner()
    await teacher.host.host(ALL, {})
    return {uid: learnt(teacher, uid, version=5) for uid in ALL}


def versions_on(folder: SnapshotFolder) -> dict[ExpertUid, int]:
    return {uid: state.clock.version for uid, state in folder.load_newest(RUN.run_id).states.items()}


# ---- joining


async def test_the_first_peer_takes_everything_and_says_so(scene: Scene) -> None:
    anne = scene.joiner()

    await scene.take_places(anne)

    assert anne.announcer.state == "online"
    assert anne.claimed == anne.hosted == ["0.0", "0.1", "0.2", "0.3"]
    assert await scene.seen() == {uid: [anne.identity.peer_id] for uid in anne.claimed}
    assert scene.observer.snapshot().peers[anne.identity.peer_id].rates == RATES


async def test_a_peer_takes_no_more_than_it_has_room_for(scene: Scene) -> None:
    anne, beth = scene.joiner(max_experts=3), scene.joiner(max_experts=3)

    await scene.take_places(anne)
    await scene.take_places(beth)

    assert len(anne.claimed) == 3
    assert set(anne.claimed) | set(beth.claimed) == set(map(str, ALL))
    assert not set(anne.claimed) & set(beth.claimed)


async def test_of_two_that_claim_the_same_the_earlier_keeps_it_and_the_other_stays_online_with_none(
    scene: Scene,
) -> None:
    anne, beth = scene.joiner(), scene.joiner()

    await scene.take_places(anne, beth)
    for joiner in (anne, beth):
        await joiner.look()
        await joiner.announcer.publish()

    assert anne.claimed == anne.hosted == list(map(str, ALL))
    assert beth.claimed == beth.hosted == []
    assert beth.announcer.state == "online"
    assert await scene.seen() == {str(uid): [anne.identity.peer_id] for uid in ALL}
    assert beth.identity.peer_id in scene.observer.snapshot().peers


async def test_where_records_travel_slowly_a_double_claim_is_settled_when_they_arrive(scene: Scene) -> None:
    scene.board.is_slow = True
    anne, beth = scene.joiner(), scene.joiner()
    await scene.take_places(anne)
    await scene.take_places(beth)
    assert anne.claimed == beth.claimed

    scene.board.is_slow = False
    scene.board.spread()
    changed = [await anne.look(), await beth.look()]

    assert changed == [False, True]
    assert anne.claimed == list(map(str, ALL))
    assert beth.claimed == beth.hosted == []


async def test_a_peer_nobody_can_see_goes_online_all_the_same(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.announcer._SEEN_WITHIN_S", 0.01)
    anne = scene.joiner()
    scene.board.stores_to_lose[anne.identity.peer_id] = 100

    await scene.take_places(anne)

    assert anne.announcer.state == "online"
    assert anne.claimed == list(map(str, ALL))


async def test_pinned_experts_are_claimed_alone_and_left_to_whoever_had_them_first(scene: Scene) -> None:
    anne = scene.joiner(max_experts=1, pinned=uids("0.1"))
    await scene.take_places(anne)
    beth = scene.joiner(pinned=uids("0.3 0.1"))

    await scene.take_places(beth)

    assert anne.claimed == ["0.1"]
    assert beth.claimed == beth.hosted == ["0.3"]


async def test_an_announcement_that_the_dht_lost_is_made_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.announcer._SEEN_WITHIN_S", 0.5)
    anne, beth = scene.joiner(), scene.joiner(pinned=ALL)
    await scene.take_places(anne)
    scene.board.stores_to_lose[beth.identity.peer_id] = 1

    await scene.take_places(beth)

    assert beth.claimed == []  # it has looked again, and anne was first


# ---- coming back


async def test_what_is_on_the_disk_is_what_is_served(scene: Scene) -> None:
    saved = await states_learnt(scene)
    anne = scene.joiner(saved=saved)

    await scene.take_places(anne)

    assert anne.state(ALL[2]).clock == saved[ALL[2]].clock
    snapshot = await scene.observer.refresh_once(time.time())
    assert {snapshot.replicas(uid)[0].version for uid in ALL} == {5}


async def test_a_peers_own_record_from_before_it_was_killed_does_not_keep_it_from_its_experts(scene: Scene) -> None:
    saved = await states_learnt(scene)
    identity = Identity.generate()
    before = scene.joiner(identity=identity)
    await scene.take_places(before)
    claimed_before = dict(before.announcer._claims)

    after = scene.joiner(identity=identity, saved=saved)
    await after.directory.refresh_once(time.time())
    await scene.take_places(after)

    assert after.claimed == list(map(str, ALL))
    assert after.state(ALL[0]).clock.version == 5
    assert all(after.announcer._claims[uid] > claimed_before[uid] for uid in ALL)


@pytest.mark.parametrize("max_experts", [0, 4])
async def test_a_record_from_before_does_not_pass_for_the_new_one(scene: Scene, max_experts: int) -> None:
    identity = Identity.generate()
    await scene.take_places(scene.joiner(identity=identity, max_experts=max_experts))
    after = scene.joiner(identity=identity, max_experts=max_experts)
    snapshot = await after.directory.refresh_once(time.time())

    await after.announcer.look(now_s=0.0)

    assert len(after.claimed) == max_experts
    assert not after.announcer._sees_us(snapshot)
    await after.announcer.publish()
    assert after.announcer._sees_us(await after.directory.refresh_once(time.time()))


# ---- others leave


async def test_an_experts_host_that_is_gone_is_waited_for_and_then_replaced(scene: Scene) -> None:
    anne, beth = scene.joiner(), scene.joiner()
    await scene.take_places(anne)
    await scene.take_places(beth)
    await scene.expire(anne)

    assert not await beth.look()
    assert not await beth.look(in_s=GRACE_S - 1)
    assert await beth.look(in_s=GRACE_S + 1)

    assert beth.claimed == beth.hosted == list(map(str, ALL))


async def test_whoever_holds_the_snapshot_takes_it_at_once(scene: Scene) -> None:
    saved = await states_learnt(scene)
    anne, beth = scene.joiner(), scene.joiner(saved={ALL[1]: saved[ALL[1]]})
    await scene.take_places(anne)
    await scene.take_places(beth)
    await scene.expire(anne)

    assert await beth.look()

    assert beth.claimed == beth.hosted == ["0.1"]
    assert beth.state(ALL[1]).clock.version == 5


async def test_a_host_that_is_back_within_the_grace_keeps_its_experts(scene: Scene) -> None:
    saved = await states_learnt(scene)
    anne, beth = scene.joiner(), scene.joiner()
    await scene.take_places(anne)
    await scene.take_places(beth)
    await scene.expire(anne)
    await beth.look()

    back = scene.joiner(saved=saved)
    await scene.take_places(back)

    assert not await beth.look(in_s=GRACE_S + 1)
    assert beth.claimed == []
    assert back.claimed == list(map(str, ALL))


async def test_what_was_learnt_before_a_claim_was_lost_is_not_forgotten(scene: Scene) -> None:
    saved = await states_learnt(scene)
    scene.board.is_slow = True
    anne, beth = scene.joiner(), scene.joiner(saved=saved)
    await scene.take_places(anne)
    await scene.take_places(beth)
    taught = learnt(beth, ALL[0], version=9)
    await beth.host._control(lambda: beth.host._compute.bank.load(ALL[0], taught))
    scene.board.is_slow = False
    scene.board.spread()
    await beth.look()
    assert beth.claimed == []

    await scene.expire(anne)
    await beth.look()

    assert beth.claimed == list(map(str, ALL))
    assert beth.state(ALL[0]).clock.version == 9


async def test_a_restart_with_less_room_leaves_no_expert_of_the_disk_behind(scene: Scene, tmp_path: Path) -> None:
    saved = await states_learnt(scene)
    folder = SnapshotFolder(tmp_path)
    anne = scene.joiner(saved=saved, max_experts=1, folder=folder)
    await scene.take_places(anne)

    for _ in range(2 * KEPT_GENERATIONS):
        await anne.host.save_snapshot(anne.announcer.saved)

    assert len(anne.hosted) == 1
    assert versions_on(folder) == dict.fromkeys(ALL, 5)


async def test_what_was_learnt_before_a_claim_was_lost_stays_on_the_disk(scene: Scene, tmp_path: Path) -> None:
    saved = await states_learnt(scene)
    folder = SnapshotFolder(tmp_path)
    scene.board.is_slow = True
    anne, beth = scene.joiner(), scene.joiner(saved=saved, folder=folder)
    await scene.take_places(anne)
    await scene.take_places(beth)
    scene.board.is_slow = False
    scene.board.spread()

    looking = asyncio.ensure_future(beth.look())
    numbers_saved = [await beth.host.save_snapshot(beth.announcer.saved)]
    while not looking.done():
        numbers_saved.append(await beth.host.save_snapshot(beth.announcer.saved))
    numbers_saved.append(await beth.host.save_snapshot(beth.announcer.saved))

    assert beth.claimed == beth.hosted == []
    assert set(numbers_saved) == {len(ALL)}  # at no moment was an expert neither here nor there
    assert versions_on(folder) == dict.fromkeys(ALL, 5)


async def test_the_states_of_served_experts_are_not_kept_twice(scene: Scene) -> None:
    anne = scene.joiner(saved=await states_learnt(scene))

    await scene.take_places(anne)

    assert not anne.announcer._saved


async def test_whoever_leaves_is_forgotten_at_once(scene: Scene) -> None:
    anne = scene.joiner()
    await scene.take_places(anne)

    await anne.announcer.withdraw()

    assert await scene.seen() == {str(uid): [] for uid in ALL}
    assert await scene.seen(in_s=RECORD_LIFETIME_S) == {str(uid): [] for uid in ALL}


async def test_a_record_is_renewed_while_nothing_changes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.announcer._LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("peer.announcer.RENEW_EVERY_S", 0.0)
    anne = scene.joiner()
    await scene.take_places(anne)
    place = ("peer", anne.identity.peer_id)
    _, expires_at_unix_s = scene.board.held[place]

    running = asyncio.ensure_future(anne.announcer.run())
    for _ in range(1000):
        await asyncio.sleep(0)  # a turn of the loop for the announcer
    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert scene.board.held[place][1] > expires_at_unix_s
