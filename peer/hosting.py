"""Who hosts which expert: every line of every record as one row of sorted columns. Pure, immutable, any thread.

Rows are sorted by expert, then as claims are settled, so an expert's rows lie together and its primary comes first: a
question about a whole layer is a few vector operations, whatever its size. What is not about hosting (versions,
loads, latencies) stays in the records.

Shape suffixes here: R rows, E experts of a layer, P peers in order of their ids.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from experts.uid import ExpertUid
from peer.claims import Claim
from peer.records import PeerRecord, PeerState
from peer.transport import PeerId

_CLAIMING: frozenset[PeerState] = frozenset({"joining", "syncing", "online"})
"""A draining peer's experts are free to claim: it will not be back for them."""
_INDEX_BITS = 20
"""An expert's index has up to six digits."""


@dataclass(frozen=True, eq=False)
class PeerLines:
    """What one record says about hosting. Its rows are not sorted; an expert listed twice counts as its last line."""

    takes_calls: bool
    claims: bool
    key_R: NDArray[np.int64]
    line_R: NDArray[np.int32]
    """Position in the record."""
    claimed_at_unix_s_R: NDArray[np.float64]
    share_R: NDArray[np.float32]
    bias_R: NDArray[np.float32]

    @classmethod
    def of(cls, record: PeerRecord) -> Self:
        """Read a record's lines."""
        position_by_key = {_key(ExpertUid.parse(line.uid)): position for position, line in enumerate(record.experts)}
        lines = [record.experts[position] for position in position_by_key.values()]
        return cls(
            takes_calls=record.state == "online" and not {"paused", "quarantined"} & set(record.flags),
            claims=record.state in _CLAIMING,
            key_R=np.array(list(position_by_key), np.int64),
            line_R=np.array(list(position_by_key.values()), np.int32),
            claimed_at_unix_s_R=np.array([line.claimed_at_unix_s for line in lines], np.float64),
            share_R=np.array([line.share for line in lines], np.float32),
            bias_R=np.array([line.bias for line in lines], np.float32),
        )


def says_the_same(record: PeerRecord, other: PeerRecord) -> bool:
    """Would both read as the same `PeerLines`? Cheap: most renewals change only versions and loads."""
    if (record.state, record.flags, len(record.experts)) != (other.state, other.flags, len(other.experts)):
        return False
    return all(
        (a.uid, a.claimed_at_unix_s, a.share, a.bias) == (b.uid, b.claimed_at_unix_s, b.share, b.bias)
        for a, b in zip(record.experts, other.experts, strict=True)
    )


@dataclass(frozen=True, eq=False)
class LayerHosts:
    """Who would be called for each expert of a layer; slot i is expert i."""

    peer_ids: tuple[PeerId, ...]
    host_E: NDArray[np.int32]
    """Position in `peer_ids`; -1 where there is nobody to call."""
    is_served_E: NDArray[np.bool_]
    share_E: NDArray[np.float32]
    bias_E: NDArray[np.float32]

    def host(self, slot: int) -> PeerId | None:
        """Whom to call for this expert."""
        position = int(self.host_E[slot])
        return self.peer_ids[position] if position >= 0 else None


_MAX_KNOWN_LAYERS = 256
"""Answers kept: a step asks the same of every layer several times, until somebody says something new."""


