"""Exactly once: which backwards have been applied, and what was answered.

A backward takes an optimiser step, so a repeat must not run again. Within `lifetime_s` (and a byte cap) it gets the
same answer; after that it is told `already applied`, without gradients. Ids are remembered far longer than any
deadline allows a repeat to live.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from peer.kept_inputs import CallKey

T = TypeVar("T")

MAX_IDS = 1 << 20


@dataclass
class _Applied(Generic[T]):
    reply: T | None
    size_bytes: int
    expires_s: float


class AppliedBackwards(Generic[T]):
    """The applied set. Replies leave it by age and by bytes; ids only when there are very many newer ones."""

    def __init__(self, *, max_reply_bytes: int, lifetime_s: float, max_ids: int = MAX_IDS) -> None:
        self._max_reply_bytes = max_reply_bytes
        self._lifetime_s = lifetime_s
        self._max_ids = max_ids
        self._applied: OrderedDict[CallKey, _Applied[T]] = OrderedDict()
        self._with_reply: OrderedDict[CallKey, None] = OrderedDict()
        self._reply_bytes = 0

    @property
    def reply_bytes(self) -> int:
        return self._reply_bytes

    def was_applied(self, key: CallKey) -> bool:
        return key in self._applied

    def reply(self, key: CallKey, *, now_s: float) -> T | None:
        """The kept answer to a repeat; None when it was never applied or its answer is gone."""
        self._expire(now_s)
        applied = self._applied.get(key)
        return applied.reply if applied is not None else None

    def record(self, key: CallKey, reply: T, *, size_bytes: int, now_s: float) -> None:
        """Note an applied backward and its answer. A second record of one key is a bug."""
        if key in self._applied:
            raise ValueError("a backward was applied twice")
        self._applied[key] = _Applied(reply, size_bytes, now_s + self._lifetime_s)
        self._with_reply[key] = None
        self._reply_bytes += size_bytes
        self._expire(now_s)
        while self._reply_bytes > self._max_reply_bytes:
            self._drop_reply(next(iter(self._with_reply)))
        while len(self._applied) > self._max_ids:
            self._drop_reply(next(iter(self._applied)))
            self._applied.popitem(last=False)

    def _expire(self, now_s: float) -> None:
        while self._with_reply and self._applied[key := next(iter(self._with_reply))].expires_s <= now_s:
            self._drop_reply(key)

    def _drop_reply(self, key: CallKey) -> None:
        applied = self._applied[key]
        if applied.reply is not None:
            applied.reply = None
            self._reply_bytes -= applied.size_bytes
        self._with_reply.pop(key, None)
