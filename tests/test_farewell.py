"""Saying goodbye: everybody hears of it, and nobody waits for those who cannot be told."""

import asyncio
import time

from experts.uid import RunId
from peer.farewell import say_goodbye
from peer.identity import Identity
from peer.memory_store import MemoryBoard, MemoryStore
from peer.records import RECORD_LIFETIME_S, Kind, TrainerRecord
from peer.sealed_store import SealedStore
from tests.virtual_clock import run_virtual

RUN_ID = RunId("0" * 32)


class DeafBoard:
    """A DHT whose other nodes have just gone: a store waits for them."""

    async def store(self, kind: Kind, subkey: str, value: bytes, expires_at_unix_s: float) -> bool:
        await asyncio.sleep(5.0)
        return True

    async def get(self, kind: Kind) -> list[tuple[str, bytes, float]]:
        return []


def record(identity: Identity, state: str) -> TrainerRecord:
    return TrainerRecord.model_validate({"peer_id": identity.peer_id, "state": state, "step": 1})


async def test_a_goodbye_replaces_what_was_said_just_before() -> None:
    ours, board = Identity.generate(), MemoryBoard()
    store, now_unix_s = MemoryStore(ours, RUN_ID, board), time.time()
    await store.put(record(ours, "online"), lifetime_s=RECORD_LIFETIME_S, now_unix_s=now_unix_s)

    await say_goodbye(store, record(ours, "offline"))

    seen = await MemoryStore(Identity.generate(), RUN_ID, board).trainers(now_unix_s=now_unix_s)
    assert [trainer.state for trainer in seen.values()] == ["offline"]


def test_a_goodbye_that_nobody_takes_holds_nobody_up() -> None:
    async def leave() -> float:
        loop, ours = asyncio.get_running_loop(), Identity.generate()
        began_s = loop.time()
        await say_goodbye(SealedStore(ours, RUN_ID, DeafBoard()), record(ours, "offline"))
        return loop.time() - began_s

    assert run_virtual(leave()) == 1.0
