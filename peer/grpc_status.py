"""gRPC's words for ours, and the settings both ends of a connection share.

A refusal travels as a status, for tools that read statuses, and in words of its own in the metadata, because gRPC makes
some of the same statuses itself: a status without them was not said by a peer's servicer. They travel first as well as
last, because grpc.aio forgets the status of a call that ends while its caller is still writing (grpc/grpc#36066), and a
call too large for a peer always does.
"""

import asyncio
import os
from contextlib import suppress
from typing import Any

# We fork nothing; without this every fork of a library prints that gRPC skips its fork handlers. Read at import.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# What the C core has to say about connections is in the errors; its own lines on stderr are no log of ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
from grpc import StatusCode

from peer.errors import DeadlineExceeded, MalformedReply, PeerUnreachable, RemoteError
from peer.refusals import ERROR_OF_REFUSAL
from peer.transport import CHUNK_BYTES, CallRefused, PeerId, Refusal
from protos.swarm_pb2 import DESCRIPTOR

SERVICE = DESCRIPTOR.services_by_name["Expert"].full_name
_REFUSAL_KEY = "swarmoe-refusal"
_SENTENCE_KEY = "swarmoe-refusal-sentence-bin"
_FORGOTTEN_STATUS_S = 0.2

STATUS_OF_REFUSAL: dict[Refusal, StatusCode] = {
    Refusal.INVALID: StatusCode.INVALID_ARGUMENT,
    Refusal.WRONG_RUN: StatusCode.FAILED_PRECONDITION,
    Refusal.UNAUTHENTICATED: StatusCode.UNAUTHENTICATED,
    Refusal.OVERLOADED: StatusCode.RESOURCE_EXHAUSTED,
    Refusal.TOO_LARGE: StatusCode.OUT_OF_RANGE,
}

ERROR_OF_STATUS: dict[StatusCode, type[RemoteError]] = {
    StatusCode.UNAVAILABLE: PeerUnreachable,
    StatusCode.CANCELLED: PeerUnreachable,  # the server cut it while closing
    StatusCode.INTERNAL: PeerUnreachable,  # its bug, or broken inside a frame: a replica may do better
    StatusCode.UNKNOWN: PeerUnreachable,
    StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    StatusCode.RESOURCE_EXHAUSTED: MalformedReply,  # a frame beyond what we accept
    # What follows no peer of ours says without a refusal's name: something else listens there.
    StatusCode.UNIMPLEMENTED: MalformedReply,
    StatusCode.INVALID_ARGUMENT: MalformedReply,
    StatusCode.NOT_FOUND: MalformedReply,
    StatusCode.ALREADY_EXISTS: MalformedReply,
    StatusCode.PERMISSION_DENIED: MalformedReply,
    StatusCode.UNAUTHENTICATED: MalformedReply,
    StatusCode.FAILED_PRECONDITION: MalformedReply,
    StatusCode.ABORTED: MalformedReply,
    StatusCode.OUT_OF_RANGE: MalformedReply,
    StatusCode.DATA_LOSS: MalformedReply,
}

_PING_TIMEOUT_MS = 2000
"""A frozen peer is noticed within this. keepalive_timeout alone does not do it in grpcio 1.85: measured."""

SHARED_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 4 * CHUNK_BYTES),
    ("grpc.max_send_message_length", 4 * CHUNK_BYTES),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
]


def words_of(refusal: CallRefused) -> tuple[tuple[str, str | bytes], ...]:
    """A refusal as metadata."""
    return (_REFUSAL_KEY, refusal.refusal.value), (_SENTENCE_KEY, str(refusal).encode())


async def error_of(error: grpc.aio.AioRpcError, call: Any, *, peer_id: PeerId, method: str) -> RemoteError:
    """The one translation of what gRPC raises at a caller. `call` is the call it was raised by."""
    refusal = _refusal_in(error.trailing_metadata())
    if refusal is None and error.code() is StatusCode.INTERNAL:
        with suppress(TimeoutError):
            async with asyncio.timeout(_FORGOTTEN_STATUS_S):
                refusal = _refusal_in(await call.initial_metadata())
    if refusal is not None:
        return ERROR_OF_REFUSAL[refusal.refusal](str(refusal), peer_id=peer_id, method=method)
    return ERROR_OF_STATUS[error.code()](error.details() or error.code().name.lower(), peer_id=peer_id, method=method)


def _refusal_in(metadata: Any) -> CallRefused | None:
    words = dict(metadata or ())
    name, sentence = words.get(_REFUSAL_KEY), words.get(_SENTENCE_KEY, b"")
    return CallRefused(Refusal(name), sentence.decode(errors="replace")) if name in list(Refusal) else None
