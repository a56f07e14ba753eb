"""`swarmoe coordinator`: a process that introduces members to each other and shows them. Training goes on without it.

Born in this order: the DHT process, the event loop with gRPC, the page. Ends in the reverse order.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from coordinator.coordinator import coordinating
from coordinator.run_folder import own_run, remember_members, remembered_members
from coordinator.settings import CoordinatorSettings
from peer.addresses import split_address
from peer.bootstrap import introduce
from peer.errors import CouldNotJoin, ManifestMismatch
from peer.event_loop import EventLoopThread
from peer.grpc_transport import GrpcTransport
from peer.held import Held
from peer.hivemind_store import HivemindStore
from peer.identity import Identity, StateFolder
from peer.manifest import RunManifest
from peer.reachable import listen_ip
from peer.signals import stop_on_signals
from peer.supervisor import DhtSettings, DhtSupervisor

log = structlog.get_logger(__name__)

LEAVE_WITHIN_S = 5.0
_DHT_TIMEOUT_S = 30.0
_FIND_SWARM_TIMEOUT_S = 3.0


def run_coordinator(settings: CoordinatorSettings, manifest: RunManifest) -> int:
    """Introduce and watch until SIGINT or SIGTERM; returns the exit code. Raises SwarmError for what cannot start."""
    with stop_on_signals() as stop, StateFolder(settings.state_dir) as folder:
        identity = folder.identity()
        run = own_run(folder.path, manifest, owner=identity.peer_id)
        supervisor = DhtSupervisor.spawn()
        with EventLoopThread() as loop:
            held = Held(loop, _open(settings, identity, run, supervisor), leave_timeout_s=LEAVE_WITHIN_S)
            reason = held.until_stopped(stop, on_open=lambda join: print(f"join: {join}", flush=True))
    log.info("coordinator.left", reason=reason)
    return 0


@asynccontextmanager
async def _open(
    settings: CoordinatorSettings, identity: Identity, run: RunManifest, supervisor: DhtSupervisor
) -> AsyncGenerator[str]:
    """A coordinator on the DHT and on gRPC; gives its `HOST:PORT/KEY`."""
    transport = GrpcTransport(identity)
    try:
        store = await _join_dht(settings, identity, run, supervisor, transport)
        async with coordinating(
            identity,
            run,
            store=store,
            transport=transport,
            certificate_der=transport.certificate_der,
            listen=settings.listen,
            http=settings.http,
            remember=lambda joins: asyncio.to_thread(remember_members, settings.state_dir, joins),
        ) as opened:
            log.info("coordinator.ready", run=run.name, run_id=run.run_id, dashboard=f"http://{opened.http_address}/")
            yield opened.join
    finally:
        await supervisor.close()
        await transport.close()


async def _join_dht(
    settings: CoordinatorSettings,
    identity: Identity,
    run: RunManifest,
    supervisor: DhtSupervisor,
    transport: GrpcTransport,
) -> HivemindStore:
    host, _ = split_address(settings.listen, allow_port_0=True)
    dht_host = await asyncio.to_thread(listen_ip, host)
    initial_peers = await _members_of_old(settings.state_dir, run, transport)
    dht_settings = DhtSettings(
        run.run_id, num_experts=run.num_experts, listen_host=dht_host, initial_peers=initial_peers
    )
    await supervisor.start(dht_settings, timeout_s=_DHT_TIMEOUT_S)
    return HivemindStore(identity, run.run_id, supervisor)


async def _members_of_old(folder: Path, run: RunManifest, transport: GrpcTransport) -> tuple[str, ...]:
    """DHT addresses of the swarm we introduced before we were restarted; none when it is gone, or never was."""
    joins = remembered_members(folder)
    if not joins:
        return ()
    with contextlib.suppress(CouldNotJoin, ManifestMismatch):
        found = await introduce(transport, joins, timeout_s=_FIND_SWARM_TIMEOUT_S)
        if found.manifest == run:
            log.info("swarm.found_again", through=found.address)
            return found.dht_addresses
    log.info(
        "swarm.not_found_again", members_asked=len(joins), consequence="this coordinator starts a swarm of its own"
    )
    return ()
