"""What does the directory cost a trainer, from 16 to 16,384 experts a layer, with 1,000 peers?

Signed records of 1,000 peers, each hosting its part of 4 layers, are read through the real directory from a board in
memory. Then, per size:

* `layer_ms`: all that one layer's forward does before a byte moves. Its parts: `view_ms`, the layer as the router reads
  it, from the snapshot; `router_ms`, preset mixtral (k 2) over T = 64 tokens of width D = 64, logits included;
  `assign_ms`, the peer of each chosen expert; `group_ms`, the pairs by peer. `logits_ms` is the matmul alone, 2 T E D
  FLOPs that no directory can save. A view is made anew each time, as after news about
  hosting; a trainer keeps it until there are any (`view_kept_ms`). One peer is draining.
* a refresh, on the event loop beside the training: `refresh_first_ms`; `refresh_ms`, in which 300 peers have renewed
  their records, what 1.5 s bring at a renewal every 5 s; `refresh_moved_ms`, the same when one of them gives up its
  experts; `refresh_idle_ms`, in which nothing is new.
* memory: `record_bytes` (the median record as it travels), `records_mib` (all of them, read), `snapshot_mib` (the
  columns of who hosts what), `view_kib` (one layer's).

Times are CPU times of the thread that does it, which waits for nobody. Bounded by memory bandwidth: the router passes
about eight times over T x E floats. `--full` adds T = 2048, D = 512.
"""

import argparse
import base64
import json
import logging
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import structlog
import torch

from experts.uid import ExpertUid, RunId
from peer.certificates import Certificate
from peer.directory import Directory
from peer.envelope import seal
from peer.event_loop import EventLoopThread
from peer.freed_memory import keep_freed_memory
from peer.hosting import Hosting
from peer.identity import Identity
from peer.memory_store import MemoryBoard, MemoryStore
from peer.memory_transport import MemoryNetwork
from peer.records import RECORD_LIFETIME_S, HostedExpert, PeerRecord, PeerState
from peer.snapshot import DirectorySnapshot
from trainer.ledger import Ledger
from trainer.packing import group_by_destination
from trainer.routing.presets import build_router
from trainer.routing.view import View
from trainer.scope import StepScope
from trainer.swarm import view_of
from trainer.switchboard import Switchboard

NUM_PEERS, NUM_LAYERS, NUM_RENEWED, TOP_K = 1000, 4, 300, 2
SIZES = (16, 256, 1024, 4096, 16384)
RUN = RunId("5" * 32)
R = TypeVar("R")


class Crowd:
    """A thousand peers that share `NUM_LAYERS` layers of experts evenly, each with at least one."""

    def __init__(self, identities: Sequence[Identity], num_experts: int) -> None:
        self.board = MemoryBoard()
        self._identities = identities
        self._num_experts = num_experts
        self._certificate_b64 = base64.b64encode(Certificate.generate().der).decode()

    def announce(self, peers: Iterable[int], *, version: int, now_unix_s: float, state: PeerState = "online") -> None:
        """Sign and store their records, with a new version of every expert."""
        expires_at_unix_s = now_unix_s + RECORD_LIFETIME_S
        for number in peers:
            identity = self._identities[number]
            record = self._record(number, version, state)
            data = seal(identity, record, run_id=RUN, expires_at_unix_s=expires_at_unix_s)
            assert self.board.write("peer", identity.peer_id, data, expires_at_unix_s), "it expires no later"

    def record_bytes(self) -> float:
        """The median record as it travels."""
        return statistics.median(len(value) for value, _ in self.board.held.values())

    def _record(self, number: int, version: int, state: PeerState) -> PeerRecord:
        total = NUM_LAYERS * self._num_experts
        slots = range(number % total, max(total, number % total + 1), NUM_PEERS)
        return PeerRecord(
            peer_id=self._identities[number].peer_id,
            state=state,
            address=f"192.0.2.7:{1024 + number}",
            certificate_der_b64=self._certificate_b64,
            experts=tuple(
                HostedExpert(
                    uid=str(ExpertUid(*divmod(slot, self._num_experts))),
                    version=version,
                    claimed_at_unix_s=1_700_000_000 + number / 7,
                    rows_served=1000 * version,
                )
                for slot in slots
            ),
            queued_rows=3 * version,
            throughput_tokens_per_s=1234.5,
            software_version="0.1.0",
        )


