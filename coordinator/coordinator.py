"""A coordinator among its parts: introduces joiners, keeps the run's record alive, watches the records, shows them.

Takes a record store and a transport and opens no process of its own, so that a test can run one in memory.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from logging import INFO, WARNING

import structlog

from coordinator.introducer import Introducer
from coordinator.metrics import swarm_registry
from coordinator.monitor import Monitor
from coordinator.page import page_files
from peer.bootstrap import JoinAddress, sign_manifest
from peer.directory import REFRESH_EVERY_S, Directory
from peer.event_feed import EventFeed, event_bytes
from peer.http_api import Health, HttpContent, HttpServer
from peer.identity import Identity
from peer.manifest import RunManifest
from peer.reachable import reachable_address
from peer.records import RecordStore, RunRecord
from peer.snapshot import DirectorySnapshot
from peer.swarm_state import swarm_state
from peer.transport import PeerId, Transport

log = structlog.get_logger(__name__)

RUN_LIFETIME_S = 3600.0
"""As long as records may live: the run outlives its coordinator."""
RENEW_RUN_EVERY_S = 60.0
"""Members come and go, and with them the DHT nodes that hold the record."""
STALE_AFTER_S = 15.0
MAX_REMEMBERED = 64
_GRPC_GRACE_S = 0.2


@dataclass(frozen=True)
class Opened:
    """Where a running coordinator can be reached."""

    coordinator: "Coordinator"
    join: str
    """HOST:PORT/KEY"""
    http_address: str


class Coordinator:
    """What it knows and says. Belongs to one event loop."""

    def __init__(
        self,
        manifest: RunManifest,
        store: RecordStore,
        *,
        join: str,
        signed_manifest: bytes,
        remember: Callable[[tuple[str, ...]], Awaitable[object]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`remember` is given the addresses of members whenever they change."""
        self._manifest = manifest
        self._store = store
        self._join = join
        self._run_record = RunRecord(signed_manifest_b64=base64.b64encode(signed_manifest).decode())
        self._remember = remember
        self._clock = clock
        self._directory = Directory(store, clock=clock)
        self._monitor = Monitor()
        self._state = self._monitor.observe(swarm_state(self._directory.snapshot(), manifest)).state
        self._members: tuple[str, ...] = ()
        self._feed = EventFeed(self._greeting)

    async def publish_run(self) -> None:
        """Store the signed manifest once more. A failure is said by the store and mended by the next time."""
        await self._store.put(self._run_record, lifetime_s=RUN_LIFETIME_S, now_unix_s=self._clock())

    async def look(self) -> None:
        """Read the records once and tell everybody who watches what changed."""
        snapshot = await self._directory.refresh_once(self._clock())
        members = _joins(snapshot)
        if members and members != self._members:  # of an empty swarm the last members are the best hint
            self._members = members
            await self._remember(members)  # first: whoever is shown is found again, however this process ends
        before = self._state.model_copy(update={"at_unix_s": snapshot.taken_at_unix_s})
        change = self._monitor.observe(swarm_state(snapshot, self._manifest))
        self._state = change.state
        for event in change.events:
            if not event.name.startswith("peer."):  # those the directory has logged
                log.log(WARNING if event.tone == "bad" else INFO, event.name, text=event.text)
        if change.state != before:
            self._feed.publish(event_bytes("update", change.model_dump_json()))

    async def run(self) -> None:
        """Look and renew until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_regularly(self.look, every_s=REFRESH_EVERY_S), name="look")
            tasks.create_task(_regularly(self.publish_run, every_s=RENEW_RUN_EVERY_S), name="renew-run")

    def http_content(self) -> HttpContent:
        """The page and what it shows."""
        return HttpContent(
            state_json=lambda: self._state.model_dump_json(),
            health=self._health,
            registry=swarm_registry(lambda: self._state),
            feed=self._feed,
            files=page_files(),
        )

    def _health(self) -> Health:
        state = self._state
        served = len(state.experts) - len(state.uncovered)
        detail = f"peers: {len(state.peers)}, experts served: {served} of {len(state.experts)}"
        age_s = self._clock() - state.at_unix_s
        if age_s > STALE_AFTER_S:
            return Health(ok=False, detail=f"{detail}; the records were last read {age_s:.0f} s ago")
        return Health(ok=True, detail=detail)

    def _greeting(self) -> bytes:
        remembered = self._monitor.remembered().model_dump(mode="json")
        return event_bytes("hello", json.dumps({"join": self._join, **remembered}))


@asynccontextmanager
async def coordinating(
    identity: Identity,
    manifest: RunManifest,
    *,
    store: RecordStore,
    transport: Transport,
    certificate_der: bytes,
    listen: str,
    http: str,
    remember: Callable[[tuple[str, ...]], Awaitable[object]],
) -> AsyncGenerator[Opened]:
    """Introduce, watch and show until the block ends. Raises CouldNotListen.

    The store and the transport stay the caller's to close.
    """
    signed_manifest = sign_manifest(identity, manifest)
    introducer = Introducer(
        identity,
        certificate_der=certificate_der,
        signed_manifest=signed_manifest,
        dht_addresses=store.addresses,
        software_version=version("swarmoe"),
    )
    server = await transport.serve(introducer, listen)
    try:
        join = f"{reachable_address(server.address)}/{identity.peer_id}"
        coordinator = Coordinator(manifest, store, join=join, signed_manifest=signed_manifest, remember=remember)
        await coordinator.publish_run()
        await coordinator.look()
        http_server = await HttpServer.start(coordinator.http_content(), http)
        async with http_server, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(coordinator.run(), name="coordinator")
            yield Opened(coordinator, join, http_server.address)
            running.cancel()
    finally:
        await server.close(_GRPC_GRACE_S)


async def _regularly(act: Callable[[], Awaitable[None]], *, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await act()


def _joins(snapshot: DirectorySnapshot) -> tuple[str, ...]:
    """Where peers answer, as `HOST:PORT/KEY`; the order is theirs, not the DHT's."""
    by_peer: list[tuple[PeerId, str]] = sorted((peer_id, peer.address) for peer_id, peer in snapshot.peers.items())
    return tuple(str(JoinAddress(address, peer_id)) for peer_id, address in by_peer[:MAX_REMEMBERED])
