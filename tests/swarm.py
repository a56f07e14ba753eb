"""A whole swarm in one process: real hosts, services and wire over a network in memory, as a training thread sees it.

On real threads (a loop of its own, a compute thread per peer), or on a virtual clock, where the calling thread does
all the work and ten seconds of silence take no time.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from experts.bank import ExpertBank, ExpertState
from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid
from peer.call_queue import Waiting
from peer.directory import Directory
from peer.event_loop import EventLoopThread, Talk
from peer.expert_host import ExpertHost
from peer.faults import Faults
from peer.identity import Identity
from peer.manifest import (
    BatchSettings,
    ModelSettings,
    RouterSettings,
    RunManifest,
    TrunkOptimizerSettings,
    WireSettings,
)
from peer.memory_store import MemoryBoard, MemoryStore
from peer.memory_transport import MemoryNetwork
from peer.messages import MAX_CALL_BYTES, CallLimits, GroupReply
from peer.records import HostedExpert, PeerRecord, PeerState
from peer.requests import Request
from peer.service import ExpertService
from peer.transport import Endpoint, Method, PeerId
from protos.swarm_pb2 import InfoReply, InfoRequest
from tests.virtual_clock import VirtualClockLoop
from trainer.assembly import build_model, build_optimizer
from trainer.data import ByteDataset, default_data_path
from trainer.ledger import Ledger
from trainer.local_experts import LocalExperts
from trainer.loop import TrainingLoop
from trainer.moe import MoELayer
from trainer.remote_experts import Experts, RemoteExperts
from trainer.routing.view import View
from trainer.scope import MicroBatch, StepScope
from trainer.swarm import router_for, sees_sequences, view_of

T = TypeVar("T")

CPU = torch.device("cpu")
DIM, NUM_LAYERS, PER_LAYER = 16, 2, 6


def tiny_run(
    *,
    micro_batches: int = 1,
    optimizer: ExpertOptimizerSettings | None = None,
    trunk: TrunkOptimizerSettings | None = None,
    codec: str = "fp32",
    call_timeout_s: float = 10.0,
    step_timeout_s: float = 60.0,
    max_staleness: int = 64,
    top_k: int = 2,
    **fields: Any,
) -> RunManifest:
    """Two mixture layers of six experts, two experts per token, AdamW on both sides."""
    return RunManifest(
        **{
            "name": "tiny",
            "moe_layers": NUM_LAYERS,
            "experts_per_layer": PER_LAYER,
            "expert": ExpertShape(kind="swiglu", dim=DIM, hidden=24),
            "expert_optimizer": optimizer or ExpertOptimizerSettings(),
            "trunk_optimizer": trunk or TrunkOptimizerSettings(warmup_steps=2),
            "model": ModelSettings(dim=DIM, layers=2, heads=2, kv_heads=1, context=16, shared_hidden=16),
            "router": RouterSettings(preset="mixtral", top_k=top_k),
            "batch": BatchSettings(sequences=4, micro_batches=micro_batches),
            "wire": WireSettings(
                forward_codec=codec,
                backward_codec=codec,
                call_timeout_s=call_timeout_s,
                step_timeout_s=step_timeout_s,
                max_staleness=max_staleness,
            ),
            **fields,
        }
    )


def uids(text: str) -> list[ExpertUid]:
    """`0.0 0.1 1.3`"""
    return [ExpertUid.parse(uid) for uid in text.split()]


class VirtualBridge:
    """Stands in for `EventLoopThread`: the thread that asks runs the loop itself, on a virtual clock."""

    def __init__(self) -> None:
        self.loop = VirtualClockLoop()

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float | None) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, timeout_s))

    def listen(self, talks: Iterable[Talk[T]], *, timeout_s: float) -> Iterator[T]:
        inbox: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
        running = [self.loop.create_task(talk(inbox.put_nowait)) for talk in talks]
        for task in running:
            task.add_done_callback(inbox.put_nowait)
        for _ in running:
            while not isinstance(said := self.run(inbox.get(), timeout_s=timeout_s), asyncio.Task):
                yield said
            said.result()

    @property
    def now_s(self) -> float:
        return self.loop.time()

    def close(self) -> bool:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:  # its exit cancels what is left
            runner.get_loop()
        return True


class _Inline:
    """Stands in for a compute thread: works where it is asked."""

    queued_rows = 0

    def __init__(self, host: ExpertHost) -> None:
        self._host = host

    def start(self) -> None: ...

    def close(self, *, timeout_s: float) -> bool:
        return True

    def check(self, call: Waiting[Request]) -> None: ...

    async def submit(self, call: Waiting[Request]) -> AsyncGenerator[GroupReply]:
        for part in self._host._run_batch([call.work], lambda: False):
            if isinstance(part.result, Exception):
                raise part.result
            yield part.result

    async def run(self, action: Callable[[], T]) -> T:
        return action()


@dataclass
class SwarmPeer:
    """A peer and what tests look at."""

    identity: Identity
    host: ExpertHost
    endpoint: Endpoint
    store: MemoryStore
    claimed_at_unix_s: dict[ExpertUid, float] = field(default_factory=dict)

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def bank(self) -> ExpertBank:
        """Read it only while no call is running."""
        return self.host._compute.bank

    def versions(self) -> dict[str, int]:
        return {str(uid): self.bank.version(uid) for uid in self.bank.uids}

    def states(self) -> dict[ExpertUid, ExpertState]:
        return {uid: self.bank.state(uid) for uid in self.bank.uids}


class MemorySwarm(AbstractContextManager["MemorySwarm"]):
    """Peers, and one trainer's way to them. The directory changes only when `announce` or `refresh` is called."""

    def __init__(self, manifest: RunManifest | None = None, *, virtual: bool = False) -> None:
        self.manifest = manifest or tiny_run()
        self.is_virtual = virtual
        self.bridge = VirtualBridge() if virtual else EventLoopThread().start()
        self.network = MemoryNetwork()
        self.board = MemoryBoard()
        self.peers: list[SwarmPeer] = []
        self.now_unix_s = 1000.0
        self.trainer = Identity.generate()
        self.transport = self.network.transport(self.trainer)
        self.directory = Directory(MemoryStore(self.trainer, self.manifest.run_id, self.board))
        self.experts = RemoteExperts(
            run_id=self.manifest.run_id,
            wire=self.manifest.wire,
            transport=self.transport,
            directory=self.directory,
            loop=self.bridge,
        )

    @property
    def faults(self) -> Faults:
        return self.network.faults

    def add_peer(self, hosted: Sequence[ExpertUid], *, snapshots: Path | None = None) -> SwarmPeer:
        """A peer that serves these, online and seen."""
        identity = Identity.generate()
        folder = SnapshotFolder(snapshots) if snapshots is not None else None
        host = ExpertHost(self.manifest, device=CPU, snapshots=folder, max_experts=100)
        if self.is_virtual:
            host._thread = _Inline(host)
        host.start()
        transport = self.network.transport(identity)
        service = ExpertService(
            host, CallLimits.of(self.manifest), _introduce_nobody, max_bytes_in_flight=MAX_CALL_BYTES
        )
        server = self.run(transport.serve(service, "127.0.0.1:0"))
        self.run(host.host(hosted, {}))
        endpoint = Endpoint(identity.peer_id, server.address, transport.certificate_der)
        self.peers.append(SwarmPeer(identity, host, endpoint, MemoryStore(identity, self.manifest.run_id, self.board)))
        self.announce(self.peers[-1])
        return self.peers[-1]

    def add_peers(self, *hosted: str) -> list[SwarmPeer]:
        """One per text of uids."""
        return [self.add_peer(uids(text)) for text in hosted]

    def spread_over(self, num_peers: int) -> list[SwarmPeer]:
        """Every expert of the run, dealt out like cards."""
        return [self.add_peer(self.manifest.uids()[nth::num_peers]) for nth in range(num_peers)]

    def announce(self, peer: SwarmPeer, *, state: PeerState = "online") -> None:
        """Have a newer record of this peer seen by the trainer."""
        self.now_unix_s += 1.0
        for status in peer.host.statuses:
            peer.claimed_at_unix_s.setdefault(status.uid, self.now_unix_s)
        record = PeerRecord(
            peer_id=peer.peer_id,
            state=state,
            address=peer.endpoint.address,
            certificate_der_b64=base64.b64encode(peer.endpoint.certificate_der).decode(),
            experts=tuple(
                HostedExpert(
                    uid=str(status.uid), version=status.version, claimed_at_unix_s=peer.claimed_at_unix_s[status.uid]
                )
                for status in peer.host.statuses
            ),
        )
        assert self.run(peer.store.put(record, lifetime_s=60.0, now_unix_s=self.now_unix_s))
        self.refresh()

    def refresh(self) -> None:
        self.run(self.directory.refresh_once(self.now_unix_s))

    def view(self, layer: int) -> View:
        snapshot = self.directory.snapshot()
        return view_of(snapshot, layer, self.manifest.experts_per_layer, self.experts.absences)

    def moe(self, layer: int = 0) -> MoELayer:
        return MoELayer(
            layer,
            router_for(self.manifest, layer),
            self.experts,
            self.view,
            timeout_s=60.0,
            whole_sequences=sees_sequences(self.manifest),
        )

    def num_calls(self, peer: SwarmPeer, method: Method) -> int:
        return self.faults.num_calls(peer.peer_id, method)

    def states(self) -> dict[ExpertUid, ExpertState]:
        return {uid: state for peer in self.peers for uid, state in peer.states().items()}

    def versions(self) -> dict[str, int]:
        return {uid: version for peer in self.peers for uid, version in peer.versions().items()}

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.bridge.run(coroutine, timeout_s=30.0)

    def close(self) -> None:
        self.run(self.transport.close())
        for peer in self.peers:
            assert peer.host.close(timeout_s=5.0)
        assert self.bridge.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_experts(manifest: RunManifest) -> LocalExperts:
    """Every expert of the run in this process."""
    bank = ExpertBank(manifest.expert, manifest.expert_optimizer, device=CPU, seed=manifest.seed)
    for uid in manifest.uids():
        bank.add(uid)
    return LocalExperts(bank)


