"""The experts of one device behind awaitable methods: host, serve, snapshot. The same class wherever experts live.

Knows neither the DHT nor gRPC. Belongs to the event loop; its compute thread does the torch work.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog
import torch

from experts.bank import ExpertBank, ExpertState
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid
from peer.call_queue import CallQueue, Declined
from peer.compute_thread import ComputeThread, Part
from peer.device import Footprint, compute_dtype, free_memory_bytes
from peer.expert_compute import ExpertCompute, Memory
from peer.kept_inputs import CallKey, KeptInputsCounts
from peer.manifest import RunManifest
from peer.messages import MAX_CALL_BYTES, Call, GroupReply
from peer.requests import Request
from peer.transport import CallRefused, Method, PeerId, Refusal

log = structlog.get_logger(__name__)

T = TypeVar("T")

_KEPT_SHARE = 0.25
"""Of the memory that the experts leave, for kept inputs; a sixteenth of it for kept replies."""
_QUEUE_SHARE = 0.0625
"""Of the free main memory, for the tensors of calls that wait."""
MAX_QUEUED_ROWS = 1 << 20
"""However fast the device: nobody waits for more than these."""
_MAX_DECLINED = 4096
"""Remembered until the device has time to let go of their inputs; those of earlier ones go when they expire."""


@dataclass(frozen=True)
class ExpertStatus:
    """What the peer's record says of one hosted expert."""

    uid: ExpertUid
    version: int
    rows_served: int


class ExpertHost:
    """Hosts a run's experts on one device. `start` before use; `close` blocks for the batch in hand."""

    def __init__(
        self, manifest: RunManifest, *, device: torch.device, snapshots: SnapshotFolder | None, max_experts: int
    ) -> None:
        self.max_experts = max_experts
        self._manifest = manifest
        self._snapshots = snapshots
        dtype = compute_dtype(device)
        bank = ExpertBank(
            manifest.expert, manifest.expert_optimizer, device=device, seed=manifest.seed, compute_dtype=dtype
        )
        num_experts = min(max_experts, manifest.moe_layers * manifest.experts_per_layer)
        experts_bytes = num_experts * Footprint.of(manifest, dtype).bytes_per_expert
        kept_bytes = int(max(0, free_memory_bytes(device) - experts_bytes) * _KEPT_SHARE)
        self._compute = ExpertCompute(
            bank,
            device=device,
            max_staleness=manifest.wire.max_staleness,
            longest_sequence=manifest.model.context,
            memory=Memory(
                kept_bytes=kept_bytes,
                kept_lifetime_s=2 * manifest.wire.step_timeout_s,
                reply_bytes=kept_bytes // 16,
            ),
        )
        queue_bytes = int(free_memory_bytes(torch.device("cpu")) * _QUEUE_SHARE)
        queue = CallQueue[Request](max_rows=MAX_QUEUED_ROWS, max_bytes=max(MAX_CALL_BYTES, queue_bytes))
        self._thread = ComputeThread[Request, GroupReply](self._run_batch, queue)
        self._statuses: dict[ExpertUid, ExpertStatus] = {}
        """A new one when experts come or go; else its values alone change, so that others may read it meanwhile."""
        self._declined: deque[CallKey] = deque(maxlen=_MAX_DECLINED)
        """The latest calls whose inputs nobody will come back for; the compute thread forgets them."""
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
        return self._thread.queued_rows

    @property
    def trips_per_s(self) -> float | None:
        """Rows a second that the device takes through its experts and back, while it has calls; None before any."""
        return self._thread.trips_per_s

    @property
    def statuses(self) -> tuple[ExpertStatus, ...]:
        """The hosted experts as of the last call; readable from any thread."""
        return tuple(self._statuses.values())

    @property
    def kept_bytes(self) -> int:
        """Memory that waits for backwards; readable from any thread."""
        return self._compute.kept_bytes

    @property
    def kept_inputs(self) -> KeptInputsCounts:
        """What keeping inputs was good for; readable from any thread."""
        return replace(self._compute.kept_counts)

    def take_throughput(self) -> float:
        """Rows per second answered since this was last asked."""
        now_s, rows_done = time.monotonic(), self._rows_done
        rows_per_s = (rows_done - self._rows_seen) / max(now_s - self._seen_at_s, 1e-9)
        self._rows_seen, self._seen_at_s = rows_done, now_s
        return rows_per_s

    def check(self, method: Method, caller: PeerId, call: Call) -> None:
        """Would this call be let in now? It needs no tensors for that. Raises CallRefused, ComputeThreadStopped."""
        try:
            self._thread.check(Request(method, caller, call).waiting(now_s=time.monotonic()))
        except Declined as declined:
            raise CallRefused(Refusal.OVERLOADED, str(declined)) from None

    async def answer(self, method: Method, caller: PeerId, call: Call) -> AsyncGenerator[GroupReply]:
        """Run one call and give its answer group by group; `call.timeout_s` is what is left of its time.

        Raises CallRefused, ComputeThreadStopped. A caller that gives up does not stop work that has begun.
        """
        request = Request(method, caller, call)
        try:
            async with aclosing(self._thread.submit(request.waiting(now_s=time.monotonic()))) as groups:
                async for group in groups:
                    yield group
        except Declined as declined:
            self._declined.append(request.key)
            raise CallRefused(Refusal.OVERLOADED, str(declined)) from None

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

        def forget() -> None:
            self._forget_declined()
            self._compute.forget_expired(now_s=now_s)

        await self._control(forget)

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
        """Something on the compute thread that may change which experts are here."""

        def between_calls() -> T:
            self._compute.step()
            try:
                return action()
            finally:
                self._statuses = {uid: self._status(uid) for uid in self._compute.bank.uids}

        return await self._thread.run(between_calls)

    def _forget_declined(self) -> None:
        """On the compute thread."""
        while self._declined:
            self._compute.forget(self._declined.popleft())

    def _run_batch(self, requests: Sequence[Request], more_backwards: Callable[[], bool]) -> Iterator[Part[GroupReply]]:
        self._forget_declined()
        uids = {uid for request in requests for uid in request.uids if uid in self._statuses}
        for part in self._compute.answer(requests, now_s=time.monotonic(), more_backwards=more_backwards):
            if part.is_last:
                self._rows_done += requests[part.position].call.num_pairs
                self._statuses.update({uid: self._status(uid) for uid in uids})
            yield part

    def _status(self, uid: ExpertUid) -> ExpertStatus:
        return ExpertStatus(uid, self._compute.bank.version(uid), self._compute.rows_served[uid])
