"""A record store over any board of bytes: seals what we say, opens what others said. `HivemindStore` and `MemoryStore`
are this over two boards.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Protocol, TypeVar, cast

import structlog

from experts.uid import RunId
from peer.envelope import MAX_LIFETIME_S, Rejection, kind_of, open_envelope, seal
from peer.errors import RecordsUnavailable
from peer.identity import Identity
from peer.records import AnyRecord, Kind, PeerRecord, RunRecord, Signed, TrainerRecord
from peer.transport import PeerId

log = structlog.get_logger()

R = TypeVar("R", bound=AnyRecord)

_OPENED_AT_ONCE = 8
"""Then the loop's other work has its turn: a signature and a long record take half a millisecond."""


class Board(Protocol):
    """Where envelopes lie: many per kind, one per subkey, the later expiry wins. Both raise RecordsUnavailable."""

    async def store(self, kind: Kind, subkey: str, value: bytes, expires_at_unix_s: float) -> bool: ...

    async def get(self, kind: Kind) -> list[tuple[str, bytes, float]]: ...


class SealedStore:
    """One member's view of a board. Belongs to one event loop."""

    def __init__(self, identity: Identity, run_id: RunId, board: Board) -> None:
        self._identity = identity
        self._run_id = run_id
        self._board = board
        self._opened: dict[Kind, dict[bytes, Signed]] = {}
        self.rejected: Counter[Rejection] = Counter()
        """What others said and we did not believe, by reason; each reading counts again."""

    async def put(self, record: AnyRecord, *, lifetime_s: float, now_unix_s: float) -> bool:
        """ValueError when the record is too large or would live longer than its kind may."""
        kind = kind_of(record)
        if not 0 < lifetime_s <= MAX_LIFETIME_S[kind]:
            raise ValueError(f"a {kind} record lives up to {MAX_LIFETIME_S[kind]:g} s, not {lifetime_s:g} s")
        expires_at_unix_s = now_unix_s + lifetime_s
        data = seal(self._identity, record, run_id=self._run_id, expires_at_unix_s=expires_at_unix_s)
        try:
            stored = await self._board.store(kind, self._identity.peer_id, data, expires_at_unix_s)
        except RecordsUnavailable as error:
            log.warning("record.not_stored", kind=kind, reason=str(error))
            return False
        if not stored:
            log.warning("record.refused", kind=kind, expires_at_unix_s=expires_at_unix_s)
        return stored

    async def read(self, kind: Kind, *, now_unix_s: float) -> dict[PeerId, Signed]:
        entries = await self._board.get(kind)
        known = self._opened.get(kind, {})
        opened: dict[bytes, Signed] = {}  # as many as the board holds now, however many there were
        believed: dict[PeerId, Signed] = {}
        num_new = 0
        for subkey, value, _ in entries:
            signed = known.get(value)
            if signed is None:
                num_new += 1
                if num_new % _OPENED_AT_ONCE == 0:
                    await asyncio.sleep(0)
                signed = open_envelope(value, kind=kind, subkey=subkey, run_id=self._run_id, now_unix_s=now_unix_s)
            if isinstance(signed, Rejection):
                self._reject(signed, kind, subkey)
            elif signed.peer_id != subkey:
                self._reject(Rejection.OTHER_AUTHOR, kind, subkey)
            elif signed.expires_at_unix_s <= now_unix_s:
                self._reject(Rejection.EXPIRED, kind, subkey)
            else:
                opened[value] = believed[signed.peer_id] = signed
        self._opened[kind] = opened
        return believed

    async def peers(self, *, now_unix_s: float) -> dict[PeerId, PeerRecord]:
        return _records(await self.read("peer", now_unix_s=now_unix_s), PeerRecord)

    async def trainers(self, *, now_unix_s: float) -> dict[PeerId, TrainerRecord]:
        return _records(await self.read("trainer", now_unix_s=now_unix_s), TrainerRecord)

    async def run(self, *, now_unix_s: float) -> RunRecord | None:
        """What the run's owner published; nobody else's passes."""
        return next(iter(_records(await self.read("run", now_unix_s=now_unix_s), RunRecord).values()), None)

    def _reject(self, rejection: Rejection, kind: Kind, subkey: str) -> None:
        self.rejected[rejection] += 1
        log.debug("record.rejected", kind=kind, reason=rejection.value, subkey=subkey[:8])


def _records(signed: Mapping[PeerId, Signed], model: type[R]) -> dict[PeerId, R]:
    assert all(type(one.record) is model for one in signed.values()), "a kind holds one model"
    return {peer_id: cast("R", one.record) for peer_id, one in signed.items()}
