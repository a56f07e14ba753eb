"""The seam between members: Info, streams of frames, deadlines. Knows neither experts nor torch, nor what a frame says.

Two implementations pass one contract suite: `grpc_transport` and `memory_transport`.
"""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, Protocol

from protos.swarm_pb2 import InfoReply, InfoRequest

PeerId = NewType("PeerId", str)
"""An Ed25519 public key in lower-case base32 without padding: 52 characters."""

Frame = bytes
"""One message of a stream: a CallFrame or a ReplyFrame, serialised."""

CHUNK_BYTES = 1 << 20
"""Measured: chunks of 1 MiB carry 3 to 5 times what one 16 MB unary message does."""


class Method(StrEnum):
    """The streamed methods of the expert service."""

    FORWARD = "Forward"
    BACKWARD = "Backward"
    PROBE = "Probe"


@dataclass(frozen=True)
class Endpoint:
    """Where a peer can be dialled and how to know it is the one. Comes from its signed record."""

    peer_id: PeerId
    address: str
    """HOST:PORT"""
    certificate_der: bytes
    """The only certificate trusted for this peer."""


@dataclass(frozen=True)
class CallContext:
    """What the receiving side knows about a call besides its frames."""

    caller: PeerId
    """Proven, not claimed."""
    deadline_s: float
    """On the receiver's event-loop clock."""


class Refusal(StrEnum):
    """Why a receiver refuses a whole call; each maps to one status on the wire and one error at the caller."""

    INVALID = "invalid"  # the caller broke the protocol     -> RequestRejected
    WRONG_RUN = "wrong_run"  # it trains something else      -> RequestRejected
    UNAUTHENTICATED = "unauthenticated"  # no or bad identity -> NotAuthorised
    OVERLOADED = "overloaded"  # not now                     -> PeerOverloaded
    TOO_LARGE = "too_large"  # announces more than is allowed -> RequestRejected


class CallRefused(Exception):
    """Raised by a servicer to refuse a call; the transport turns it into a status with this sentence."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


class Servicer(Protocol):
    """What answers calls. Runs on the event loop; must not block it."""

    async def info(self, request: InfoRequest) -> InfoReply: ...

    def forward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]: ...

    def backward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]: ...

    def probe(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]: ...


class Server(Protocol):
    """A listening servicer."""

    @property
    def address(self) -> str:
        """HOST:PORT actually bound."""
        ...

    async def close(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s`, then cut them. Idempotent."""
        ...


class Transport(Protocol):
    """Dials and listens. Belongs to one event loop."""

    @property
    def certificate_der(self) -> bytes:
        """What its servers present: with peer id and address, their `Endpoint`."""
        ...

    async def info(self, address: str, request: InfoRequest, *, timeout_s: float) -> tuple[InfoReply, bytes]:
        """Ask whoever listens at HOST:PORT who they are; returns the reply and their certificate (DER).

        Proves nothing by itself: `bootstrap.verify_info` checks the signature over nonce and certificate.
        Raises PeerUnreachable, DeadlineExceeded, MalformedReply.
        """
        ...

    def call(
        self, endpoint: Endpoint, method: Method, frames: AsyncIterable[Frame], *, timeout_s: float
    ) -> AsyncGenerator[Frame]:
        """Send `frames`, yield the reply's frames as they come. Ends by `timeout_s`, whatever the peer does.

        Raises a RemoteError; a reply that stops early simply stops (the reader misses its CallEnd).
        Closing the generator (`aclosing`) cancels the call.
        """
        ...

    async def serve(self, servicer: Servicer, listen: str) -> Server:
        """Listen on HOST:PORT (port 0: any). Raises CouldNotListen."""
        ...

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        ...
