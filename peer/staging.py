"""Bytes between this process and a device: through one pinned buffer a direction, on a stream of their own.

From pageable memory CUDA copies in small pieces and holds up the calling thread; from pinned memory it copies at the
bus's speed, and on a stream of its own while the device computes on another. Each direction costs one more copy in
main memory. Where the device is the CPU nothing is copied and nothing is here to do.
"""

import threading
from functools import cache

import torch
from torch import Tensor


def to_device(data: Tensor, device: torch.device) -> Tensor:
    """(size,) uint8 on the CPU, on the device: ready for whatever its current stream does next. Any thread."""
    return _staging(device).to_device(data) if device.type == "cuda" else data.to(device)


def to_host(data: Tensor) -> Tensor:
    """(size,) uint8 on a device, on the CPU. Blocks for what the current stream computes of it. Any thread."""
    return _staging(data.device).to_host(data) if data.device.type == "cuda" else data.cpu()


class _CudaStaging:
    """One device's buffers. They grow to the largest call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._up = _Buffer()
        self._down = _Buffer()

    def to_device(self, data: Tensor) -> Tensor:
        size_bytes = data.numel()
        with self._up.lock, torch.cuda.device(self._device):
            computing = torch.cuda.current_stream()
            pinned = self._up.of(size_bytes)
            pinned.copy_(data)
            with torch.cuda.stream(self._stream):  # allocated here too, so that it waits for no computation
                out = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
                out.copy_(pinned, non_blocking=True)
                self._up.used.record()
            computing.wait_event(self._up.used)
            out.record_stream(computing)
            return out

    def to_host(self, data: Tensor) -> Tensor:
        with self._down.lock, torch.cuda.device(self._device):
            pinned = self._down.of(data.numel())
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                pinned.copy_(data, non_blocking=True)
                self._down.used.record()
            data.record_stream(self._stream)
            self._down.used.synchronize()
            return pinned.clone()


class _Buffer:
    """Pinned memory, and when the device has last used it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.used = torch.cuda.Event()
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def of(self, size_bytes: int) -> Tensor:
        """So much of it, free to be written."""
        self.used.synchronize()
        if self._pinned.numel() < size_bytes:
            self._pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[:size_bytes]


@cache
def _staging(device: torch.device) -> _CudaStaging:
    return _CudaStaging(device)
