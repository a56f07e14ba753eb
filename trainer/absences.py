"""Peers that failed us and have not been heard of since. A rule: told of failures and of records, asked who is absent.

A peer that dies stays in the directory until its record expires. Whoever could not reach it need not ask it again in
every step till then: it is believed gone until it signs a newer record than the one it had when it failed.
"""

import threading

from peer.snapshot import DirectorySnapshot
from peer.transport import PeerId

_NOBODY: frozenset[PeerId] = frozenset()


class Absences:
    """May be told and asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_expiry_unix_s: dict[PeerId, float] = {}

    def failed(self, peer_id: PeerId, snapshot: DirectorySnapshot) -> None:
        """It did not answer, and this is what the directory knew of it."""
        with self._lock:
            self._last_expiry_unix_s[peer_id] = snapshot.expiries.get(peer_id, 0.0)

    def absent(self, snapshot: DirectorySnapshot) -> frozenset[PeerId]:
        """Those that have been silent since they failed us. Whoever has spoken since is forgiven for good."""
        with self._lock:
            if not self._last_expiry_unix_s:
                return _NOBODY
            self._last_expiry_unix_s = {
                peer_id: expiry_unix_s
                for peer_id, expiry_unix_s in self._last_expiry_unix_s.items()
                if snapshot.expiries.get(peer_id, 0.0) <= expiry_unix_s
            }
            return frozenset(self._last_expiry_unix_s)
