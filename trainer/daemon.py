"""`swarmoe train`: a process that trains until its last step, and writes down how that went. Puts the parts together.

Born in this order: the DHT process, the event loop with gRPC, the training threads. Ends in the reverse order.
"""

import asyncio
import hashlib
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import structlog

from peer.bootstrap import parse_join
from peer.device import limit_compute_threads
from peer.emulated_transport import emulate
from peer.errors import BadConfiguration, TrainingGaveUp
from peer.event_loop import EventLoopThread
from peer.farewell import say_goodbye
from peer.freed_memory import keep_freed_memory
from peer.grpc_transport import GrpcTransport
from peer.held import Held
from peer.identity import Identity, StateFolder
from peer.membership import Membership, membership
from peer.records import RECORD_LIFETIME_S, RENEW_EVERY_S, PeerState, TrainerRecord
from peer.run_folder import keep_run
from peer.signals import StopRequest, stop_on_signals
from peer.supervisor import DhtSupervisor
from peer.transport import PeerId
from trainer.assembly import build_model, build_optimizer
from trainer.checkpoint import holds_checkpoint, load_newest
from trainer.data import ByteDataset, default_data_path
from trainer.loop import TrainingLoop
from trainer.progress import open_progress
from trainer.reports import StepReport
from trainer.session import Surroundings, TrainingSession
from trainer.settings import TrainSettings
from trainer.summary import TrainerSummary
from trainer.swarm import LEAVE_WITHIN_S, Swarm

log = structlog.get_logger(__name__)

WAIT_FOR_EXPERTS_S = 60.0
METRICS_FILE = "metrics.jsonl"
_STOP_LOOK_EVERY_S = 0.5


def run_trainer(settings: TrainSettings) -> int:
    """Train until the last step or a signal; returns the exit code. Raises SwarmError for what cannot go on."""
    limit_compute_threads()
    keep_freed_memory()
    with stop_on_signals() as stop, StateFolder(settings.checkpoint_dir) as folder:
        identity = folder.identity()
        supervisor = DhtSupervisor.spawn()
        with EventLoopThread() as loop:
            voice = _Voice(identity.peer_id)
            held = Held(loop, _announced(settings, identity, supervisor, voice), leave_timeout_s=LEAVE_WITHIN_S)
            member = held.open(stop)
            if member is None:
                return 0
            with closing(held):
                swarm = Swarm(loop, held, member)
                print(f"joined: {swarm.manifest.run_id}", flush=True)
                summary = _train(settings, swarm, voice, stop)
    if summary.gave_up is not None:
        raise TrainingGaveUp(f"{summary.gave_up}; bring peers back and go on with --resume")
    return 0


def _train(settings: TrainSettings, swarm: Swarm, voice: "_Voice", stop: StopRequest) -> TrainerSummary:
    manifest, folder = swarm.manifest, settings.checkpoint_dir
    keep_run(folder, manifest)
    _check_device(settings)
    data = ByteDataset.open(settings.data or default_data_path(), context=manifest.model.context)
    steps = settings.steps if settings.steps is not None else manifest.steps
    model = build_model(manifest, swarm.experts, swarm.view)
    progress = open_progress(total_steps=steps, metrics_path=folder / METRICS_FILE, stream=sys.stdout)
    shard = settings.data_shard if settings.data_shard is not None else _shard_of(voice.peer_id)
    with TrainingLoop(model, build_optimizer(manifest, model), data, manifest, shard=shard) as loop, closing(progress):
        session = TrainingSession(
            loop,
            manifest,
            folder=folder,
            shard=shard,
            steps=steps,
            progress=progress,
            surroundings=Surroundings(
                is_stopped=lambda: stop.is_requested,
                experts_alive=swarm.experts_alive,
                wait_for_experts=lambda timeout_s: _wait_for_experts(
                    swarm, stop, timeout_s, at_least=swarm.experts_alive() + 1
                ),
                tell=voice.tell,
            ),
        )
        saved = load_newest(folder, run=manifest) if settings.resume and holds_checkpoint(folder) else None
        if not _wait_for_experts(swarm, stop, WAIT_FOR_EXPERTS_S):
            uncovered = swarm.snapshot().uncovered(manifest.uids())
            progress.note(f"nobody serves {len(uncovered)} of {len(manifest.uids())} experts yet; beginning without")
        if saved is not None:
            session.resume(saved)
        elif settings.resume:
            progress.note(f"no checkpoint in {folder} yet; beginning")
        summary = session.run()
    _write_summary(summary, folder)
    return summary


def _wait_for_experts(swarm: Swarm, stop: StopRequest, timeout_s: float, *, at_least: int | None = None) -> bool:
    """As `Swarm.wait_for_experts`, but no longer than nobody asks to stop."""
    deadline_s = time.monotonic() + timeout_s
    while not stop.is_requested and (left_s := deadline_s - time.monotonic()) > 0:
        if swarm.wait_for_experts(timeout_s=min(left_s, _STOP_LOOK_EVERY_S), at_least=at_least):
            return True
    return False


def _write_summary(summary: TrainerSummary, folder: Path) -> None:
    try:
        summary.write(folder)
    except OSError as error:
        log.warning("summary.not_written", folder=str(folder), reason=error.strerror)


def _check_device(settings: TrainSettings) -> None:
    if settings.device not in ("auto", "cpu"):
        raise BadConfiguration(f"--device {settings.device}: a trunk on a GPU is not built yet; leave the flag out")


def _shard_of(peer_id: PeerId) -> int:
    """A share of the data nobody else has: batches are drawn by trainer, step and micro-batch."""
    return int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:4], "big")


class _Voice:
    """What this trainer says of itself. `tell` from the training thread, `record` from the loop."""

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self._last: StepReport | None = None

    def tell(self, report: StepReport) -> None:
        self._last = report

    def record(self, state: PeerState) -> TrainerRecord:
        last = self._last
        if last is None:
            return TrainerRecord(peer_id=self.peer_id, state=state, step=0)
        return TrainerRecord(
            peer_id=self.peer_id,
            state=state,
            step=last.step,
            loss=last.train_bits_per_byte,
            tokens_per_s=last.tokens_per_s,
            answered_share=min(1.0, max(0.0, last.answered_share)),
        )


@asynccontextmanager
async def _announced(
    settings: TrainSettings, identity: Identity, supervisor: DhtSupervisor, voice: _Voice
) -> AsyncGenerator[Membership]:
    """A membership whose record says how far training is."""
    joins = [parse_join(text) for text in settings.join]
    transport = emulate(GrpcTransport(identity), settings, seed=settings.link_seed, answer_loss=settings.loss)
    async with (
        membership(joins, identity=identity, supervisor=supervisor, transport=transport) as member,
        asyncio.TaskGroup() as tasks,
    ):
        speaking = tasks.create_task(_speak(member, voice))
        yield member
        speaking.cancel()
        await say_goodbye(member.store, voice.record("offline"))


async def _speak(member: Membership, voice: _Voice) -> None:
    while True:
        await member.store.put(voice.record("online"), lifetime_s=RECORD_LIFETIME_S, now_unix_s=time.time())
        await asyncio.sleep(RENEW_EVERY_S)
