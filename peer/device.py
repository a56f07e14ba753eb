"""Which device hosts the experts, in what it computes, and how many of them fit on it."""

import os
from dataclasses import dataclass
from typing import Literal, Self

import psutil
import torch

from experts.bank import ExpertBank
from experts.registry import expert_kind
from peer.manifest import RunManifest

DeviceName = Literal["auto", "cpu", "cuda", "mps"]

_EXPERT_SHARE = 0.5
"""Of the free memory, for weights, moments and gradients; the rest is for activations and other programs."""
MAX_EXPERTS = 1000
"""A peer names all its experts in one record, and the swarm takes no larger record than theirs."""


class DeviceUnavailable(ValueError):
    """The asked-for device is not here."""


def choose_device(name: DeviceName) -> tuple[torch.device, str]:
    """The device and, in words, why. Raises DeviceUnavailable for one that was asked for by name and is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        chosen = next(device for device, is_here in available.items() if is_here)
        return torch.device(chosen), f"{chosen}: the fastest device found (choose with --device)"
    if not available[name]:
        here = ", ".join(device for device, is_here in available.items() if is_here)
        raise DeviceUnavailable(f"--device {name}: this machine or torch build has none; available: {here}")
    return torch.device(name), f"{name}: asked for with --device"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a GPU has it; weights and gradients stay float32 anyway. CPUs and MPS are no faster for it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def free_memory_bytes(device: torch.device) -> int:
    """What the device could still give, shared fairly among this machine's peers by nobody but the operating system."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Footprint:
    """What experts take of the device's memory."""

    bytes_per_expert: int
    """Weights, what computes in their place, the optimiser's moments and one gradient."""
    activation_bytes: int = 0
    """Of a call with every token of a micro-batch to one expert, forward and backward."""

    @classmethod
    def of(cls, manifest: RunManifest, dtype: torch.dtype) -> Self:
        """As they compute in `dtype`."""
        shape = manifest.expert
        saved_bytes = expert_kind(shape.kind).saved_bytes_per_row(shape, dtype)
        rows_bytes = 4 * 4 * shape.dim  # inputs, outputs and their gradients, float32
        return cls(
            ExpertBank.bytes_per_expert(shape, manifest.expert_optimizer, dtype),
            manifest.batch.sequences * manifest.model.context * (saved_bytes + rows_bytes),
        )


@dataclass(frozen=True)
class Capacity:
    """How many experts this peer takes, and the sentence for its operator."""

    max_experts: int
    reason: str


def capacity(*, asked: int | None, free_bytes: int, footprint: Footprint) -> Capacity:
    """An asked-for number is kept if it fits beside a call; otherwise as many as fit in half of the free memory.

    Never more than MAX_EXPERTS. Raises ValueError, with the numbers, when more was asked for than the free memory or a
    peer's record holds, and when not one fits.
    """
    fits = max(0, (free_bytes - footprint.activation_bytes) // footprint.bytes_per_expert)
    room = min(fits, int(free_bytes * _EXPERT_SHARE) // footprint.bytes_per_expert)
    each = f"{_mib(footprint.bytes_per_expert)} each with optimiser state"
    beside = f"{_mib(free_bytes)} free, {_mib(footprint.activation_bytes)} of it for activations"
    if asked is not None:
        if asked > fits:
            raise ValueError(f"--max-experts {asked} needs more memory than is free: {fits} fit ({each}; {beside})")
        if asked > MAX_EXPERTS:
            raise ValueError(f"--max-experts {asked} is more than one peer announces, {MAX_EXPERTS}; start more peers")
        return Capacity(asked, f"at most {asked} experts, as asked with --max-experts ({each})")
    if room == 0:
        raise ValueError(
            f"no expert of this run fits in half of the free memory ({each}; {beside}); --max-experts {fits} takes all"
            if fits
            else f"no expert of this run fits on this device ({each}; {beside})"
        )
    if room > MAX_EXPERTS:
        return Capacity(MAX_EXPERTS, f"{MAX_EXPERTS} experts, the most one peer announces ({each}); see --max-experts")
    return Capacity(room, f"room for {room} experts in half of the free memory ({each}); see --max-experts")


def limit_compute_threads() -> None:
    """One compute thread per process unless OMP_NUM_THREADS says otherwise: several peers share a machine's cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
