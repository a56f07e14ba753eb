"""What every member that joins a running swarm has: an identity, a DHT node, connections, records, a directory.

Shared by peers, trainers and those who only look. Hosts nothing and trains nothing.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from peer.bootstrap import Introduction, JoinAddress, introduce
from peer.directory import Directory
from peer.grpc_transport import GrpcTransport
from peer.hivemind_store import HivemindStore
from peer.identity import Identity
from peer.manifest import RunManifest
from peer.reachable import is_loopback
from peer.records import RecordStore
from peer.supervisor import DhtSettings, DhtSupervisor
from peer.transport import Transport

log = structlog.get_logger(__name__)

JOIN_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Membership:
    """A member that has joined. Its parts belong to the event loop; `directory.snapshot` is for any thread."""

    identity: Identity
    introduction: Introduction
    transport: Transport
    store: RecordStore
    directory: Directory

    @property
    def manifest(self) -> RunManifest:
        return self.introduction.manifest


@asynccontextmanager
async def membership(
    joins: Sequence[JoinAddress],
    *,
    identity: Identity,
    supervisor: DhtSupervisor,
    transport: Transport | None = None,
    dht_host: str | None = None,
    timeout_s: float = JOIN_TIMEOUT_S,
) -> AsyncGenerator[Membership]:
    """Join the swarm that answers at `joins`; `supervisor` was spawned before the event loop was started.

    `transport` is closed with the rest; none: gRPC as it is. `dht_host` is where our DHT node listens; none: on
    loopback when that is where the swarm is, else everywhere.
    Raises CouldNotJoin, ManifestMismatch, CouldNotListen. Leaving closes everything, the supervisor included.
    """
    transport = transport or GrpcTransport(identity)
    try:
        introduction = await introduce(transport, joins, timeout_s=timeout_s)
        run_id = introduction.manifest.run_id
        log.info("swarm.found", run=run_id, name=introduction.manifest.name, through=introduction.address)
        if dht_host is None:
            dht_host = "127.0.0.1" if is_loopback(introduction.address) else "0.0.0.0"
        settings = DhtSettings(
            run_id,
            num_experts=introduction.manifest.num_experts,
            listen_host=dht_host,
            initial_peers=introduction.dht_addresses,
        )
        await supervisor.start(settings, timeout_s=timeout_s)
        store = HivemindStore(identity, run_id, supervisor)
        directory = Directory(store)
        await directory.refresh_once(time.time())
        async with asyncio.TaskGroup() as tasks:
            refreshing = tasks.create_task(directory.run(), name="directory")
            yield Membership(identity, introduction, transport, store, directory)
            refreshing.cancel()
    finally:
        await supervisor.close()
        await transport.close()
