"""What a caller is told when it is refused: one table for every transport."""

from peer.errors import NotAuthorised, PeerOverloaded, RemoteError, RequestRejected
from peer.transport import Refusal

ERROR_OF_REFUSAL: dict[Refusal, type[RemoteError]] = {
    Refusal.INVALID: RequestRejected,
    Refusal.WRONG_RUN: RequestRejected,
    Refusal.UNAUTHENTICATED: NotAuthorised,
    Refusal.OVERLOADED: PeerOverloaded,
    Refusal.TOO_LARGE: RequestRejected,
}
