import json

import pytest

from peer.chi import bits_per_token
from peer.swarm_state import SwarmState
from tests.swarm_scenes import SIX_EXPERTS, peer, peer_id, rates, scene, trainer

ALL_SIX = ("0.0", "0.1", "0.2", "1.0", "1.1", "1.2")


def test_the_json_has_the_fields_that_programs_read() -> None:
    state = scene(peer("ada", "0.0"), trainers=[trainer("eve", step=3, loss=4.5)])

    read = json.loads(state.model_dump_json())

    assert read["run"] == SIX_EXPERTS.run_id
    assert {"peer_id", "state", "flags", "experts", "endpoint", "throughput_tokens_per_s", "version"} <= set(
        read["peers"][0]
    )
    assert {"uid", "replicas", "primary", "version", "load"} <= set(read["experts"][0])
    assert {"peer_id", "step", "loss", "tokens_per_s"} <= set(read["trainers"][0])
    assert read["uncovered"] == ["0.1", "0.2", "1.0", "1.1", "1.2"]
    assert SwarmState.model_validate(read) == state


def test_an_empty_swarm_serves_nothing() -> None:
    state = scene()

    assert state.uncovered == ALL_SIX
    assert [expert.primary for expert in state.experts] == [None] * 6


def test_only_online_peers_serve() -> None:
    state = scene(
        peer("ada", "0.0", state="joining"),
        peer("bob", "0.1", state="syncing"),
        peer("cyd", "0.2", state="draining"),
        peer("dan", "1.0", state="offline"),
        peer("eve", "1.1", state="online"),
    )

    assert state.uncovered == ("0.0", "0.1", "0.2", "1.0", "1.2")
    assert {peer.experts for peer in state.peers} == {("0.0",), ("0.1",), ("0.2",), ("1.1",)}


def test_the_earliest_claim_is_primary_and_its_load_counts() -> None:
    late = peer("ada", "0.0", claimed_at_unix_s=5.0, queued_rows=1)
    early = peer("bob", "0.0", claimed_at_unix_s=4.0, queued_rows=9)

    expert = scene(late, early).experts[0]

    assert expert.primary == peer_id("bob")
    assert expert.replicas == (peer_id("bob"), peer_id("ada"))
    assert (expert.load, expert.version, expert.rows_served) == (9, 7, 10)


def test_of_two_equal_claims_the_lower_peer_id_is_primary() -> None:
    names = ["ada", "bob", "cyd"]

    expert = scene(*(peer(name, "0.0") for name in names)).experts[0]

    assert list(expert.replicas) == sorted(peer_id(name) for name in names)
    assert expert.primary == expert.replicas[0]


def test_experts_that_the_run_does_not_have_are_left_out() -> None:
    state = scene(peer("mallory", "0.3", "7.7", "0.0"))

    assert state.peers[0].experts == ("0.0",)
    assert [expert.uid for expert in state.experts] == list(ALL_SIX)


def test_an_expert_named_twice_by_one_peer_is_one_replica() -> None:
    state = scene(peer("mallory", "0.0", "0.0"))

    assert state.experts[0].replicas == (peer_id("mallory"),)


def test_each_peers_chi_and_the_swarms_median_are_told() -> None:
    state = scene(
        peer("ada", "0.0", rates=rates(0.04)),
        peer("bob", "0.1", rates=rates(0.5)),
        peer("cyd", "0.2", rates=rates(3.0)),
        peer("dan", "1.0"),
    )

    (kind,) = state.expert_kinds
    chis = {told.peer_id: (round(told.chi, 6), round(told.utilisation, 6)) for told in kind.peers}
    assert chis == {peer_id("ada"): (0.04, 0.04), peer_id("bob"): (0.5, 0.5), peer_id("cyd"): (3.0, 1.0)}
    assert (kind.kind, kind.dim, kind.hidden) == ("swiglu", 128, 16)
    assert kind.bits_per_token == bits_per_token(SIX_EXPERTS.wire, dim=128)
    assert {told.needed_bits_per_s for told in kind.peers} == {1e4 * kind.bits_per_token}
    assert kind.median_chi == pytest.approx(0.5)
    assert kind.median_utilisation == pytest.approx(0.5)


def test_a_peer_that_measured_nothing_says_so() -> None:
    state = scene(peer("ada", "0.0"))

    (ada,) = state.peers
    assert (ada.up_bits_per_s, ada.down_bits_per_s, ada.latency_ms, ada.flops_per_s) == (None, None, None, None)
    assert state.expert_kinds[0].peers == ()
    assert state.expert_kinds[0].median_chi is None
