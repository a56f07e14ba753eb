"""gRPC's words for ours, and the settings both ends of a connection share.

A refusal travels as a status, for tools that read statuses, and by its own name in the trailing metadata, because gRPC
makes some of the same statuses itself: a status without a name was not said by a peer's servicer.
"""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

# We fork nothing; without this every fork of a library prints that gRPC skips its fork handlers. Read at import.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# What the C core has to say about connections is in the errors; its own lines on stderr are no log of ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# The Python API cannot ask for TLS 1.3 alone. This list is TLS 1.2's only, and our certificates, being ECDSA, cannot
# serve its one suite: 1.3 is what remains.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"

import grpc as grpc  # whoever takes it from here gets it with these settings
from grpc import StatusCode

from peer.errors import DeadlineExceeded, MalformedReply, PeerUnreachable, RemoteError
from peer.refusals import ERROR_OF_REFUSAL
from peer.transport import CHUNK_BYTES, CallRefused, PeerId, Refusal
from protos.swarm_pb2 import DESCRIPTOR

T = TypeVar("T")

SERVICE = DESCRIPTOR.services_by_name["Expert"].full_name
_REFUSAL_KEY = "swarmoe-refusal"
_FORGOTTEN = "Internal error from Core"
"""What grpc.aio makes of a status that it forgets."""
_LATE_STATUS_DELAYS_S = (0, 0.001, 0.01, 0.1, 0.3)
"""When to look for the real one, of which grpc.aio tells nobody when it comes second."""

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


def name_of(refusal: CallRefused) -> tuple[tuple[str, str], ...]:
    """A refusal's trailing metadata."""
    return ((_REFUSAL_KEY, refusal.refusal.value),)


class StatusWitness:
    """Remembers how a call ended and translates it: the one translation of what gRPC raises at a caller.

    grpc.aio forgets: when a call ends while its caller is still writing, the failed write puts an INTERNAL of its own
    in the place of the status that came or is about to come (grpc/grpc#36066). A call that is refused for its size
    always ends like that. So this looks at every status at the moment it is set.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._ending: tuple[StatusCode, str, Any] | None = None
        call.add_done_callback(self._look)

    async def error(self, *, peer_id: PeerId, method: str) -> RemoteError | None:
        """What to raise now that the call has failed; None when it has not, and only our last words went unheard."""
        for delay_s in _LATE_STATUS_DELAYS_S:
            if self._ending is not None:
                break
            await asyncio.sleep(delay_s)
            self._look(self._call)
        code, details, metadata = self._ending or (StatusCode.UNAVAILABLE, "the connection broke", None)
        if code is StatusCode.OK:
            return None
        name = dict(metadata or ()).get(_REFUSAL_KEY)
        kind = ERROR_OF_REFUSAL[Refusal(name)] if name in list(Refusal) else ERROR_OF_STATUS[code]
        return kind(details or code.name.lower(), peer_id=peer_id, method=method)

    def _look(self, call: Any) -> None:
        ending = _at_once(call.code()), _at_once(call.details()), _at_once(call.trailing_metadata())
        if ending[:2] != (StatusCode.INTERNAL, _FORGOTTEN):
            self._ending = ending


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for, as a finished call's have not."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a finished call made us wait")
