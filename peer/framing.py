"""Frames as they travel: serialised messages, and tensors' bytes cut into chunks. Knows neither calls nor torch.

A chunk frame is the same in both directions: the tag of field 2, a length, the bytes. It is written and read by hand,
because protobuf would copy every chunk twice at either end; any other protobuf encoding of a frame is understood too.

A byte of a tensor is copied four times on its way, encryption aside: out of the tensor into a frame, by gRPC into a
slice of its own (its Python API takes whole messages), by gRPC out of what came into a message, and into the receiver's
buffer, which grows with the bytes that come, because what was announced may never come. The tensor lives in that
buffer. A trainer copies outputs once more, to where their pairs are.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError

from peer.errors import MalformedMessage
from peer.tensors import TensorSpec, WireTensor
from peer.transport import CHUNK_BYTES, Frame
from peer.wire_codecs import Buffer
from protos import swarm_pb2 as pb

F = TypeVar("F", pb.CallFrame, pb.ReplyFrame)

_CHUNK_TAG = pb.CallFrame.CHUNK_FIELD_NUMBER << 3 | 2  # length-delimited
assert pb.CallFrame.CHUNK_FIELD_NUMBER == pb.ReplyFrame.CHUNK_FIELD_NUMBER
_MAX_LENGTH_DIGITS = 5


def cut_into_chunks(buffers: Iterable[Buffer]) -> Iterator[Frame]:
    """The buffers' bytes in order, `CHUNK_BYTES` a frame: small tensors share one, and with it a frame's cost.

    Copies each byte once, when it is the turn of its frame.
    """
    pending: list[memoryview] = []
    pending_bytes = 0
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            part = view[: CHUNK_BYTES - pending_bytes]
            view = view[len(part) :]
            pending.append(part)
            pending_bytes += len(part)
            if pending_bytes == CHUNK_BYTES:
                yield chunk_frame(pending)
                pending, pending_bytes = [], 0
    if pending:
        yield chunk_frame(pending)


def chunk_frame(parts: Sequence[Buffer | bytes]) -> Frame:
    """One frame of these bytes, in one copy."""
    return b"".join((_tag_and_length(sum(map(len, parts))), *parts))


def parse_frame(frame: Frame, schema: type[F]) -> F | memoryview:
    """A chunk's bytes, not copied, or any other frame's message. Raises MalformedMessage."""
    chunk = _chunk_of(frame)
    if chunk is not None:
        return chunk
    try:
        message = schema.FromString(frame)
    except DecodeError:
        raise MalformedMessage("a frame does not decode") from None
    return memoryview(message.chunk) if message.WhichOneof("frame") == "chunk" else message


def _tag_and_length(length: int) -> bytes:
    digits = [_CHUNK_TAG]
    while length >= 0x80:
        digits.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*digits, length])


def _chunk_of(frame: Frame) -> memoryview | None:
    """The bytes of a frame that is one chunk and nothing else."""
    if not frame or frame[0] != _CHUNK_TAG:
        return None
    length = 0
    for at, digit in enumerate(frame[1 : 1 + _MAX_LENGTH_DIGITS]):
        length |= (digit & 0x7F) << 7 * at
        if digit < 0x80:
            start = at + 2
            return memoryview(frame)[start:] if start + length == len(frame) else None
    return None


class TensorAssembler:
    """Fills announced tensors from chunks. Memory follows the bytes that came, not those that were announced."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self._buffers = [bytearray() for _ in specs]
        self._at = 0

    @property
    def is_complete(self) -> bool:
        return self._at == len(self._specs)

    def feed(self, chunk: memoryview) -> None:
        """Raises MalformedMessage for an empty chunk or a byte too many."""
        if not chunk:
            raise MalformedMessage("an empty chunk")
        rest = chunk
        while rest:
            if self.is_complete:
                raise MalformedMessage("more bytes than the header announced")
            buffer, wanted_bytes = self._buffers[self._at], self._specs[self._at].size_bytes
            part = rest[: wanted_bytes - len(buffer)]
            buffer += part
            rest = rest[len(part) :]
            if len(buffer) == wanted_bytes:
                self._at += 1

    def tensors(self) -> list[WireTensor]:
        """Raises MalformedMessage unless every byte came."""
        if not self.is_complete:
            came_bytes = sum(map(len, self._buffers))
            announced_bytes = sum(spec.size_bytes for spec in self._specs)
            raise MalformedMessage(f"the stream ended after {came_bytes} of {announced_bytes} bytes")
        return [WireTensor(spec, buffer) for spec, buffer in zip(self._specs, self._buffers, strict=True)]
