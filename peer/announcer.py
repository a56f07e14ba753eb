"""Keeps a peer's place in the swarm: claims experts, settles double claims, and says so in its record.

Runs on the event loop. What to claim and what to drop are `claims`' and `vacancies`' rules; this is the shell.
"""

import asyncio
import base64
import random
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import structlog

from experts.bank import ExpertState
from experts.uid import ExpertUid
from peer.claims import Claim, choose, settle
from peer.directory import Directory
from peer.expert_host import ExpertHost
from peer.farewell import say_goodbye
from peer.rates import Rates
from peer.records import RECORD_LIFETIME_S, RENEW_EVERY_S, HostedExpert, PeerRecord, PeerState, RecordStore
from peer.snapshot import DirectorySnapshot
from peer.transport import Endpoint, PeerId
from peer.vacancies import Vacancies

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 1.5
_SEEN_WITHIN_S = RECORD_LIFETIME_S
_ATTEMPTS = 5


@dataclass(frozen=True)
class Place:
    """Who this peer is to others, and what it may take."""

    endpoint: Endpoint
    device: str
    software_version: str
    uids: tuple[ExpertUid, ...]
    """Those it may host: the ones asked for, or all of the run."""
    is_pinned: bool
    """They were asked for by name, so that others' claims do not keep us from claiming."""
    max_experts: int
    rates: Rates = field(default_factory=Rates)
    """What was measured of it at its start."""


