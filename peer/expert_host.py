"""The experts of one device behind awaitable methods: host, serve, snapshot. The same class wherever experts live.

Knows neither the DHT nor gRPC. Belongs to the event loop; its compute thread does the torch work.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import structlog
import torch

from experts.bank import ExpertBank, ExpertState
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid
from peer.compute_thread import ComputeThread
from peer.device import compute_dtype, free_memory_bytes
from peer.expert_compute import ExpertCompute, Memory, Request
from peer.manifest import RunManifest
from peer.messages import Call, GroupReply
from peer.transport import CallRefused, Method, PeerId

log = structlog.get_logger(__name__)

T = TypeVar("T")

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
        bank = ExpertBank(
            manifest.expert,
            manifest.expert_optimizer,
            device=device,
            seed=manifest.seed,
            compute_dtype=compute_dtype(device),
        )
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
        self._statuses: dict[ExpertUid, ExpertStatus] = {}
        """A new one when experts come or go; else its values alone change, so that others may read it meanwhile."""
        self._saving = threading.Lock()
        self._rows_done = 0
        """Written by the compute thread alone."""
        self._rows_seen, self._seen_at_s = 0, time.monotonic()

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
        """The hosted experts as of the last call; readable from any thread."""
        return tuple(self._statuses.values())

    @property
    def kept_bytes(self) -> int:
        """Memory that waits for backwards; readable from any thread."""
        return self._compute.kept_bytes

    @property
    def recomputed_backwards(self) -> int:
        """Backwards whose outputs had to be computed again; readable from any thread."""
        return self._compute.recomputed

    def take_throughput(self) -> float:
        """Rows per second answered since this was last asked."""
        now_s, rows_done = time.monotonic(), self._rows_done
        rows_per_s = (rows_done - self._rows_seen) / max(now_s - self._seen_at_s, 1e-9)
        self._rows_seen, self._seen_at_s = rows_done, now_s
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

    async def drop(self, uid: ExpertUid) -> ExpertState:
        """Stop hosting an expert; what it was is the caller's now."""

        def take_out() -> ExpertState:
            state = self._compute.bank.state(uid)
            self._compute.bank.remove(uid)
            return state

        return await self._control(take_out)

    async def forget_expired(self, *, now_s: float) -> None:
        """Let go of inputs whose backward will not come: to be asked for now and then, when no call does."""
        await self._control(lambda: self._compute.forget_expired(now_s=now_s))

    async def save_snapshot(self, unhosted: Mapping[ExpertUid, ExpertState]) -> int:
        """Write all experts' state to the folder; returns how many. Raises OSError (disk full, read-only).

        `unhosted` are states to keep of experts that are not hosted now; where one is hosted, its present state counts.
        """
        if self._snapshots is None:
            return 0
        bank = self._compute.bank
        hosted = await self._control(lambda: {uid: bank.state(uid) for uid in bank.uids})
        states = {**unhosted, **hosted}  # read only now, so that one dropped just before is among them
        if states:
            await asyncio.to_thread(self._write, self._snapshots, states)
        return len(states)

    def _write(self, folder: SnapshotFolder, states: Mapping[ExpertUid, ExpertState]) -> None:
        # Whoever gives up waiting for a save does not end it, and a folder has one writer at a time.
        with self._saving:
            folder.save(states, self._manifest.run_id)

    async def _control(self, action: Callable[[], T]) -> T:
        return cast("T", await self._thread.submit(_Control(action), num_tokens=0))

    def _run_batch(self, works: Sequence[Request | _Control]) -> Iterator[object | Exception]:
        for work in works:
            result = self._run(work)
            if isinstance(work, Request):
                self._rows_done += work.call.num_pairs
                self._statuses.update({uid: self._status(uid) for uid in work.uids if uid in self._statuses})
            else:
                self._statuses = {uid: self._status(uid) for uid in self._compute.bank.uids}
            yield result

    def _status(self, uid: ExpertUid) -> ExpertStatus:
        return ExpertStatus(uid, self._compute.bank.version(uid), self._compute.rows_served[uid])

    def _run(self, work: Request | _Control) -> object | Exception:
        try:
            if isinstance(work, _Control):
                return work.action()
            return self._compute.answer(work, now_s=time.monotonic())
        except CallRefused as refusal:
            return refusal
        except Exception as error:  # the top of the compute thread for one call: others of its batch have taken steps
            return error  # raised, and logged, where it is awaited
