"""Who hosts what, as columns: the same answers for one expert and for a layer, renewed only when they change."""

from random import Random

import pytest

from experts.uid import ExpertUid
from peer.records import HostedExpert, PeerFlag, PeerRecord, PeerState, Signed
from peer.snapshot import DirectorySnapshot, take_snapshot
from peer.transport import PeerId

ANNE, BETH, CARO = PeerId("anne"), PeerId("beth"), PeerId("caro")


def line(uid: str, *, claimed_at_unix_s: float = 10.0, version: int = 0, bias: float = 0.0) -> HostedExpert:
    return HostedExpert(uid=uid, version=version, claimed_at_unix_s=claimed_at_unix_s, bias=bias)


def record(
    peer_id: PeerId,
    *experts: HostedExpert,
    state: PeerState = "online",
    flags: tuple[PeerFlag, ...] = (),
    address: str = "127.0.0.1:1",
) -> PeerRecord:
    return PeerRecord(
        peer_id=peer_id, state=state, flags=flags, address=address, certificate_der_b64="", experts=experts
    )


def snapshot(*records: PeerRecord, before: DirectorySnapshot | None = None) -> DirectorySnapshot:
    signed = {one.peer_id: Signed(one.peer_id, one, expires_at_unix_s=15.0) for one in records}
    return take_snapshot(signed, {}, {}, now_unix_s=0.0, before=before or take_snapshot({}, {}, {}, now_unix_s=0.0))


def test_a_layer_shows_the_primary_of_each_expert() -> None:
    seen = snapshot(
        record(BETH, line("1.0", claimed_at_unix_s=20.0), line("1.2", bias=0.5), line("0.1")),
        record(ANNE, line("1.0", claimed_at_unix_s=30.0), line("1.3")),
    )

    layer = seen.layer(1, 5)

    assert [layer.host(slot) for slot in range(5)] == [BETH, None, BETH, ANNE, None]
    assert layer.is_served_E.tolist() == [True, False, True, True, False]
    assert layer.share_E.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert layer.bias_E.tolist() == [0.0, 0.0, 0.5, 0.0, 0.0]


def test_doing_without_a_peer_makes_the_next_one_the_host() -> None:
    seen = snapshot(record(ANNE, line("0.0", claimed_at_unix_s=1.0), line("0.1")), record(BETH, line("0.0", bias=2.0)))

    layer = seen.layer(0, 2, without={ANNE})

    assert [layer.host(0), layer.host(1)] == [BETH, None]
    assert layer.bias_E.tolist() == [2.0, 0.0]
    assert not seen.layer(0, 2, without={ANNE, BETH, CARO}).is_served_E.any()


@pytest.mark.parametrize(("state", "flags"), [("joining", ()), ("draining", ()), ("online", ("paused",))])
def test_who_takes_no_calls_hosts_nothing_in_a_layer(state: PeerState, flags: tuple[PeerFlag, ...]) -> None:
    seen = snapshot(record(ANNE, line("0.0"), state=state, flags=flags))

    assert not seen.layer(0, 1).is_served_E.any()


def test_a_layer_and_its_experts_one_by_one_agree() -> None:
    rng = Random(3)
    peer_ids = [PeerId(f"peer{i}") for i in range(8)]
    states: list[PeerState] = ["online", "online", "online", "draining", "syncing"]
    seen = snapshot(
        *(
            record(
                peer_id,
                *(line(f"{rng.randrange(2)}.{rng.randrange(6)}", claimed_at_unix_s=rng.randrange(3)) for _ in range(5)),
                state=rng.choice(states),
            )
            for peer_id in peer_ids
        )
    )

    for layer in range(3):
        hosts = seen.layer(layer, 6, without={peer_ids[0]})
        for slot in range(6):
            replicas = seen.replicas(ExpertUid(layer, slot))
            others = [replica for replica in replicas if replica.endpoint.peer_id != peer_ids[0]]
            assert hosts.host(slot) == (others[0].endpoint.peer_id if others else None)
            assert [replica.claim for replica in replicas] == sorted(replica.claim for replica in replicas)


