"""What can go wrong between members, one class per reaction.

SwarmError
|-- RemoteError             another peer failed us; carries peer_id and method
|   |-- PeerUnreachable     no connection, or it broke    -> try a replica; suspect the peer
|   |-- DeadlineExceeded    no answer in time             -> try a replica; suspect the peer
|   |-- PeerOverloaded      it answered "not now"         -> try a replica; keep the peer
|   |-- MalformedReply      it broke the protocol         -> try a replica; ban the peer
|   |-- RequestRejected     it says we broke it           -> do not retry: our bug
|   `-- NotAuthorised       it does not know us           -> do not retry; exit 8
|-- TooFewExperts           a step lost too many experts  -> skip the step
|-- MalformedMessage        bytes that do not decode      -> refuse them
|-- ManifestMismatch        another run, or its version   -> exit 7, naming the field
|-- CouldNotListen          the address is taken          -> exit 3
|-- CouldNotJoin            nobody there let us in        -> exit 4
|   `-- WrongKey            somebody else answers there   -> exit 8
|-- RecordsUnavailable      our own DHT node is down    -> go on with what is known, ask again
|-- FolderInUse             another daemon has the folder -> exit 3
|-- BadConfiguration        a value, name or file given   -> exit 2, naming it
|-- CheckpointUnusable      missing, torn or another run's -> exit 5
`-- TrainingGaveUp          too little answers, too long  -> exit 6
"""


class SwarmError(Exception):
    """Base of everything this project raises on purpose."""


class RemoteError(SwarmError):
    """Another peer failed us."""

    def __init__(self, message: str, *, peer_id: str, method: str) -> None:
        super().__init__(message)
        self.peer_id = peer_id
        self.method = method

    def __str__(self) -> str:
        return f"{self.method} at {self.peer_id[:8]}: {super().__str__()}"


class PeerUnreachable(RemoteError):
    """No connection, or it broke."""


class DeadlineExceeded(RemoteError):
    """No answer in time."""


class PeerOverloaded(RemoteError):
    """It answered "not now"."""


class MalformedReply(RemoteError):
    """It broke the protocol."""


class RequestRejected(RemoteError):
    """It says we broke the protocol: our bug."""


class NotAuthorised(RemoteError):
    """It refuses our identity."""


class TooFewExperts(SwarmError):
    """A step lost too many experts."""


class MalformedMessage(SwarmError):
    """Bytes that do not decode into what they announce."""


class ManifestMismatch(SwarmError):
    """The swarm trains another run, or speaks another version."""


class CouldNotListen(SwarmError):
    """The address cannot be bound."""


class CouldNotJoin(SwarmError):
    """Nobody at the given addresses let us in."""


class WrongKey(CouldNotJoin):
    """Whoever answers there has another key than the one given."""


class RecordsUnavailable(SwarmError):
    """Our own way into the DHT is down or slow."""


class FolderInUse(SwarmError):
    """Another daemon holds the state folder."""


class BadConfiguration(SwarmError):
    """A value, name or file the user gave cannot be used; the message says which, and from where."""


class CheckpointUnusable(SwarmError):
    """A checkpoint that is missing, torn or of another run."""


class TrainingGaveUp(SwarmError):
    """The swarm answered too little for too long."""