def local_states(experts: LocalExperts) -> dict[ExpertUid, ExpertState]:
    return {uid: experts._bank.state(uid) for uid in experts._bank.uids}


def training_loop(swarm: MemorySwarm) -> TrainingLoop:
    return training_loop_of(swarm.manifest, swarm.experts, swarm.view)


def local_training_loop(manifest: RunManifest, experts: LocalExperts | None = None) -> TrainingLoop:
    view = [View.all_alive(layer, manifest.experts_per_layer) for layer in range(manifest.moe_layers)]
    return training_loop_of(manifest, experts or local_experts(manifest), view.__getitem__)


def training_loop_of(manifest: RunManifest, experts: Experts, view: Any) -> TrainingLoop:
    model = build_model(manifest, experts, view)
    data = ByteDataset.open(default_data_path(), context=manifest.model.context)
    return TrainingLoop(model, build_optimizer(manifest, model), data, manifest, shard=7)


def step_of(*, train: bool = True, deadline_in_s: float = 60.0) -> MicroBatch:
    """A micro-batch of a step of its own."""
    scope = StepScope(deadline_s=time.monotonic() + deadline_in_s, ledger=Ledger(), train=train)
    return MicroBatch(scope, loss_tokens=1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _introduce_nobody(request: InfoRequest) -> InfoReply:
    raise AssertionError("nobody joins through these peers")
