"""This process's continuously refreshed view of the swarm. Asks the record store, hands out snapshots.

A training step never waits for the DHT: it reads the last snapshot. When the store fails, what is known stands until it
expires. Knows no transport and decides nothing about calls.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping

import structlog

from peer.errors import RecordsUnavailable
from peer.records import Kind, RecordStore, Signed
from peer.snapshot import EMPTY, DirectorySnapshot, take_snapshot
from peer.transport import PeerId

log = structlog.get_logger()

REFRESH_EVERY_S = 1.5
_NEWEST_SHARE = 0.2
"""Weight of the newest latency in its moving average: about the last ten calls count."""


class Directory:
    """`snapshot` from any thread; the rest belongs to the store's event loop."""

    def __init__(
        self,
        store: RecordStore,
        *,
        refresh_every_s: float = REFRESH_EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._refresh_every_s = refresh_every_s
        self._clock = clock
        self._known: dict[Kind, dict[PeerId, Signed]] = {"peer": {}, "trainer": {}}
        self._latencies_s: dict[PeerId, float] = {}
        self._snapshot = EMPTY
        self._changed = asyncio.Event()
        self._is_failing = False

    def snapshot(self) -> DirectorySnapshot:
        """The last view. Never blocks; empty before the first refresh."""
        return self._snapshot

    def observe_latency(self, peer_id: PeerId, seconds: float) -> None:
        """How long a call to this peer took; the next snapshots carry the average."""
        if not (math.isfinite(seconds) and seconds >= 0):
            return
        before_s = self._latencies_s.get(peer_id, seconds)
        self._latencies_s[peer_id] = before_s + _NEWEST_SHARE * (seconds - before_s)

    async def refresh_once(self, now_unix_s: float) -> DirectorySnapshot:
        """Ask the store once; also when it fails, expired records go."""
        for kind in self._known:
            self._known[kind] = merge(self._known[kind], await self._read(kind, now_unix_s), now_unix_s=now_unix_s)
        peers = self._known["peer"]
        self._latencies_s = {peer_id: s for peer_id, s in self._latencies_s.items() if peer_id in peers}
        before = self._snapshot
        self._snapshot = take_snapshot(
            peers, self._known["trainer"], self._latencies_s, now_unix_s=now_unix_s, before=before
        )
        _log_changes(before, self._snapshot)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return self._snapshot

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh_once(self._clock())
            await asyncio.sleep(self._refresh_every_s)

    async def wait_until(
        self, predicate: Callable[[DirectorySnapshot], bool], timeout_s: float
    ) -> DirectorySnapshot | None:
        """The first view, this one included, of which it holds; none when there is no such view in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate(view := self._snapshot):
                    await self._changed.wait()
        except TimeoutError:
            return None
        return view

    async def _read(self, kind: Kind, now_unix_s: float) -> Mapping[PeerId, Signed]:
        try:
            read = await self._store.read(kind, now_unix_s=now_unix_s)
        except RecordsUnavailable as error:
            if not self._is_failing:
                log.warning("directory.refresh_failed", reason=str(error), known=len(self._known[kind]))
            self._is_failing = True
            return {}
        if self._is_failing:
            log.info("directory.refreshed_again")
        self._is_failing = False
        return read


def merge(known: Mapping[PeerId, Signed], read: Mapping[PeerId, Signed], *, now_unix_s: float) -> dict[PeerId, Signed]:
    """Per member the record that expires last, and none that has expired.

    A member missing from one reading is still there: records reach the DHT's nodes at different times. A tombstone
    expires after whatever it replaces.
    """
    merged = dict(known)
    for peer_id, signed in read.items():
        if peer_id not in merged or signed.expires_at_unix_s > merged[peer_id].expires_at_unix_s:
            merged[peer_id] = signed
    return {peer_id: signed for peer_id, signed in merged.items() if signed.expires_at_unix_s > now_unix_s}


def _log_changes(before: DirectorySnapshot, after: DirectorySnapshot) -> None:
    for peer_id in before.peers.keys() | after.peers.keys():
        was, now = before.peers.get(peer_id), after.peers.get(peer_id)
        if now is None:
            log.info("directory.peer_gone", peer=peer_id[:8])
        elif was is None or was.state != now.state:
            log.info("directory.peer", peer=peer_id[:8], state=now.state, experts=len(now.experts))
