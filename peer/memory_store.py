"""The record store without a network: members of one process share a board, which misbehaves when a script says so.

Keeps the DHT's rules (the later expiry wins, no delete) and none of its checks: a hostile member writes what it likes.
"""

from collections import Counter

from experts.uid import RunId
from peer.errors import RecordsUnavailable
from peer.identity import Identity
from peer.records import Kind
from peer.sealed_store import SealedStore

Place = tuple[Kind, str]
Held = tuple[bytes, float]


class MemoryBoard:
    """What all members have stored; `held_back` what only its writers see yet."""

    def __init__(self) -> None:
        self.held: dict[Place, Held] = {}
        self.held_back: dict[Place, Held] = {}
        self.is_slow = False
        """Stores stay with their writers until `spread`, as records do that have not reached the right nodes."""
        self.stores_to_lose: Counter[str] = Counter()
        """By subkey: so many of the next stores are told yes and are gone."""
        self.reads_to_fail = 0
        """So many of the next reads raise RecordsUnavailable."""

    def spread(self) -> None:
        """What was held back reaches everybody."""
        for place, (value, expires_at_unix_s) in self.held_back.items():
            self.write(*place, value, expires_at_unix_s)
        self.held_back.clear()

    def write(self, kind: Kind, subkey: str, value: bytes, expires_at_unix_s: float) -> bool:
        """Store for all to see, whoever asks; False when what is held expires as late."""
        return _write(self.held, (kind, subkey), (value, expires_at_unix_s))


class MemoryStore(SealedStore):
    """A `RecordStore` for one of the members around a board."""

    def __init__(self, identity: Identity, run_id: RunId, board: MemoryBoard) -> None:
        super().__init__(identity, run_id, _Seat(board, identity))
        self._identity = identity

    def addresses(self) -> list[str]:
        return [f"/memory/{self._identity.peer_id}"]

    async def close(self) -> None:
        """Nothing to leave."""


class _Seat:
    """The board as one member sees it."""

    def __init__(self, board: MemoryBoard, identity: Identity) -> None:
        self._board = board
        self._peer_id = identity.peer_id

    async def store(self, kind: Kind, subkey: str, value: bytes, expires_at_unix_s: float) -> bool:
        board = self._board
        place: Place = (kind, subkey)
        if board.stores_to_lose[subkey] > 0:
            board.stores_to_lose[subkey] -= 1
            return True
        if not board.is_slow:
            return board.write(kind, subkey, value, expires_at_unix_s)
        if place in board.held and board.held[place][1] >= expires_at_unix_s:
            return False
        return _write(board.held_back, place, (value, expires_at_unix_s))

    async def get(self, kind: Kind) -> list[tuple[str, bytes, float]]:
        if self._board.reads_to_fail > 0:
            self._board.reads_to_fail -= 1
            raise RecordsUnavailable("the script says so")
        own = {place: held for place, held in self._board.held_back.items() if place[1] == self._peer_id}
        seen = self._board.held | own
        return [(subkey, *held) for (held_kind, subkey), held in seen.items() if held_kind == kind]


def _write(table: dict[Place, Held], place: Place, held: Held) -> bool:
    if place in table and table[place][1] >= held[1]:
        return False
    table[place] = held
    return True
