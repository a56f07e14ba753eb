"""Tensors' bytes, cut into chunks of one size and put together again. Knows neither messages nor torch."""

from collections.abc import Iterable, Iterator, Sequence

from peer.errors import MalformedMessage
from peer.tensors import TensorSpec, WireTensor
from peer.transport import CHUNK_BYTES
from peer.wire_codecs import Buffer


def cut_into_chunks(buffers: Iterable[Buffer]) -> Iterator[bytes]:
    """The buffers' bytes in order, `CHUNK_BYTES` at a time: small tensors share a chunk, and with it a frame's cost."""
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
                yield b"".join(pending)
                pending, pending_bytes = [], 0
    if pending:
        yield b"".join(pending)


class TensorAssembler:
    """Fills announced tensors from chunks. Memory follows the bytes that came, not those that were announced."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self._buffers = [bytearray() for _ in specs]
        self._at = 0

    @property
    def is_complete(self) -> bool:
        return self._at == len(self._specs)

    def feed(self, chunk: bytes) -> None:
        """Raises MalformedMessage for an empty chunk or a byte too many."""
        if not chunk:
            raise MalformedMessage("an empty chunk")
        rest = memoryview(chunk)
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
