"""How a tensor's values are written on the wire, and what each way costs in accuracy. The list is the allow-list.

fp32  CODEC_RAW over float32. 4 bytes a value. Exact, bit for bit, NaN payloads included.
bf16  CODEC_BF16 over float32. 2 bytes a value. Rounded to the nearest, ties to even, at 8 significant bits:
      |decoded - x| <= 2^-8 |x|  for 2^-126 <= |x| <= 3.38e38;  <= 2^-134 for smaller |x|;  larger |x| becomes infinite,
      which the receiver refuses. The exponent is float32's, so a gradient of 1e-7 is as exact as one of 1e5.
int32 CODEC_RAW over int32. 4 bytes a value. Exact. Row indices only.

Bytes are little-endian, rows in order. Runs in whichever thread owns the tensor; never on the event loop.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from peer.manifest import WireCodec
from protos import swarm_pb2 as pb

assert sys.byteorder == "little", "tensors travel as they lie in memory, little-endian"

Buffer = bytearray | memoryview


class DType(IntEnum):
    """What a tensor is at both ends of the wire."""

    FLOAT32 = pb.DTYPE_FLOAT32
    INT32 = pb.DTYPE_INT32


class Codec(IntEnum):
    """What its values are in between."""

    RAW = pb.CODEC_RAW
    BF16 = pb.CODEC_BF16

    @classmethod
    def named(cls, name: WireCodec) -> "Codec":
        """The codec of this name in a run manifest."""
        return {"fp32": cls.RAW, "bf16": cls.BF16}[name]


@dataclass(frozen=True)
class _Format:
    inside: torch.dtype
    on_wire: torch.dtype


_FORMATS = {
    (DType.FLOAT32, Codec.RAW): _Format(torch.float32, torch.float32),
    (DType.FLOAT32, Codec.BF16): _Format(torch.float32, torch.bfloat16),
    (DType.INT32, Codec.RAW): _Format(torch.int32, torch.int32),
}


def is_allowed(dtype: DType, codec: Codec) -> bool:
    """Does this codec carry this kind of value?"""
    return (dtype, codec) in _FORMATS


def size_bytes(dtype: DType, codec: Codec, shape: Sequence[int]) -> int:
    """Exactly what such a tensor takes. Python integers: no shape overflows."""
    return math.prod(shape) * _FORMATS[dtype, codec].on_wire.itemsize


def pack(tensor: Tensor, dtype: DType, codec: Codec) -> memoryview:
    """The values as bytes. Raises TypeError when the tensor is not of this kind.

    A contiguous CPU tensor in its own form (fp32, int32) is not copied: the view keeps it alive, and nobody may write
    to it until the bytes are sent. bf16 copies once, into half the size, on the tensor's own device.
    """
    form = _FORMATS[dtype, codec]
    if tensor.dtype != form.inside:
        raise TypeError(f"expected a tensor of {form.inside}, got {tensor.dtype}")
    on_wire = tensor.detach().to(form.on_wire).to("cpu").contiguous()
    return on_wire.view(-1).view(torch.uint8).numpy().data


def unpack(data: Buffer, dtype: DType, codec: Codec, shape: Sequence[int]) -> Tensor:
    """A CPU tensor of these bytes, whose length the caller has checked against `size_bytes`.

    fp32 and int32 are not copied: the tensor lives in `data`, which must be writable and is the tensor's from now on.
    bf16 is copied once, by widening.
    """
    form = _FORMATS[dtype, codec]
    return torch.frombuffer(data, dtype=form.on_wire).view(tuple(shape)).to(form.inside)
