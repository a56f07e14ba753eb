"""Peers that failed us and have not been heard of since. A rule: told of failures and of records, asked who is absent.

A peer that dies stays in the directory until its record expires. Whoever could not reach it need not ask it again in
every step till then: it is believed gone until it signs a newer record than the one it had when it failed.
"""

import threading

from peer.snapshot import DirectorySnapshot, Replica
from peer.transport import PeerId


class Absences:
    """May be told and asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_expiry_unix_s: dict[PeerId, float] = {}

    def failed(self, peer_id: PeerId, snapshot: DirectorySnapshot) -> None:
        """It did not answer, and this is what the directory knew of it."""
        with self._lock:
            self._last_expiry_unix_s[peer_id] = snapshot.expiries.get(peer_id, 0.0)

    def is_absent(self, replica: Replica, snapshot: DirectorySnapshot) -> bool:
        """Has it been silent since it failed us?"""
        peer_id = replica.endpoint.peer_id
        with self._lock:
            expiry_unix_s = self._last_expiry_unix_s.get(peer_id)
            if expiry_unix_s is None:
                return False
            if snapshot.expiries.get(peer_id, 0.0) > expiry_unix_s:
                del self._last_expiry_unix_s[peer_id]
                return False
            return True
