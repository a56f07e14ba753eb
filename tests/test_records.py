"""What others may say of themselves: bounded, so that nothing that reads records can be broken by one."""

import pytest
from pydantic import ValidationError

from experts.uid import ExpertUid
from peer.rates import Rates
from peer.records import HostedExpert, PeerRecord, Signed, TrainerRecord
from peer.snapshot import take_snapshot
from peer.transport import PeerId
from trainer.absences import Absences
from trainer.swarm import view_of

ANNE = PeerId("anne")


def hosted(**fields: object) -> HostedExpert:
    return HostedExpert.model_validate({"uid": "0.0", "version": 0, "claimed_at_unix_s": 0.0, **fields})


def peer(**fields: object) -> PeerRecord:
    plain = {"peer_id": ANNE, "state": "online", "address": "192.0.2.7:4700", "certificate_der_b64": ""}
    return PeerRecord.model_validate({**plain, **fields})


@pytest.mark.hostile
@pytest.mark.parametrize(
    "fields",
    [
        {"share": 1e300},
        {"share": -1.0},
        {"share": float("nan")},
        {"bias": 1e300},
        {"bias": float("inf")},
        {"version": 10**400},
        {"rows_served": -1},
        {"claimed_at_unix_s": float("nan")},
        {"uid": "0.0; rm"},
    ],
)
def test_a_hosted_expert_out_of_bounds_is_no_record(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        hosted(**fields)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "address",
    [
        "unix:/run/x:1", "dns:///example:1", "xds:///x:1", f"{'a' * 64}.example:1", f"{'a.' * 130}b:1", "host",
        "host:0", "a b:1", "", "192.0.2.7:4700/path",
    ],
)  # fmt: skip
def test_an_address_that_is_no_host_and_port_is_no_record(address: str) -> None:
    with pytest.raises(ValidationError):
        peer(address=address)


@pytest.mark.parametrize("address", ["192.0.2.7:4700", "[2001:db8::7]:4700", "peer-1.example:1", "localhost:65535"])
def test_hosts_of_every_kind_are_addresses(address: str) -> None:
    assert peer(address=address).address == address


@pytest.mark.hostile
@pytest.mark.parametrize("uid", ["", "0", "0.1\n", " 0.1", "+0.1", "00.1", "0.01", "0.1234567", "0.1\u0663", "0.1.2"])
def test_what_is_no_uid_is_none_in_a_record_either(uid: str) -> None:
    with pytest.raises(ValueError, match="is not an expert uid"):
        ExpertUid.parse(uid)
    with pytest.raises(ValidationError):
        hosted(uid=uid)


@pytest.mark.parametrize("uid", ["0.0", "3.17", "999999.999999"])
def test_a_uid_reads_the_same_in_a_record(uid: str) -> None:
    assert str(ExpertUid.parse(hosted(uid=uid).uid)) == uid


@pytest.mark.hostile
@pytest.mark.parametrize(
    "rates",
    [
        {"link": {"up_bits_per_s": 0, "down_bits_per_s": 1, "latency_ms": 1}},
        {"link": {"up_bits_per_s": 1, "down_bits_per_s": 1, "latency_ms": float("nan")}},
        {"link": {"up_bits_per_s": 1}},
        {"device": {"tokens_per_s": float("inf"), "flops_per_s": 1}},
        {"device": {"tokens_per_s": 1, "flops_per_s": -1}},
        {"device": "fast"},
        7,
    ],
)
def test_rates_out_of_bounds_are_no_record(rates: object) -> None:
    with pytest.raises(ValidationError):
        peer(rates=rates)


def test_a_record_need_not_say_rates() -> None:
    assert peer().rates == Rates()


@pytest.mark.hostile
@pytest.mark.parametrize("fields", [{"step": 10**400}, {"tokens_per_s": 1e300}, {"answered_share": 1.1}])
def test_a_trainer_out_of_bounds_is_no_record(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainerRecord.model_validate({"peer_id": ANNE, "state": "online", "step": 0, **fields})


@pytest.mark.hostile
@pytest.mark.parametrize(("share", "bias"), [(1e6, 100.0), (0.0, -100.0), (1e-30, 0.0)])
def test_whatever_a_record_may_say_makes_a_view(share: float, bias: float) -> None:
    extreme, plain = hosted(share=share, bias=bias), hosted(uid="0.1")
    signed = Signed(ANNE, peer(state="online", experts=(extreme, plain)), expires_at_unix_s=15.0)
    snapshot = take_snapshot({ANNE: signed}, {}, {}, now_unix_s=0.0)

    view = view_of(snapshot, 0, 2, Absences())

    assert view.num_live == 2
    assert float(view.share_E.sum()) == pytest.approx(1.0)