class Hosting:
    """The lines of all peers."""

    def __init__(self, lines: Mapping[PeerId, PeerLines]) -> None:
        self.lines = lines
        self._known_layers: dict[tuple[int, int, frozenset[PeerId]], LayerHosts] = {}
        self.peer_ids = tuple(sorted(peer_id for peer_id, one in lines.items() if one.takes_calls or one.claims))
        parts = [lines[peer_id] for peer_id in self.peer_ids]
        lengths = [len(part.key_R) for part in parts]
        peer_R = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
        key_R = _joined([part.key_R for part in parts], np.int64)
        claimed_R = _joined([part.claimed_at_unix_s_R for part in parts], np.float64)
        order_R = np.lexsort((peer_R, claimed_R, key_R))
        self._key_R = key_R[order_R]
        self._peer_R = peer_R[order_R]
        self._claimed_at_unix_s_R = claimed_R[order_R]
        self._line_R = _joined([part.line_R for part in parts], np.int32)[order_R]
        self._share_R = _joined([part.share_R for part in parts], np.float32)[order_R]
        self._bias_R = _joined([part.bias_R for part in parts], np.float32)[order_R]
        self._takes_calls_R = np.repeat(np.array([part.takes_calls for part in parts], np.bool_), lengths)[order_R]
        self._claims_R = np.repeat(np.array([part.claims for part in parts], np.bool_), lengths)[order_R]

    def callable_lines(self, uid: ExpertUid) -> list[tuple[PeerId, int]]:
        """The peers that take calls for an expert, the primary first, and where in their records it stands."""
        return [
            (self.peer_ids[self._peer_R[row]], int(self._line_R[row]))
            for row in self._rows(uid)
            if self._takes_calls_R[row]
        ]

    def claims(self, uid: ExpertUid) -> tuple[Claim, ...]:
        """Who means to serve an expert, earliest first."""
        return tuple(
            Claim(float(self._claimed_at_unix_s_R[row]), self.peer_ids[self._peer_R[row]])
            for row in self._rows(uid)
            if self._claims_R[row]
        )

    def unserved(self, uids: Iterable[ExpertUid]) -> list[ExpertUid]:
        """Those for which nobody takes calls."""
        served = set(self._key_R[self._takes_calls_R].tolist())
        return [uid for uid in uids if _key(uid) not in served]

    def claimed(self, uids: Iterable[ExpertUid], *, besides: PeerId) -> set[ExpertUid]:
        """Those that somebody else than this peer means to serve."""
        is_own_P = np.array([peer_id == besides for peer_id in self.peer_ids], np.bool_)
        claimed = set(self._key_R[self._claims_R & ~is_own_P[self._peer_R]].tolist())
        return {uid for uid in uids if _key(uid) in claimed}

    def layer(self, layer: int, num_experts: int, *, without: Collection[PeerId] = ()) -> LayerHosts:
        """The first of each expert's hosts that takes calls and is not among those to do `without`."""
        asked = layer, num_experts, frozenset(without)
        if (known := self._known_layers.get(asked)) is not None:
            return known
        if len(self._known_layers) >= _MAX_KNOWN_LAYERS:
            self._known_layers.clear()
        return self._known_layers.setdefault(asked, self._look_up(*asked))

    def _look_up(self, layer: int, num_experts: int, without: frozenset[PeerId]) -> LayerHosts:
        first, last = np.searchsorted(self._key_R, [layer << _INDEX_BITS, (layer << _INDEX_BITS) + num_experts])
        is_present_R = self._takes_calls_R[first:last]
        if without:
            is_left_out_P = np.array([peer_id in without for peer_id in self.peer_ids], np.bool_)
            is_present_R = is_present_R & ~is_left_out_P[self._peer_R[first:last]]
        row_R = first + np.flatnonzero(is_present_R)
        key_R = self._key_R[row_R]
        row_R = row_R[np.flatnonzero(np.diff(key_R, prepend=-1))]
        slot_R = self._key_R[row_R] - (layer << _INDEX_BITS)
        host_E = _spread(self._peer_R[row_R], slot_R, num_experts, fill=-1)
        return LayerHosts(
            self.peer_ids,
            host_E,
            is_served_E=host_E >= 0,
            share_E=_spread(self._share_R[row_R], slot_R, num_experts),
            bias_E=_spread(self._bias_R[row_R], slot_R, num_experts),
        )

    def _rows(self, uid: ExpertUid) -> range:
        return self._rows_by_key.get(_key(uid), range(0))

    @cached_property
    def _rows_by_key(self) -> dict[int, range]:
        starts_U = np.flatnonzero(np.diff(self._key_R, prepend=-1))
        bounds = pairwise([*starts_U.tolist(), len(self._key_R)])
        return dict(zip(self._key_R[starts_U].tolist(), (range(*bound) for bound in bounds), strict=True))


def _key(uid: ExpertUid) -> int:
    return uid.layer << _INDEX_BITS | uid.index


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _spread(value_R: NDArray[Any], slot_R: NDArray[np.int64], num_experts: int, *, fill: int = 0) -> NDArray[Any]:
    spread_E = np.full(num_experts, fill, value_R.dtype)
    spread_E[slot_R] = value_R
    return spread_E
