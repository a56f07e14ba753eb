"""Which experts a joiner claims and who keeps a double claim."""

import random
from collections.abc import Sequence

import pytest

from experts.uid import ExpertUid
from peer.claims import Claim, choose, settle
from peer.transport import PeerId

UIDS = [ExpertUid(layer, index) for layer in range(2) for index in range(8)]


class Covered:
    """Claims by uid, as a directory snapshot has them."""

    def __init__(self, claims: dict[ExpertUid, list[Claim]] | None = None) -> None:
        self._claims = claims or {}

    def claims(self, uid: ExpertUid) -> Sequence[Claim]:
        return self._claims.get(uid, [])


def claim(peer: str, at_unix_s: float = 100.0) -> Claim:
    return Claim(at_unix_s, PeerId(peer))


def test_a_joiner_takes_experts_nobody_serves() -> None:
    covered = Covered({uid: [claim("a")] for uid in UIDS[:12]})

    chosen = choose(covered, None, 8, UIDS, random.Random(0))

    assert sorted(chosen) == UIDS[12:]


def test_a_joiner_of_a_covered_swarm_claims_nothing() -> None:
    covered = Covered({uid: [claim("a")] for uid in UIDS})

    assert choose(covered, None, 8, UIDS, random.Random(0)) == []


def test_with_replicas_the_least_covered_come_first() -> None:
    covered = Covered({uid: [claim("a"), claim("b")][: index % 3] for index, uid in enumerate(UIDS)})

    chosen = choose(covered, None, 9, UIDS, random.Random(0), wanted_replicas=2)

    assert sorted(chosen[:6]) == UIDS[0::3]
    assert set(chosen[6:]) < set(UIDS[1::3])


def test_capacity_bounds_what_is_claimed() -> None:
    assert len(choose(Covered(), None, 3, UIDS, random.Random(0))) == 3
    assert choose(Covered(), None, 0, UIDS, random.Random(0)) == []
    assert choose(Covered(), UIDS, 2, UIDS, random.Random(0)) == UIDS[:2]


def test_joiners_of_one_moment_spread() -> None:
    chosen = [frozenset(choose(Covered(), None, 4, UIDS, random.Random(seed))) for seed in range(4)]

    assert len(frozenset().union(*chosen)) >= 10


def test_one_seed_chooses_one_way() -> None:
    assert choose(Covered(), None, 4, UIDS, random.Random(3)) == choose(Covered(), None, 4, UIDS, random.Random(3))


def test_wanted_experts_are_claimed_in_their_order_whoever_serves_them() -> None:
    covered = Covered({UIDS[5]: [claim("a")]})

    assert choose(covered, [UIDS[5], UIDS[1], UIDS[5]], 8, UIDS, random.Random(0)) == [UIDS[5], UIDS[1]]


@pytest.mark.parametrize(
    ("ours", "theirs", "we_keep"),
    [
        (claim("b", 100.0), claim("a", 100.5), True),
        (claim("b", 100.5), claim("a", 100.0), False),
        (claim("a", 100.0), claim("b", 100.0), True),
        (claim("b", 100.0), claim("a", 100.0), False),
    ],
)
def test_the_lowest_claim_time_then_peer_id_keeps_a_double_claim(ours: Claim, theirs: Claim, we_keep: bool) -> None:
    covered = Covered({UIDS[0]: [ours, theirs]})

    dropped = settle({UIDS[0]: ours}, covered)

    assert [drop.uid for drop in dropped] == ([] if we_keep else [UIDS[0]])


def test_both_sides_of_a_double_claim_come_to_the_same_end() -> None:
    claims = [claim(peer, at) for peer, at in [("c", 5.0), ("a", 5.0), ("b", 4.0), ("d", 9.0)]]
    covered = Covered({UIDS[0]: claims})

    kept = [own.peer_id for own in claims if not settle({UIDS[0]: own}, covered)]
    kept_of_two = [own.peer_id for own in claims if not settle({UIDS[0]: own}, covered, wanted_replicas=2)]

    assert kept == ["b"]
    assert sorted(kept_of_two) == ["a", "b"]


def test_our_own_announced_claim_is_nobody_elses() -> None:
    ours = claim("a", 100.0)
    covered = Covered({UIDS[0]: [claim("a", 90.0)]})  # an older record of ours, from before a restart

    assert settle({UIDS[0]: ours}, covered) == []


def test_a_dropped_expert_says_who_was_first() -> None:
    covered = Covered({UIDS[0]: [claim("aaaaaaaaaaaa", 97.5)]})

    (dropped,) = settle({UIDS[0]: claim("b", 100.0)}, covered)

    assert dropped.reason == "aaaaaaaa claimed 0.0 2.5 s before us"