class TrainerSide:
    """A directory over a crowd, and what of a trainer comes before the first byte."""

    def __init__(self, loop: EventLoopThread, identities: Sequence[Identity], num_experts: int) -> None:
        self.crowd = Crowd(identities, num_experts)
        self.directory = Directory(MemoryStore(Identity.generate(), RUN, self.crowd.board))
        self._num_experts = num_experts
        self._loop = loop
        transport = MemoryNetwork().transport(Identity.generate())
        self._switchboard = Switchboard(transport, self.directory, loop, call_timeout_s=1.0)
        self._now_unix_s = time.time()

    def refreshes(self) -> dict[str, float]:
        """CPU milliseconds of each kind of refresh."""
        self.crowd.announce(range(NUM_PEERS), version=1, now_unix_s=self._now_unix_s)
        first_ms, idle_ms = self._refresh_ms(), self._refresh_ms()
        renewed_ms: list[float] = []
        for version, start in enumerate((0, 300, 600), start=2):
            self._now_unix_s += 1.5
            self.crowd.announce(range(start, start + NUM_RENEWED), version=version, now_unix_s=self._now_unix_s)
            renewed_ms.append(self._refresh_ms())
        self._now_unix_s += 1.5
        self.crowd.announce(range(NUM_RENEWED - 1), version=5, now_unix_s=self._now_unix_s)
        self.crowd.announce([NUM_PEERS - 1], version=5, now_unix_s=self._now_unix_s, state="draining")
        return {
            "refresh_first_ms": first_ms,
            "refresh_idle_ms": idle_ms,
            "refresh_ms": statistics.median(renewed_ms),
            "refresh_moved_ms": self._refresh_ms(),
        }

    def step(self, *, num_tokens: int, dim: int, repeats: int) -> dict[str, float]:
        """Median milliseconds of a layer's forward up to the first byte, and of its parts."""
        router = build_router("mixtral", dim=dim, num_experts=self._num_experts, top_k=TOP_K)
        x_TD = torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(0))
        snapshot = self.directory.snapshot()
        scope = StepScope(deadline_s=time.monotonic() + 600.0, ledger=Ledger())
        parts_ms: dict[str, list[float]] = {
            "view_ms": [],
            "view_kept_ms": [],
            "router_ms": [],
            "assign_ms": [],
            "group_ms": [],
            "logits_ms": [],
        }

        def timed(name: str, work: Callable[[], R]) -> R:
            started_s = time.thread_time()
            result = work()
            parts_ms[name].append(1e3 * (time.thread_time() - started_s))
            return result

        for turn in range(repeats):
            layer = turn % NUM_LAYERS
            news = replace(snapshot, hosting=Hosting(snapshot.hosting.lines))
            view = timed("view_ms", lambda layer=layer, news=news: self._view(news, layer))
            timed("view_kept_ms", lambda layer=layer, news=news: self._view(news, layer))
            plan = timed("router_ms", lambda view=view: router(x_TD, view))
            hosts = timed("assign_ms", lambda plan=plan, layer=layer: self._switchboard.assign(plan, layer, scope))
            timed("group_ms", lambda plan=plan, hosts=hosts: group_by_destination(plan, hosts))
            timed("logits_ms", lambda: router.score(x_TD))
        before_a_byte = [parts_ms[name] for name in ("view_ms", "router_ms", "assign_ms", "group_ms")]
        return {
            "layer_ms": statistics.median(map(sum, zip(*before_a_byte, strict=True))),
            **{name: statistics.median(values) for name, values in parts_ms.items()},
        }

    def memory(self) -> dict[str, float]:
        """What a process keeps to know all this."""
        tracemalloc.start()
        directory = Directory(MemoryStore(Identity.generate(), RUN, self.crowd.board))
        self._loop.run(directory.refresh_once(self._now_unix_s), timeout_s=120.0)
        records_bytes, _ = tracemalloc.get_traced_memory()
        columns = Hosting(directory.snapshot().hosting.lines)
        snapshot_bytes = tracemalloc.get_traced_memory()[0] - records_bytes
        tracemalloc.stop()
        assert columns.peer_ids, "nobody hosts anything"
        view = self._view(directory.snapshot(), 0)
        tensors = (view.alive_E, view.share_E, view.prior_E)
        return {
            "record_bytes": self.crowd.record_bytes(),
            "records_mib": records_bytes / 2**20,
            "snapshot_mib": snapshot_bytes / 2**20,
            "view_kib": sum(tensor.nbytes for tensor in tensors) / 2**10,
        }

    def _view(self, snapshot: DirectorySnapshot, layer: int) -> View:
        return view_of(snapshot, layer, self._num_experts, self._switchboard.absences)

    def _refresh_ms(self) -> float:
        async def refresh() -> float:
            started_s = time.thread_time()
            await self.directory.refresh_once(self._now_unix_s)
            return 1e3 * (time.thread_time() - started_s)

        return self._loop.run(refresh(), timeout_s=120.0)


def measure(loop: EventLoopThread, identities: Sequence[Identity], num_experts: int, *, full: bool) -> dict[str, float]:
    """All figures of one size."""
    side = TrainerSide(loop, identities, num_experts)
    with ThreadPoolExecutor(1) as thread:  # as the training loop: forwards run beside the main thread
        figures = (
            side.refreshes() | thread.submit(side.step, num_tokens=64, dim=64, repeats=200 if full else 40).result()
        )
    figures |= side.memory()
    if full:
        large = side.step(num_tokens=2048, dim=512, repeats=8)
        figures |= {f"{name}_t2048_d512": value for name, value in large.items()}
        figures["router_gflop_t2048_d512"] = 2 * 2048 * 512 * num_experts / 1e9
    return figures


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="more repeats, and a large batch too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    identities = [Identity.generate() for _ in range(NUM_PEERS)]
    loop = EventLoopThread().start()
    try:
        by_size = {size: measure(loop, identities, size, full=options.full) for size in SIZES}
    finally:
        loop.close()
    if options.json:
        rounded = {size: {name: round(value, 3) for name, value in row.items()} for size, row in by_size.items()}
        say(json.dumps({"peers": NUM_PEERS, "layers": NUM_LAYERS, "by_experts_per_layer": rounded}))
    else:
        say(f"{'experts a layer':<26}" + "".join(f"{size:>10}" for size in SIZES))
        for name in by_size[SIZES[0]]:
            say(f"{name:<26}" + "".join(f"{by_size[size][name]:>10.2f}" for size in SIZES))


if __name__ == "__main__":
    main()
