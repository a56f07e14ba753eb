"""Which device hosts the experts, and how many of them fit on it."""

import os
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

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


def free_memory_bytes(device: torch.device) -> int:
    """What the device could still give, shared fairly among this machine's peers by nobody but the operating system."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Capacity:
    """How many experts this peer takes, and the sentence for its operator."""

    max_experts: int
    reason: str


def capacity(*, asked: int | None, free_bytes: int, bytes_per_expert: int) -> Capacity:
    """An asked-for number is kept if it fits; otherwise as many as fit in half of the free memory, up to MAX_EXPERTS.

    Raises ValueError, with the numbers, when more was asked for than the free memory or a peer's record holds.
    """
    fits = max(0, free_bytes // bytes_per_expert)
    each = f"{bytes_per_expert / 2**20:.1f} MiB each with optimiser state"
    if asked is not None:
        if asked > fits:
            raise ValueError(f"--max-experts {asked} needs more memory than is free: {fits} fit ({each})")
        if asked > MAX_EXPERTS:
            raise ValueError(f"--max-experts {asked} is more than one peer announces, {MAX_EXPERTS}; start more peers")
        return Capacity(asked, f"at most {asked} experts, as asked with --max-experts ({each})")
    room = int(fits * _EXPERT_SHARE)
    if room > MAX_EXPERTS:
        return Capacity(MAX_EXPERTS, f"{MAX_EXPERTS} experts, the most one peer announces ({each}); see --max-experts")
    return Capacity(room, f"room for {room} experts in half of the free memory ({each}); see --max-experts")


def limit_compute_threads() -> None:
    """One compute thread per process unless OMP_NUM_THREADS says otherwise: several peers share a machine's cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
