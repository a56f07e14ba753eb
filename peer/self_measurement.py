"""What a peer finds out about itself at its start: how fast its link is, and what that makes of its device.

Never keeps a peer from starting: what cannot be measured is said not to be.
"""

import asyncio
import random

import structlog

from peer.chi import chi_of, link_in_words, verdict
from peer.errors import RemoteError
from peer.manifest import RunManifest
from peer.membership import Membership
from peer.probing import MEASURE_WITHIN_S, measure_link
from peer.rates import MeasuredLink, Rates
from peer.remedies import experts_in_words, remedies
from peer.transport import Endpoint

log = structlog.get_logger(__name__)

_GIVE_UP_AFTER_S = 2.5


async def measured_link(member: Membership, rng: random.Random) -> MeasuredLink | None:
    """To some peer that is online, or when that fails to whoever introduced us; none when neither answers in time."""
    end_s = asyncio.get_running_loop().time() + _GIVE_UP_AFTER_S
    reason = ""
    for endpoint in _worth_asking(member, rng):
        left_s = end_s - asyncio.get_running_loop().time()
        try:
            link = await measure_link(member.transport, endpoint, timeout_s=min(MEASURE_WITHIN_S, left_s))
        except RemoteError as error:
            reason = str(error)
            continue
        log.info("link.measured", link=link_in_words(link), to=endpoint.peer_id[:8])
        return link
    log.warning("link.not_measured", reason=reason, consequence="nobody is told how busy this device can be")
    return None


def tell_chi(manifest: RunManifest, rates: Rates) -> None:
    """Say to this peer's owner how busy the link lets the device be and, when that is little, what would help."""
    chi = chi_of(rates, manifest.wire, dim=manifest.expert.dim)
    if chi is None or rates.link is None or rates.device is None:
        return
    said = verdict(chi, rates.link, rates.device, experts=experts_in_words(manifest.expert))
    if not chi.is_low:
        log.info("peer.chi", chi=round(chi.value, 3), verdict=said)
        return
    log.warning("peer.chi", chi=round(chi.value, 4), verdict=said, what_would_help="; ".join(remedies(manifest, chi)))


def _worth_asking(member: Membership, rng: random.Random) -> list[Endpoint]:
    own_id, introducer = member.identity.peer_id, member.introduction.endpoint()
    online = [
        record.endpoint()
        for peer_id, record in sorted(member.directory.snapshot().peers.items())
        if record.state == "online" and peer_id not in (own_id, introducer.peer_id)
    ]
    return [*rng.sample(online, min(1, len(online))), introducer]
