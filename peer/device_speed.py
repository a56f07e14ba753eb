"""How many tokens a second a device takes through the run's experts, with nothing else to do. Knows no network.

Blocks; belongs to whichever thread makes the experts' host. Uses fresh experts of its own and leaves nothing behind.
"""

import time
from collections.abc import Callable

import torch

from experts.bank import ExpertBank
from experts.registry import expert_kind
from experts.settings import ExpertOptimizerSettings
from peer.device import compute_dtype, free_memory_bytes
from peer.manifest import RunManifest
from peer.rates import MeasuredDevice

TRIP_FORWARDS = 3
"""A forward, and a backward that costs two."""
_MEASURE_S = 0.3
_MOST_EXPERTS = 4
_MANY_PARAMETERS = 1 << 20
"""Of experts larger than this one alone keeps a device busy, and several would only take longer to make."""
_FIRST_ROWS = 64
_GROWTH = 4
_LONG_ENOUGH_S = 0.08
"""A pass this long is compute, not overhead."""
_BANK_SHARE = 0.25
_PASS_SHARE = 0.125
"""Of the free memory."""
_FORGETFUL = ExpertOptimizerSettings(name="sgd")  # it keeps no moments; no step is taken


def measure_device(
    manifest: RunManifest, device: torch.device, *, clock: Callable[[], float] = time.perf_counter
) -> MeasuredDevice | None:
    """Forward and backward over larger and larger batches for about 0.3 s; the best counts.

    None when experts of this size leave no room for a measurement. Raises ValueError for an unknown or unsuitable kind.
    """
    free_bytes = free_memory_bytes(device)
    if ExpertBank.bytes_per_expert(manifest.expert, _FORGETFUL, compute_dtype(device)) > free_bytes * _BANK_SHARE:
        return None
    passes = _Passes(manifest, device, clock)
    most_rows = max(_FIRST_ROWS, int(free_bytes * _PASS_SHARE) // passes.bytes_per_row)
    end_s = clock() + _MEASURE_S
    rows = _FIRST_ROWS
    best = passes.tokens_per_s(rows)  # the first pass is slow; it counts where there is time for no other
    while (now_s := clock()) < end_s and rows <= most_rows:
        best = max(best, passes.tokens_per_s(rows))
        if clock() - now_s > _LONG_ENOUGH_S:
            break
        rows *= _GROWTH
    return MeasuredDevice(tokens_per_s=round(best, 3), flops_per_s=round(best * passes.flops_per_token))


class _Passes:
    def __init__(self, manifest: RunManifest, device: torch.device, clock: Callable[[], float]) -> None:
        shape = manifest.expert
        kind = expert_kind(shape.kind)
        num_experts = 1 if kind.num_parameters(shape) > _MANY_PARAMETERS else _MOST_EXPERTS
        dtype = compute_dtype(device)
        self._bank = ExpertBank(shape, _FORGETFUL, device=device, seed=manifest.seed, compute_dtype=dtype)
        self._uids = manifest.uids()[:num_experts]
        for uid in self._uids:
            self._bank.add(uid)
        self._sequence = manifest.model.context if kind.is_sequence_level else None
        self._dim, self._device, self._clock = shape.dim, device, clock
        self.flops_per_token = TRIP_FORWARDS * kind.flops_per_token(shape, context=manifest.model.context)
        self.bytes_per_row = kind.saved_bytes_per_row(shape, dtype) + 4 * 4 * shape.dim
        """What autograd keeps, and rows, outputs and their gradients."""

    def tokens_per_s(self, rows: int) -> float:
        """One pass over about so many rows, forward and backward."""
        each = max(1, rows // len(self._uids))
        if self._sequence is not None:
            each = self._sequence * -(-each // self._sequence)
        counts = [each] * len(self._uids)
        lengths = None if self._sequence is None else [self._sequence] * (sum(counts) // self._sequence)
        x_ND = torch.randn(sum(counts), self._dim, device=self._device)
        self._finish()
        started_s = self._clock()
        run = self._bank.forward(x_ND, self._uids, counts, keep_graph=True, lengths=lengths)
        self._bank.backward(run, x_ND, loss_tokens=float(sum(counts)))
        self._finish()
        return sum(counts) / max(self._clock() - started_s, 1e-9)

    def _finish(self) -> None:
        """Until a device that works on its own has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
