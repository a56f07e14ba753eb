"""A tensor on its way: what it announces, checked before a byte is allocated, and its bytes.

The only decoder of tensors from the network. Refuses to know calls and frames.

Copies of a tensor on its way to another process, besides those that gRPC and protobuf make of each chunk: fp32 two
(out of the tensor into a chunk, out of the chunk into the receiver's buffer), the others two more (narrowing,
widening). The buffer is what lets a peer check and count bytes on the event loop without torch.
"""

import hashlib
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import torch
from torch import Tensor

from experts.sequences import lengths_of_each
from peer import wire_codecs as codecs
from peer.errors import MalformedMessage
from peer.wire_codecs import Buffer, Codec, DType
from protos import swarm_pb2 as pb


class Role(IntEnum):
    """What a tensor is in its call. Fixes its kind of value and its rank."""

    ROWS = pb.ROLE_ROWS
    ROW_INDEX = pb.ROLE_ROW_INDEX
    GRADIENTS = pb.ROLE_GRADIENTS
    OUTPUTS = pb.ROLE_OUTPUTS
    ROW_GRADIENTS = pb.ROLE_ROW_GRADIENTS
    LENGTHS = pb.ROLE_LENGTHS

    @property
    def dtype(self) -> DType:
        return DType.INT32 if self in (Role.ROW_INDEX, Role.LENGTHS) else DType.FLOAT32

    @property
    def rank(self) -> int:
        return 1 if self.dtype is DType.INT32 else 2

    @property
    def is_gradient(self) -> bool:
        return self in (Role.GRADIENTS, Role.ROW_GRADIENTS)


class TensorTooLarge(MalformedMessage):
    """It announces more bytes than are allowed: refused as too large, not as malformed."""


@dataclass(frozen=True)
class TensorSpec:
    """A validated header: holding one is the proof that `size_bytes` is what `shape` takes and is within bounds."""

    role: Role
    codec: Codec
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def decoded_bytes(self) -> int:
        """Inside, as fp32 or int32: up to four times what travels."""
        return codecs.size_bytes(self.role.dtype, Codec.RAW, self.shape)


@dataclass(frozen=True)
class WireTensor:
    """A spec and exactly its bytes. Received ones own their bytes; sent ones may share them with a tensor."""

    spec: TensorSpec
    data: Buffer

    @property
    def num_rows(self) -> int:
        return self.spec.num_rows

    @property
    def size_bytes(self) -> int:
        return self.spec.size_bytes


def encode(tensor: Tensor, role: Role, codec: Codec, *, dither_seed: bytes | None = None) -> WireTensor:
    """Ready to send. Blocks while a device copies to the CPU. See `codecs.pack` for who owns the bytes.

    Gradients in int8 are rounded at random and need a `dither_seed` (ValueError): their call's id, say. The same seed
    and role round the same way. Everything else is rounded to the nearest.
    """
    if tensor.dim() != role.rank or not tensor.numel():
        raise ValueError(f"{role.name} has rank {role.rank} and at least one row, not the shape {tuple(tensor.shape)}")
    seed = None
    if role.is_gradient and codec is Codec.INT8:
        if dither_seed is None:
            raise ValueError(f"{role.name} in int8 need a dither_seed: they are rounded at random")
        seed = int.from_bytes(hashlib.blake2b(dither_seed, digest_size=7, person=role.name.encode()).digest())
    data = codecs.pack(tensor, role.dtype, codec, dither_seed=seed)
    return WireTensor(TensorSpec(role, codec, tuple(tensor.shape), data.nbytes), data)


def decode(wire: WireTensor, *, device: torch.device = codecs.CPU) -> Tensor:
    """The tensor, on `device`; its values are not checked. Shares the bytes where codec and device allow.

    The bytes cross to the device as they came and are widened there: see `codecs.unpack`.
    """
    return codecs.unpack(wire.data, wire.spec.role.dtype, wire.spec.codec, wire.spec.shape, device=device)


def all_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity. One pass and no mask of the tensor's size, except for values whose sum overflows."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def decode_row_index(wire: WireTensor, *, num_rows: int) -> Tensor:
    """(N,) int64: which of `num_rows` distinct rows each pair reads. Raises MalformedMessage for one outside them."""
    row_index_N = decode(wire).long()
    lowest, highest = (int(bound) for bound in torch.aminmax(row_index_N))
    if lowest < 0 or highest >= num_rows:
        raise MalformedMessage(f"ROW_INDEX reads row {lowest if lowest < 0 else highest} of {num_rows}")
    return row_index_N


def decode_lengths(wire: WireTensor, *, counts: Sequence[int], longest: int) -> tuple[int, ...]:
    """How experts' pairs, in order, fall into sequences. Raises MalformedMessage for lengths that cannot be."""
    lengths = tuple(decode(wire).tolist())
    if max(lengths) > longest:
        raise MalformedMessage(f"LENGTHS has a sequence of {max(lengths)}; this run's have at most {longest} tokens")
    try:
        lengths_of_each(counts, lengths)
    except ValueError as error:
        raise MalformedMessage(f"LENGTHS: {error}") from None
    return lengths


def header_of(spec: TensorSpec) -> pb.TensorHeader:
    """The spec as it travels."""
    return pb.TensorHeader(
        role=cast("pb.Role", spec.role),
        dtype=cast("pb.DType", spec.role.dtype),
        codec=cast("pb.Codec", spec.codec),
        shape=spec.shape,
        size_bytes=spec.size_bytes,
    )


def check_header(header: pb.TensorHeader, *, codecs_allowed: Container[Codec], max_bytes: int) -> TensorSpec:
    """What this header promises, if it may: known role and dtype, allowed codec, right rank, bounded and exact bytes.

    Allocates nothing. Raises TensorTooLarge or MalformedMessage with a sentence. Integers are always raw.
    """
    try:
        role, dtype, codec = Role(header.role), DType(header.dtype), Codec(header.codec)
    except ValueError as error:
        raise MalformedMessage(f"a tensor of unknown role, dtype or codec: {error}") from None
    shape = tuple(header.shape[: role.rank + 1])
    if dtype is not role.dtype or len(shape) != role.rank:
        raise MalformedMessage(
            f"{role.name} must be {role.dtype.name} of rank {role.rank}, not {dtype.name} of rank {len(header.shape)}"
        )
    if not codecs.is_allowed(dtype, codec) or (dtype is DType.FLOAT32 and codec not in codecs_allowed):
        raise MalformedMessage(f"{role.name} in codec {codec.name}, which this run does not allow")
    if min(shape) < 1:
        raise MalformedMessage(f"{role.name} has the shape {list(shape)}; every dimension must be positive")
    needed_bytes = codecs.size_bytes(dtype, codec, shape)
    if max(needed_bytes, header.size_bytes) > max_bytes:
        raise TensorTooLarge(
            f"{role.name} announces {max(needed_bytes, header.size_bytes)} bytes; at most {max_bytes} are allowed here"
        )
    if header.size_bytes != needed_bytes:
        raise MalformedMessage(
            f"{role.name} announces {header.size_bytes} bytes, but {list(shape)} in {codec.name} takes {needed_bytes}"
        )
    return TensorSpec(role, codec, shape, needed_bytes)
