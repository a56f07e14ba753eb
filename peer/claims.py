"""Which experts a joiner claims, and who keeps one that two have claimed. Pure: reads coverage, returns decisions.

The DHT has no compare-and-swap: two joiners are both told yes. Each looks again after one refresh and applies the same
rule: the lowest (claim time, peer id) keep it, as many as there should be replicas.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from experts.uid import ExpertUid
from peer.transport import PeerId


class Claim(NamedTuple):
    """Compares as claims are settled: earliest first, ties by peer id."""

    claimed_at_unix_s: float
    peer_id: PeerId


class Coverage(Protocol):
    """What claims need of a directory snapshot."""

    def claims(self, uid: ExpertUid) -> Sequence[Claim]:
        """Of every member that means to serve this expert, the draining ones not among them."""
        ...


class Shuffler(Protocol):
    """A seeded `random.Random`."""

    def shuffle(self, x: list[Any]) -> None: ...


@dataclass(frozen=True)
class Dropped:
    """An expert to give up, and the sentence for the log."""

    uid: ExpertUid
    reason: str


def choose(
    coverage: Coverage,
    wanted: Sequence[ExpertUid] | None,
    capacity: int,
    all_uids: Iterable[ExpertUid],
    rng: Shuffler,
    *,
    wanted_replicas: int = 1,
) -> list[ExpertUid]:
    """What to claim, at most `capacity`: the wanted ones in their order, or the least covered of those that lack hosts.

    Ties are broken by `rng`, so that joiners of one moment spread. Wanted experts are claimed even where others serve
    them; `settle` decides.
    """
    if wanted is not None:
        return list(dict.fromkeys(wanted))[:capacity]
    hosts = {uid: len(coverage.claims(uid)) for uid in all_uids}
    lacking = [uid for uid in hosts if hosts[uid] < wanted_replicas]
    rng.shuffle(lacking)
    return sorted(lacking, key=hosts.__getitem__)[:capacity]


def settle(own: Mapping[ExpertUid, Claim], coverage: Coverage, *, wanted_replicas: int = 1) -> list[Dropped]:
    """Which of our claims to drop, in order: those that `wanted_replicas` others made before us."""
    dropped: list[Dropped] = []
    for uid, claim in sorted(own.items()):
        earlier = sorted(other for other in coverage.claims(uid) if other.peer_id != claim.peer_id and other < claim)
        if len(earlier) >= wanted_replicas:
            first = earlier[0]
            ahead_s = claim.claimed_at_unix_s - first.claimed_at_unix_s
            dropped.append(Dropped(uid, f"{first.peer_id[:8]} claimed {uid} {ahead_s:.1f} s before us"))
    return dropped
