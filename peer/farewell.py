"""A member's last record, its tombstone: everybody forgets it at once instead of when what it said expires.

A courtesy, so never waited for long: when a whole swarm leaves together, the DHT spends seconds on nodes that are gone.
"""

import asyncio
import time

import structlog

from peer.records import RECORD_LIFETIME_S, RENEW_EVERY_S, PeerRecord, RecordStore, TrainerRecord

log = structlog.get_logger(__name__)

_SAY_WITHIN_S = 1.0
_LIFETIME_S = RECORD_LIFETIME_S + RENEW_EVERY_S
"""Longer than what it replaces: the DHT keeps the record that expires last."""


async def say_goodbye(store: RecordStore, record: PeerRecord | TrainerRecord) -> None:
    """Returns within `_SAY_WITHIN_S`, heard or not."""
    try:
        async with asyncio.timeout(_SAY_WITHIN_S):
            await store.put(record, lifetime_s=_LIFETIME_S, now_unix_s=time.time())
    except TimeoutError:
        log.info("goodbye.unheard", after_s=_SAY_WITHIN_S, consequence="others forget us when our record expires")
