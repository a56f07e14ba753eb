"""How a tensor's values are written on the wire, and what each way costs in accuracy. The list is the allow-list.

fp32  CODEC_RAW over float32. 4 bytes a value. Exact, bit for bit, NaN payloads included.
bf16  CODEC_BF16 over float32. 2 bytes a value. Rounded to the nearest, ties to even, at 8 significant bits:
      |decoded - x| <= 2^-8 |x|  for 2^-126 <= |x| <= 3.38e38;  <= 2^-134 for smaller |x|;  larger |x| becomes infinite,
      which the receiver refuses. The exponent is float32's, so a gradient of 1e-7 is as exact as one of 1e5.
fp16  CODEC_FP16 over float32. 2 bytes a value and 4 for one float32 scale, a power of two, that brings the tensor's
      largest magnitude A to at most 65504 (`fp16_scaled`). Rounded to the nearest, ties to even, at 11 significant
      bits:  |decoded - x| <= max(2^-11 |x|, 2^-39 A, 2^-151).  A tensor of 1e-7 is as exact as one of 1e5; in one
      tensor, whatever is below 2^-28 of the largest loses digits, and what is 2^-40 of it is lost.
int8  CODEC_INT8 over float32. 1 byte a value and 2 for each bf16 scale, of 256 consecutive values of a row or fewer
      (`int8_blocks`). With A the largest magnitude of those, up to 3.37e38:
      |decoded - x| <= max(A/252, 2^-127) rounded to the nearest;  < max(A/126, 2^-126) and zero in the mean rounded at
      random, which is for gradients: there the nearest would lose for good whatever is small beside its neighbours.
int32 CODEC_RAW over int32. 4 bytes a value. Exact. Row indices and lengths only.

A scale from the network is not believed: one that is NaN or infinite makes values that are, which the receiver of a
tensor refuses; any other makes values that a sender might have sent anyway.

Bytes are little-endian, rows in order. Runs in whichever thread owns the tensor; never on the event loop.
"""

import math
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from peer import fp16_scaled, int8_blocks
from peer.dither import Dither
from peer.manifest import WireCodec
from peer.staging import to_device, to_host
from protos import swarm_pb2 as pb

assert sys.byteorder == "little", "tensors travel as they lie in memory, little-endian"

Buffer = bytearray | memoryview
CPU = torch.device("cpu")


class DType(IntEnum):
    """What a tensor is at both ends of the wire."""

    FLOAT32 = pb.DTYPE_FLOAT32
    INT32 = pb.DTYPE_INT32


class Codec(IntEnum):
    """What its values are in between."""

    RAW = pb.CODEC_RAW
    BF16 = pb.CODEC_BF16
    FP16 = pb.CODEC_FP16
    INT8 = pb.CODEC_INT8

    @classmethod
    def named(cls, name: WireCodec) -> "Codec":
        """The codec of this name in a run manifest."""
        return {"fp32": cls.RAW, "bf16": cls.BF16, "fp16": cls.FP16, "int8": cls.INT8}[name]


def is_allowed(dtype: DType, codec: Codec) -> bool:
    """Does this codec carry this kind of value?"""
    return (dtype, codec) in _FORMATS


def size_bytes(dtype: DType, codec: Codec, shape: Sequence[int]) -> int:
    """Exactly what such a tensor takes. Python integers: no shape overflows."""
    return _FORMATS[dtype, codec].size_bytes(shape)


def pack(tensor: Tensor, dtype: DType, codec: Codec, *, dither_seed: int | None = None) -> memoryview:
    """The values as bytes. Raises TypeError when the tensor is not of this kind.

    A contiguous CPU tensor in its own form (fp32, int32) is not copied: the view keeps it alive, and nobody may write
    to it until the bytes are sent. The others are written once, on the tensor's own device, and only then cross to the
    CPU. `dither_seed` makes int8 round at random; nothing else does.
    """
    if tensor.dtype != _INSIDE[dtype]:
        raise TypeError(f"expected a tensor of {_INSIDE[dtype]}, got {tensor.dtype}")
    dither = Dither(dither_seed, tensor.device) if dither_seed is not None and codec is Codec.INT8 else None
    return to_host(_FORMATS[dtype, codec].pack(tensor.detach().contiguous(), dither)).numpy().data


def unpack(data: Buffer, dtype: DType, codec: Codec, shape: Sequence[int], *, device: torch.device = CPU) -> Tensor:
    """A tensor of these bytes, whose length the caller has checked against `size_bytes`, widened on `device`.

    On the CPU fp32 and int32 are not copied: the tensor lives in `data`, which must be writable and is the tensor's
    from now on. The others are read once.
    """
    return _FORMATS[dtype, codec].unpack(to_device(torch.frombuffer(data, dtype=torch.uint8), device), tuple(shape))


class _Format(Protocol):
    """Contiguous tensors to bytes (uint8, one-dimensional) on the same device, and back."""

    def size_bytes(self, shape: Sequence[int]) -> int: ...

    def pack(self, tensor: Tensor, dither: Dither | None) -> Tensor: ...

    def unpack(self, data: Tensor, shape: tuple[int, ...]) -> Tensor: ...


class _Plain:
    """Each value by itself."""

    def __init__(self, inside: torch.dtype, on_wire: torch.dtype) -> None:
        self._inside = inside
        self._on_wire = on_wire

    def size_bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self._on_wire.itemsize

    def pack(self, tensor: Tensor, dither: Dither | None) -> Tensor:
        return tensor.to(self._on_wire).view(-1).view(torch.uint8)

    def unpack(self, data: Tensor, shape: tuple[int, ...]) -> Tensor:
        return data.view(self._on_wire).view(shape).to(self._inside)


class _Fp16:
    def size_bytes(self, shape: Sequence[int]) -> int:
        return fp16_scaled.size_bytes(shape)

    def pack(self, tensor: Tensor, dither: Dither | None) -> Tensor:
        return fp16_scaled.narrow(tensor)

    def unpack(self, data: Tensor, shape: tuple[int, ...]) -> Tensor:
        return fp16_scaled.widen(data, shape)


class _Int8:
    def size_bytes(self, shape: Sequence[int]) -> int:
        num_rows, dim = shape
        return int8_blocks.size_bytes(num_rows, dim)

    def pack(self, tensor: Tensor, dither: Dither | None) -> Tensor:
        return int8_blocks.quantize(tensor, dither)

    def unpack(self, data: Tensor, shape: tuple[int, ...]) -> Tensor:
        num_rows, dim = shape
        return int8_blocks.dequantize(data, num_rows, dim)


_INSIDE = {DType.FLOAT32: torch.float32, DType.INT32: torch.int32}
_FORMATS: dict[tuple[DType, Codec], _Format] = {
    (DType.FLOAT32, Codec.RAW): _Plain(torch.float32, torch.float32),
    (DType.FLOAT32, Codec.BF16): _Plain(torch.float32, torch.bfloat16),
    (DType.FLOAT32, Codec.FP16): _Fp16(),
    (DType.FLOAT32, Codec.INT8): _Int8(),
    (DType.INT32, Codec.RAW): _Plain(torch.int32, torch.int32),
}
