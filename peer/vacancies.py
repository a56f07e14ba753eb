"""Which experts a peer with room may take, and when. A rule: told what is covered, told the time.

An expert that was served and is not any more gets a grace, in which only a peer that holds its snapshot takes it: its
host may be back in seconds with all it has learnt, and a fresh one would have learnt nothing.
"""

from collections.abc import Collection, Iterable

from experts.uid import ExpertUid

GRACE_S = 20.0
"""A record's lifetime and a restart: so long the one with the snapshot has the first word."""


class Vacancies:
    """Remembers since when each expert has been without a host."""

    def __init__(self, uids: Iterable[ExpertUid]) -> None:
        self._uids = tuple(uids)
        self._was_covered: set[ExpertUid] = set()
        self._vacant_since_s: dict[ExpertUid, float] = {}

    def observe(self, covered: Collection[ExpertUid], *, now_s: float) -> None:
        """Take note of which experts somebody claims now."""
        for uid in self._uids:
            if uid in covered:
                self._was_covered.add(uid)
                self._vacant_since_s.pop(uid, None)
            else:
                self._vacant_since_s.setdefault(uid, now_s)

    def open(self, saved: Collection[ExpertUid], *, now_s: float) -> tuple[list[ExpertUid], list[ExpertUid]]:
        """Vacant experts to take now: those whose state we have, and others never served or past their grace."""
        vacant = [uid for uid in self._uids if uid in self._vacant_since_s]
        ours = [uid for uid in vacant if uid in saved]
        others = [uid for uid in vacant if uid not in saved and self._is_free(uid, now_s)]
        return ours, others

    def _is_free(self, uid: ExpertUid, now_s: float) -> bool:
        return uid not in self._was_covered or now_s - self._vacant_since_s[uid] >= GRACE_S
