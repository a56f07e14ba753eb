"""The experts of one device behind awaitable methods: host, serve, snapshot. The same class wherever experts live.

Knows neither the DHT nor gRPC. Belongs to the event loop; its compute thread does the torch work.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
import torch

from experts.bank import ExpertBank, ExpertState
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid
from peer.compute_thread import ComputeThread
from peer.device import free_memory_bytes
from peer.expert_compute import ExpertCompute, Memory, Request
from peer.manifest import RunManifest
from peer.messages import Call, GroupReply
from peer.transport import CallRefused, Method, PeerId

log = structlog.get_logger(__name__)

_KEPT_SHARE = 0.25
"""Of the memory that is free at start, for kept inputs; a sixteenth of it for kept replies."""
_MAX_BATCH_TOKENS = 1 << 16


@dataclass(frozen=True)
class ExpertStatus:
    """What the peer's record says of one hosted expert."""

    uid: ExpertUid
    version: int
    rows_served: int


@dataclass(frozen=True)
class _Control:
    """Something else that must happen on the compute thread."""

    action: Callable[[], object]


class ExpertHost:
    """Hosts a run's experts on one device. `start` before use; `close` blocks for the batch in hand."""

    def __init__(
        self, manifest: RunManifest, *, device: torch.device, snapshots: SnapshotFolder | None, max_experts: int
    ) -> None:
        self.max_experts = max_experts
        self._manifest = manifest
        self._snapshots = snapshots
        free_bytes = free_memory_bytes(device)
        bank = ExpertBank(manifest.expert, manifest.expert_optimizer, device=device, seed=manifest.seed)
        self._compute = ExpertCompute(
            bank,
            device=device,
            max_staleness=manifest.wire.max_staleness,
            memory=Memory(
                kept_bytes=int(free_bytes * _KEPT_SHARE),
                kept_lifetime_s=2 * manifest.wire.step_timeout_s,
                reply_bytes=int(free_bytes * _KEPT_SHARE / 16),
            ),
        )
        self._thread: ComputeThread[Request | _Control, object] = ComputeThread(
            self._run_batch, max_tokens=_MAX_BATCH_TOKENS
        )
        self._statuses: tuple[ExpertStatus, ...] = ()
        self._busy_since_s = time.monotonic()
        self._tokens_done = 0

    def start(self) -> None:
        self._thread.start()

    def close(self, *, timeout_s: float) -> bool:
        """Finish the batch in hand and end the thread; False when it did not end in time. Not for the loop."""
        return self._thread.close(timeout_s=timeout_s)

    @property
    def queued_rows(self) -> int:
        return self._thread.queued_tokens

    @property
    def statuses(self) -> tuple[ExpertStatus, ...]:
        """The hosted experts as of the last batch; readable from any thread."""
        return self._statuses

    def take_throughput(self) -> float:
        """Rows per second answered since this was last asked."""
        now_s = time.monotonic()
        rows_per_s = self._tokens_done / max(now_s - self._busy_since_s, 1e-9)
        self._busy_since_s, self._tokens_done = now_s, 0
        return rows_per_s

    async def answer(self, method: Method, caller: PeerId, call: Call) -> GroupReply:
        """Run one call. Raises CallRefused; a cancelled caller does not stop work that has begun."""
        reply = await self._thread.submit(Request(method, caller, call), num_tokens=call.num_pairs)
        assert isinstance(reply, GroupReply)
        return reply

    async def host(self, uids: Sequence[ExpertUid], saved: Mapping[ExpertUid, ExpertState]) -> None:
        """Take experts in: from their saved state where there is one, else fresh from the run's seed."""

        def take_in() -> None:
            for uid in uids:
                if uid in saved:
                    self._compute.bank.load(uid, saved[uid])
                else:
                    self._compute.bank.add(uid)

        await self._control(take_in)
        for uid in uids:
            log.info("expert.restored" if uid in saved else "expert.fresh", uid=str(uid))

    async def drop(self, uid: ExpertUid) -> None:
        """Stop hosting an expert; its state is gone unless a snapshot holds it."""
        await self._control(lambda: self._compute.bank.remove(uid))

    async def save_snapshot(self) -> int:
        """Write the experts' state to the folder; returns how many. Raises OSError (disk full, read-only)."""
        if self._snapshots is None:
            return 0
        states: dict[ExpertUid, ExpertState] = {}

        def copy_states() -> None:
            states.update({uid: self._compute.bank.state(uid) for uid in self._compute.bank.uids})

        await self._control(copy_states)
        if states:
            await asyncio.to_thread(self._snapshots.save, states, self._manifest.run_id)
        return len(states)

    async def _control(self, action: Callable[[], object]) -> None:
        await self._thread.submit(_Control(action), num_tokens=0)

    def _run_batch(self, works: Sequence[Request | _Control]) -> list[object | Exception]:
        results = [self._run(work) for work in works]
        self._tokens_done += sum(work.call.num_pairs for work in works if isinstance(work, Request))
        bank, served = self._compute.bank, self._compute.rows_served
        self._statuses = tuple(ExpertStatus(uid, bank.version(uid), served[uid]) for uid in bank.uids)
        return results

    def _run(self, work: Request | _Control) -> object | Exception:
        if isinstance(work, _Control):
            return work.action()
        try:
            return self._compute.answer(work, now_s=time.monotonic())
        except CallRefused as refusal:
            return refusal
