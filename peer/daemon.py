"""`swarmoe peer`: a process that hosts experts, from its start to its last snapshot. Puts the parts together.

Born in this order: the DHT process, the event loop with gRPC, the compute thread. Ends in the reverse order.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

import structlog
import torch

from experts.bank import ExpertState
from experts.snapshots import SnapshotFolder, SnapshotNotWritten, SnapshotUnusable
from experts.uid import ExpertUid, RunId
from peer.addresses import split_address
from peer.announcer import Announcer, Place
from peer.bootstrap import parse_join, sign_info
from peer.device import (
    Footprint,
    capacity,
    choose_device,
    compute_dtype,
    free_memory_bytes,
    limit_compute_threads,
)
from peer.device_speed import measure_device
from peer.emulated_transport import emulate
from peer.errors import BadConfiguration, CheckpointUnusable
from peer.event_feed import EventFeed, event_bytes
from peer.event_loop import EventLoopThread
from peer.expert_host import ExpertHost
from peer.grpc_transport import GrpcTransport
from peer.held import Held
from peer.http_api import Health, HttpContent, HttpServer
from peer.identity import Identity, StateFolder
from peer.manifest import RunManifest
from peer.membership import Membership, membership
from peer.messages import MAX_CALL_BYTES, CallLimits
from peer.metrics import peer_registry
from peer.rates import Rates
from peer.reachable import listen_ip, reachable_address
from peer.run_folder import keep_run
from peer.self_measurement import measured_link, tell_chi
from peer.service import ExpertService
from peer.settings import PeerSettings
from peer.signals import stop_on_signals
from peer.supervisor import DhtSupervisor
from peer.swarm_state import swarm_state
from peer.transport import Endpoint
from protos.swarm_pb2 import InfoReply, InfoRequest

log = structlog.get_logger(__name__)

SNAPSHOT_EVERY_S = 10.0
LEAVE_WITHIN_S = 5.0
_CALLS_SHARE = 0.125
"""Of the free main memory, for the tensors of calls in progress."""
_CALLS_GRACE_S = 1.5
_COMPUTE_GRACE_S = 1.0


def run_peer(settings: PeerSettings) -> int:
    """Host experts until SIGINT or SIGTERM; returns the exit code. Raises SwarmError for what cannot start."""
    limit_compute_threads()
    with stop_on_signals() as stop, StateFolder(settings.state_dir) as folder:
        identity = folder.identity()
        supervisor = DhtSupervisor.spawn()
        with EventLoopThread() as loop:
            held = Held(loop, hosting(settings, identity, supervisor), leave_timeout_s=LEAVE_WITHIN_S)
            reason = held.until_stopped(stop, on_open=lambda address: print(f"join: {address}", flush=True))
    log.info("peer.left", reason=reason)
    return 0


@asynccontextmanager
async def hosting(settings: PeerSettings, identity: Identity, supervisor: DhtSupervisor) -> AsyncGenerator[str]:
    """A peer in the swarm, online; gives its `HOST:PORT/KEY`. Leaving says goodbye and takes a last snapshot.

    Raises SwarmError for whatever keeps it from coming online.
    """
    async with AsyncExitStack() as stack:
        joins = [parse_join(text) for text in settings.join]
        listen_host, _ = split_address(settings.listen, allow_port_0=True)
        member = await stack.enter_async_context(
            membership(
                joins,
                identity=identity,
                supervisor=supervisor,
                transport=emulate(GrpcTransport(identity), settings, seed=settings.link_seed),
                dht_host=listen_ip(listen_host),
            )
        )
        saved, host, device, rates = await _prepare(settings, member)
        host.start()
        stack.push_async_callback(asyncio.to_thread, host.close, timeout_s=_COMPUTE_GRACE_S)
        service = ExpertService(
            host, CallLimits.of(member.manifest), _introducer(member), max_bytes_in_flight=_call_bytes()
        )
        server = await member.transport.serve(service, settings.listen)
        stack.push_async_callback(server.close, 0.0)
        place = _place(settings, member, reachable_address(server.address), device, host, rates)
        announcer = Announcer(
            place, host=host, store=member.store, directory=member.directory, saved=saved, rng=random.Random()
        )
        http = await HttpServer.start(_http_content(member, announcer, host), settings.http)
        log.info("http.listening", address=http.address)
        stack.push_async_callback(http.close)
        stack.push_async_callback(_leave, service, announcer, host)
        await announcer.take_place()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(announcer.run()), tasks.create_task(_tidy_and_save_regularly(host, announcer))]
            log.info("peer.online", address=place.endpoint.address, experts=len(announcer.claimed), device=str(device))
            yield f"{place.endpoint.address}/{identity.peer_id}"
            for task in running:
                task.cancel()


async def _prepare(
    settings: PeerSettings, member: Membership
) -> tuple[Mapping[ExpertUid, ExpertState], ExpertHost, torch.device, Rates]:
    """Read what was saved, make the host, measure the link while torch does its first work; tell what it carries."""
    keep_run(settings.state_dir, member.manifest)
    snapshots = SnapshotFolder(settings.state_dir / "experts")
    async with asyncio.TaskGroup() as tasks:
        link = tasks.create_task(measured_link(member, random.Random()), name="measure-link")
        saved = await asyncio.to_thread(_restore, snapshots, member.manifest.run_id)
        host, device = await asyncio.to_thread(_make_host, settings, member.manifest, snapshots)
        speed = await asyncio.to_thread(measure_device, member.manifest, device)
    rates = Rates(link=link.result(), device=speed)
    tell_chi(member.manifest, rates)
    return saved, host, device, rates


def _restore(snapshots: SnapshotFolder, run_id: RunId) -> Mapping[ExpertUid, ExpertState]:
    try:
        restored = snapshots.load_newest(run_id)
    except SnapshotUnusable as error:
        raise CheckpointUnusable(str(error)) from error
    for reason in restored.problems:
        log.warning("snapshot.passed_over", reason=reason)
    return restored.states


def _make_host(
    settings: PeerSettings, manifest: RunManifest, snapshots: SnapshotFolder
) -> tuple[ExpertHost, torch.device]:
    """Choose the device and find out how many experts fit. Raises BadConfiguration with the numbers.

    Takes a second or two of torch's first work, so not on the loop.
    """
    try:
        device, why = choose_device(settings.device)
        room = capacity(
            asked=settings.max_experts,
            free_bytes=free_memory_bytes(device),
            footprint=Footprint.of(manifest, compute_dtype(device)),
        )
    except ValueError as error:
        raise BadConfiguration(str(error)) from None
    log.info("peer.device", device=why)
    log.info("peer.capacity", capacity=room.reason)
    return ExpertHost(manifest, device=device, snapshots=snapshots, max_experts=room.max_experts), device


def _call_bytes() -> int:
    """Room for calls in progress: at least for one of the largest."""
    return max(MAX_CALL_BYTES, int(free_memory_bytes(torch.device("cpu")) * _CALLS_SHARE))


def _place(
    settings: PeerSettings, member: Membership, address: str, device: torch.device, host: ExpertHost, rates: Rates
) -> Place:
    all_uids = tuple(member.manifest.uids())
    pinned = settings.pinned_experts()
    unknown = set(pinned or ()) - set(all_uids)
    if unknown:
        raise BadConfiguration(f"--experts: this run has no expert {min(unknown)}; they go from 0.0 to {all_uids[-1]}")
    if len(pinned or ()) > host.max_experts:
        raise BadConfiguration(
            f"--experts names {len(pinned or ())} experts and this peer has room for {host.max_experts}; name fewer, or"
            " see --max-experts"
        )
    return Place(
        endpoint=Endpoint(member.identity.peer_id, address, member.transport.certificate_der),
        device=str(device),
        software_version=version("swarmoe"),
        uids=pinned or all_uids,
        is_pinned=pinned is not None,
        max_experts=host.max_experts,
        rates=rates,
    )


def _introducer(member: Membership) -> Callable[[InfoRequest], InfoReply]:
    """Any peer introduces a joiner as well as the coordinator does."""

    def introduce(request: InfoRequest) -> InfoReply:
        return sign_info(
            member.identity,
            request,
            certificate_der=member.transport.certificate_der,
            signed_manifest=member.introduction.signed_manifest,
            dht_addresses=member.store.addresses(),
            software_version=version("swarmoe"),
        )

    return introduce


def _http_content(member: Membership, announcer: Announcer, host: ExpertHost) -> HttpContent:
    registry = peer_registry(host, lambda: announcer.rates, member.manifest)

    def state_json() -> str:
        return swarm_state(member.directory.snapshot(), member.manifest).model_dump_json()

    def health() -> Health:
        return Health(announcer.state == "online", f"{announcer.state}, hosting {len(announcer.claimed)} experts")

    return HttpContent(state_json, health, registry, EventFeed(lambda: event_bytes("state", state_json())))


async def _tidy_and_save_regularly(host: ExpertHost, announcer: Announcer) -> None:
    while True:
        await asyncio.sleep(SNAPSHOT_EVERY_S)
        await host.forget_expired(now_s=time.monotonic())
        await _save(host, announcer)


async def _save(host: ExpertHost, announcer: Announcer) -> None:
    try:
        await host.save_snapshot(announcer.saved)
    except SnapshotNotWritten as error:
        log.error("snapshot.not_written", reason=str(error))  # noqa: TRY400  the reason says all


async def _leave(service: ExpertService, announcer: Announcer, host: ExpertHost) -> None:
    """Say goodbye first, so that nobody starts a call; finish the running ones; keep what was learnt."""
    await announcer.withdraw()
    if not await service.leave(timeout_s=_CALLS_GRACE_S):
        log.warning("peer.cut_off_calls", after_s=_CALLS_GRACE_S)
    await _save(host, announcer)
