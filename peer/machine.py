"""Looks at this machine: what is installed, what room there is, who can be reached. Judges nothing; `doctor` does."""

import asyncio
import contextlib
import ctypes
import os
import platform
import shutil
import socket
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from peer.bootstrap import introduce, parse_join
from peer.device import DeviceUnavailable, choose_device, limit_compute_threads
from peer.device_speed import measure_device
from peer.errors import CouldNotJoin, ManifestMismatch, RemoteError
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.manifest import RunManifest
from peer.probing import measure_link
from peer.rates import MeasuredLink, Rates
from peer.settings import DoctorSettings
from peer.transport import Endpoint

ANSWER_WITHIN_S = 5.0
MEASURE_WITHIN_S = 5.0
"""More than a peer takes at its start: here somebody waits for the figure."""


@dataclass(frozen=True)
class SwarmSeen:
    """What came of asking at `--join`."""

    run: str
    """Name of the run, and how many experts it has; empty when nobody let us in."""
    answered_in_ms: float
    error: str | None
    speaks_our_version: bool
    manifest: RunManifest | None = None
    rates: Rates = field(default_factory=Rates)
    """Of the link to whoever answered, and of the device on experts of that run."""
    kind_error: str | None = None
    """Why experts of that run cannot be hosted here; None when they can."""


@dataclass(frozen=True)
class Machine:
    """What `look` found."""

    python: tuple[int, int, int]
    torch_version: str
    device_error: str | None
    """Why the device asked for cannot be used; None when it can."""
    accelerator: str | None
    """Name of the first CUDA or MPS device; None when experts run on the CPU."""
    num_cores: int
    memory_total_bytes: int
    memory_free_bytes: int
    state_dir: Path
    disk_free_bytes: int
    state_dir_writable: bool
    now_unix_s: float
    clock_synchronised: bool | None
    """What the kernel says; None where it cannot be asked."""
    listen: str
    listen_error: str | None
    """Why the peer's address cannot be bound; None when it can."""
    dht_daemon: Path | None
    """hivemind's p2pd; None when it is not where the package should have it."""
    dht_daemon_runs: bool
    swarm: SwarmSeen | None
    """None when no swarm was named."""


def look(settings: DoctorSettings) -> Machine:
    """Changes nothing; a port is bound for a moment, and each address to join is given 5 s to answer. Blocks.

    With an address to join it also measures, for a second or two, the way there and the device.
    """
    limit_compute_threads()  # as a peer does
    memory = psutil.virtual_memory()
    existing = next(
        folder for folder in (settings.state_dir, *settings.state_dir.absolute().parents) if folder.exists()
    )
    daemon = _dht_daemon()
    device, device_error = _device(settings)
    major, minor, micro = map(int, platform.python_version_tuple()[:3])
    return Machine(
        python=(major, minor, micro),
        torch_version=torch.__version__,
        device_error=device_error,
        accelerator=_accelerator(),
        num_cores=len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count() or 1,
        memory_total_bytes=memory.total,
        memory_free_bytes=memory.available,
        state_dir=settings.state_dir,
        disk_free_bytes=shutil.disk_usage(existing).free,
        state_dir_writable=existing.is_dir() and os.access(existing, os.W_OK),
        now_unix_s=time.time(),
        clock_synchronised=_clock_synchronised(),
        listen=settings.listen,
        listen_error=_listen_error(settings.listen),
        dht_daemon=daemon,
        dht_daemon_runs=daemon is not None and os.access(daemon, os.X_OK),
        swarm=asyncio.run(_swarm_seen(settings.join, device)) if settings.join else None,
    )


async def _swarm_seen(join: tuple[str, ...], device: torch.device | None) -> SwarmSeen:
    transport = GrpcTransport(Identity.generate())  # first contact needs no identity of ours
    started_s = time.monotonic()
    try:
        introduction = await introduce(transport, [parse_join(text) for text in join], timeout_s=ANSWER_WITHIN_S)
        elapsed_ms = (time.monotonic() - started_s) * 1e3
        link = await _link(transport, introduction.endpoint())
    except (CouldNotJoin, ManifestMismatch) as error:
        return SwarmSeen("", 0.0, str(error), speaks_our_version=not isinstance(error, ManifestMismatch))
    finally:
        await transport.close()
    run = introduction.manifest
    speed, kind_error = None, None
    try:
        speed = await asyncio.to_thread(measure_device, run, device) if device is not None else None
    except ValueError as error:
        kind_error = str(error)
    return SwarmSeen(
        f"{run.name}, {len(run.uids())} experts",
        elapsed_ms,
        None,
        speaks_our_version=True,
        manifest=run,
        rates=Rates(link=link, device=speed),
        kind_error=kind_error,
    )


async def _link(transport: GrpcTransport, endpoint: Endpoint) -> MeasuredLink | None:
    with contextlib.suppress(RemoteError):  # whoever answers may be busy, or cut off the next moment
        return await measure_link(transport, endpoint, timeout_s=MEASURE_WITHIN_S)
    return None


def _device(settings: DoctorSettings) -> tuple[torch.device | None, str | None]:
    try:
        return choose_device(settings.device)[0], None
    except DeviceUnavailable as error:
        return None, str(error)


def _accelerator() -> str | None:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "Apple GPU" if torch.backends.mps.is_available() else None


def _dht_daemon() -> Path | None:
    package = find_spec("hivemind")  # finds without importing
    if package is None or package.origin is None:
        return None
    daemon = Path(package.origin).parent / "hivemind_cli" / "p2pd"
    return daemon if daemon.is_file() else None


def _listen_error(address: str) -> str | None:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC binds; a listener still refuses us
            listener.bind(where)
            listener.listen()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _clock_synchronised() -> bool | None:
    """What `adjtimex` returns: TIME_ERROR (5) when nothing keeps the clock. Linux only."""
    if platform.system() != "Linux":
        return None
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # all zero: asks, sets nothing
    return None if state < 0 else state != 5