def test_who_else_claims_is_asked_for_many_experts_at_once() -> None:
    uids = [ExpertUid(0, index) for index in range(4)]
    seen = snapshot(
        record(ANNE, line("0.0"), line("0.1")),
        record(BETH, line("0.1"), state="syncing"),
        record(CARO, line("0.2"), state="draining"),
    )

    assert seen.claimed(uids, besides=ANNE) == {uids[1]}
    assert seen.claimed(uids, besides=BETH) == {uids[0], uids[1]}
    assert seen.claimed(uids[2:], besides=PeerId("dora")) == set()
    assert seen.uncovered(uids) == uids[2:]


def test_a_renewal_that_says_nothing_new_about_hosting_costs_no_new_columns() -> None:
    before = snapshot(record(ANNE, line("0.0")), record(BETH, line("0.1")))

    after = snapshot(record(ANNE, line("0.0", version=9)), record(BETH, line("0.1")), before=before)

    assert after.hosting is before.hosting
    assert after.endpoints[ANNE] is before.endpoints[ANNE]
    assert after.replicas(ExpertUid(0, 0))[0].version == 9


@pytest.mark.parametrize(
    "renewed",
    [
        record(ANNE, line("0.0", bias=1.0)),
        record(ANNE, line("0.0", claimed_at_unix_s=11.0)),
        record(ANNE, line("0.1")),
        record(ANNE, line("0.0"), line("0.1")),
        record(ANNE, line("0.0"), state="draining"),
        record(ANNE, line("0.0"), flags=("paused",)),
        record(BETH, line("0.0")),
    ],
)
def test_a_renewal_that_says_something_new_shows_as_if_it_were_the_first(renewed: PeerRecord) -> None:
    before = snapshot(record(ANNE, line("0.0")))

    after, fresh = snapshot(renewed, before=before), snapshot(renewed)

    for uid in (ExpertUid(0, 0), ExpertUid(0, 1)):
        assert after.replicas(uid) == fresh.replicas(uid)
        assert after.claims(uid) == fresh.claims(uid)
    assert after.layer(0, 2).bias_E.tolist() == fresh.layer(0, 2).bias_E.tolist()
    assert after.layer(0, 2).host_E.tolist() == fresh.layer(0, 2).host_E.tolist()
    assert after.hosting is not before.hosting


def test_a_peer_that_moves_is_called_where_it_is_now() -> None:
    before = snapshot(record(ANNE, line("0.0")))

    after = snapshot(record(ANNE, line("0.0"), address="127.0.0.1:2"), before=before)

    assert after.replicas(ExpertUid(0, 0))[0].endpoint.address == "127.0.0.1:2"


def test_a_peer_that_is_gone_hosts_nothing() -> None:
    before = snapshot(record(ANNE, line("0.0")), record(BETH, line("0.1")))

    after = snapshot(record(BETH, line("0.1")), before=before)

    assert after.layer(0, 2).is_served_E.tolist() == [False, True]
    assert after.uncovered([ExpertUid(0, 0), ExpertUid(0, 1)]) == [ExpertUid(0, 0)]
    assert ANNE not in after.endpoints


@pytest.mark.hostile
def test_an_expert_that_no_run_has_touches_no_layer() -> None:
    seen = snapshot(record(ANNE, line("0.999999"), line("999999.999999"), line("1.4")), record(BETH))

    assert not seen.layer(0, 4).is_served_E.any()
    assert not seen.layer(1, 4).is_served_E.any()


@pytest.mark.hostile
def test_of_an_expert_listed_twice_the_last_line_counts() -> None:
    seen = snapshot(record(ANNE, line("0.0", bias=1.0), line("0.1"), line("0.0", bias=2.0)))

    (replica,) = seen.replicas(ExpertUid(0, 0))

    assert replica.bias == 2.0
    assert seen.layer(0, 1).bias_E.tolist() == [2.0]
