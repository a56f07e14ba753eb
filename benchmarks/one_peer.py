"""A coordinator and one peer as processes, and this process joined through links that a benchmark may replace.

All emulation is at this end: what holds for both directions of the trainer's links holds for its only peer.
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peer.bootstrap import parse_join
from peer.emulated_transport import EmulatedTransport
from peer.event_loop import EventLoopThread
from peer.grpc_transport import GrpcTransport
from peer.held import Held
from peer.identity import Identity
from peer.library_logging import log_like_a_library
from peer.manifest import RunManifest, WireSettings
from peer.membership import membership
from peer.supervisor import DhtSupervisor
from swarmoe.run_presets import manifest_toml
from trainer.remote_experts import RemoteExperts
from trainer.swarm import LEAVE_WITHIN_S, RemoteMoE, Swarm

_CLOCK_TICKS_PER_S = 100
_QUIET = ("--log-level=error",)


@dataclass(frozen=True)
class OnePeer:
    """A swarm of one peer that serves every expert of its run."""

    swarm: Swarm
    links: EmulatedTransport
    """This process's; replace its `up` and `down` between measurements."""
    loop: EventLoopThread
    _peer_pid: int

    def layer(self, layer: int, wire: WireSettings | None = None) -> RemoteMoE:
        """One layer of the swarm, whose calls are written as `wire` says; none: as the run does."""
        if wire is not None:
            self.swarm.experts = RemoteExperts(
                run_id=self.swarm.manifest.run_id,
                wire=wire,
                transport=self.links,
                directory=self.swarm.member.directory,
                loop=self.loop,
            )
        return RemoteMoE(self.swarm, layer)

    def cpu_s(self) -> float:
        """CPU seconds that this process and the peer have used so far."""
        fields = Path(f"/proc/{self._peer_pid}/stat").read_text().rpartition(")")[2].split()
        return time.process_time() + (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS_PER_S


@contextmanager
def one_peer(run: RunManifest) -> Generator[OnePeer]:
    """Real commands over loopback; online and with every expert when this gives it."""
    with tempfile.TemporaryDirectory(prefix="swarmoe-benchmark-") as folder:
        run_file = Path(folder) / "run.toml"
        run_file.write_text(manifest_toml(run), encoding="utf-8")
        listen = ["--listen=127.0.0.1:0", "--http=127.0.0.1:0", *_QUIET]
        with _command("coordinator", f"--run={run_file}", f"--state-dir={folder}/coordinator", *listen) as (_, line):
            address = line.removeprefix("join:").strip()
            peer = ["peer", f"--join={address}", f"--state-dir={folder}/peer", "--device=cpu", *listen]
            with _command(*peer) as (pid, _), _joined(address) as (swarm, links, loop):
                if not swarm.wait_for_experts(timeout_s=60.0):
                    raise RuntimeError("the peer did not come online")
                yield OnePeer(swarm, links, loop, pid)


@contextmanager
def _command(*arguments: str) -> Generator[tuple[int, str]]:
    """Its process id, and its first line."""
    process = subprocess.Popen([sys.executable, "-m", "swarmoe", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline()
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def _joined(address: str) -> Generator[tuple[Swarm, EmulatedTransport, EventLoopThread]]:
    """As `swarmoe.join`, through links of ours."""
    log_like_a_library()
    supervisor = DhtSupervisor.spawn()
    identity = Identity.generate()
    links = EmulatedTransport(GrpcTransport(identity))
    loop = EventLoopThread().start()
    opening = membership([parse_join(address)], identity=identity, supervisor=supervisor, transport=links)
    held = Held(loop, opening, leave_timeout_s=LEAVE_WITHIN_S)
    member = held.open()
    assert member is not None, "nobody was there to stop it"
    with Swarm(loop, held, member) as swarm:
        yield swarm, links, loop


class Stage:
    """So many workers, each of which repeats a micro-batch, and the times at which parts of them were done.

    `one_micro_batch` is given a function to call whenever a part of it is done; it gives up there when all is over. Use
    as a context manager. Raises what a worker raised.
    """

    def __init__(self, one_micro_batch: Callable[[Callable[[], None]], object], *, in_flight: int) -> None:
        self._work = one_micro_batch
        self._parts_done: list[float] = []
        self._is_over = threading.Event()
        self._failures: list[BaseException] = []
        self._workers = [threading.Thread(target=self._repeat, daemon=True) for _ in range(in_flight)]

    def __enter__(self) -> "Stage":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for worker in self._workers:
            worker.join()
        if self._failures:
            raise self._failures[0]

    def skip(self, parts: int) -> None:
        """Wait until so many more are done."""
        self.observe(for_s=0.0, at_least=parts)

    def observe(self, *, for_s: float, at_least: int) -> list[float]:
        """When parts were done from now on: for so long, and until there are so many."""
        first, ends_s = len(self._parts_done), time.perf_counter() + for_s
        while time.perf_counter() < ends_s or len(self._parts_done) < first + at_least:
            if self._failures:
                raise self._failures[0]
            time.sleep(0.01)
        return self._parts_done[first:]

    def _part_done(self) -> None:
        if self._is_over.is_set():
            raise _Over
        self._parts_done.append(time.perf_counter())

    def _repeat(self) -> None:
        torch.autograd.set_multithreading_enabled(False)  # thread-local; else backwards share one thread of the device
        try:
            while not self._is_over.is_set():
                self._work(self._part_done)
        except _Over:
            return
        except BaseException as failure:  # handed to the thread that measures
            self._failures.append(failure)


class _Over(Exception):
    pass


def parts_per_s(times_s: list[float]) -> float:
    """The slope of a straight line through parts over time: what comes in bursts is no more than it is."""
    time_N = torch.tensor(times_s, dtype=torch.float64)
    number_N = torch.arange(len(times_s), dtype=torch.float64)
    time_N, number_N = time_N - time_N.mean(), number_N - number_N.mean()
    return float((time_N * number_N).sum() / (time_N * time_N).sum())