class Announcer:
    """One per peer."""

    def __init__(
        self,
        place: Place,
        *,
        host: ExpertHost,
        store: RecordStore,
        directory: Directory,
        saved: Mapping[ExpertUid, ExpertState],
        rng: random.Random,
    ) -> None:
        self._place = place
        self._host = host
        self._store = store
        self._directory = directory
        self._saved = dict(saved)
        """States of experts we do not serve: from the disk at first, later of those we gave up."""
        self._rng = rng
        self._claims: dict[ExpertUid, Claim] = {}
        self._vacancies = Vacancies(place.uids)
        self.state: PeerState = "joining"

    @property
    def claimed(self) -> tuple[ExpertUid, ...]:
        return tuple(self._claims)

    @property
    def saved(self) -> Mapping[ExpertUid, ExpertState]:
        """What experts that we do not serve had learnt when we last knew. A view that stays up to date."""
        return MappingProxyType(self._saved)

    @property
    def rates(self) -> Rates:
        """What was measured of this peer, the device by its latest calls."""
        return self._place.rates.refined(self._host.trips_per_s)

    async def take_place(self) -> None:
        """Claim, host, look again, and go online with what is ours. Returns when the record that says so is out."""
        others = self._others(self._directory.snapshot())
        if self._place.is_pinned:
            await self._claim(choose(others, self._place.uids, self._place.max_experts, self._place.uids, self._rng))
        await self._fill(others, now_s=time.monotonic())
        self.state = "syncing"
        seen = await self._publish_until_seen()
        if seen is None:
            log.warning("record.not_seen", hint="the DHT is slow or cut off; going on, and announcing again")
        else:
            await self._settle(self._others(seen))
        self.state = "online"
        await self.publish()

    async def run(self) -> None:
        """Look and tidy often, announce every RENEW_EVERY_S or when something changed; until cancelled."""
        next_renewal_s = time.monotonic() + RENEW_EVERY_S
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            has_changed = await self.look(now_s=time.monotonic())
            if has_changed or time.monotonic() >= next_renewal_s:
                await self.publish()
                next_renewal_s = time.monotonic() + RENEW_EVERY_S

    async def look(self, *, now_s: float) -> bool:
        """Give up what others claimed before us, take what is vacant; True when that changed what we serve."""
        others = self._others(self._directory.snapshot())
        return await self._settle(others) | await self._fill(others, now_s=now_s)

    async def withdraw(self) -> None:
        self.state = "offline"
        await say_goodbye(self._store, self._record(()))

    async def publish(self) -> None:
        """Say where we are and what we serve. A refused or failed put is said by the store and tried again later."""
        experts = tuple(
            HostedExpert(
                uid=str(status.uid),
                version=status.version,
                claimed_at_unix_s=self._claims[status.uid].claimed_at_unix_s,
                rows_served=status.rows_served,
            )
            for status in self._host.statuses
            if status.uid in self._claims
        )
        await self._store.put(self._record(experts), lifetime_s=RECORD_LIFETIME_S, now_unix_s=time.time())

    async def _publish_until_seen(self) -> DirectorySnapshot | None:
        """Again and again: a DHT may lose what it took, or still hold our last goodbye, which expires later."""
        for _ in range(_ATTEMPTS):
            await self.publish()
            seen = await self._directory.wait_until(self._sees_us, timeout_s=_SEEN_WITHIN_S / _ATTEMPTS)
            if seen is not None:
                return seen
        return None

    def _record(self, experts: tuple[HostedExpert, ...]) -> PeerRecord:
        return PeerRecord(
            peer_id=self._place.endpoint.peer_id,
            state=self.state,
            address=self._place.endpoint.address,
            certificate_der_b64=base64.b64encode(self._place.endpoint.certificate_der).decode(),
            experts=experts,
            device=self._place.device,
            queued_rows=self._host.queued_rows,
            rates=self.rates,
            throughput_tokens_per_s=self._host.take_throughput(),
            software_version=self._place.software_version,
        )

    def _sees_us(self, snapshot: DirectorySnapshot) -> bool:
        record = snapshot.peers.get(self._place.endpoint.peer_id)
        if record is None or record.state != self.state:
            return False  # nothing yet, or what we said in an earlier life
        seen = {line.uid: line.claimed_at_unix_s for line in record.experts}
        return seen == {str(uid): claim.claimed_at_unix_s for uid, claim in self._claims.items()}

    def _others(self, snapshot: DirectorySnapshot) -> "_OthersClaims":
        return _OthersClaims(snapshot, self._place.endpoint.peer_id)

    async def _fill(self, others: "_OthersClaims", *, now_s: float) -> bool:
        """Take vacant experts while there is room: first those whose state we have."""
        self._vacancies.observe(others.covered(self._place.uids) | self._claims.keys(), now_s=now_s)
        saved, free = self._vacancies.open(self._saved, now_s=now_s)
        room = self._place.max_experts - len(self._claims)
        taken = choose(others, None, room, saved, self._rng)
        taken += choose(others, None, room - len(taken), free, self._rng)
        await self._claim(taken)
        return bool(taken)

    async def _claim(self, uids: Collection[ExpertUid]) -> None:
        if not uids:
            return
        claim = Claim(time.time(), self._place.endpoint.peer_id)
        await self._host.host(tuple(uids), self._saved)
        self._claims |= dict.fromkeys(uids, claim)
        for uid in uids:
            self._saved.pop(uid, None)

    async def _settle(self, others: "_OthersClaims") -> bool:
        """Give up what somebody claimed before us, and remember what it had learnt: they may be gone soon."""
        dropped = settle(self._claims, others)
        for drop in dropped:
            log.info("expert.dropped", uid=str(drop.uid), reason=drop.reason)
            del self._claims[drop.uid]
            self._saved[drop.uid] = await self._host.drop(drop.uid)
        return bool(dropped)


@dataclass(frozen=True)
class _OthersClaims:
    """A view without what we said ourselves, perhaps in an earlier life: no reason not to claim it again."""

    snapshot: DirectorySnapshot
    own_id: PeerId

    def covered(self, uids: Collection[ExpertUid]) -> set[ExpertUid]:
        return self.snapshot.claimed(uids, besides=self.own_id)

    def claims(self, uid: ExpertUid) -> list[Claim]:
        return [claim for claim in self.snapshot.claims(uid) if claim.peer_id != self.own_id]
