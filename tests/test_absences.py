import pytest

from peer.records import HostedExpert, PeerRecord, Signed
from peer.snapshot import DirectorySnapshot, take_snapshot
from peer.transport import PeerId
from trainer.absences import Absences
from trainer.swarm import view_of

ANNE, BETH = PeerId("anne"), PeerId("beth")


def snapshot(expiries: dict[PeerId, float]) -> DirectorySnapshot:
    """Peers that all host expert 0.0, and when their records expire."""
    signed = {
        peer_id: Signed(
            peer_id,
            PeerRecord(
                peer_id=peer_id,
                state="online",
                address="127.0.0.1:1",
                certificate_der_b64="",
                experts=(HostedExpert(uid="0.0", version=0, claimed_at_unix_s=0.0),),
            ),
            expires_at_unix_s,
        )
        for peer_id, expires_at_unix_s in expiries.items()
    }
    return take_snapshot(signed, {}, {}, now_unix_s=0.0)


def test_nobody_is_absent_before_failing() -> None:
    assert not Absences().absent(snapshot({ANNE: 15.0}))


def test_a_peer_that_failed_is_absent_until_it_signs_a_newer_record() -> None:
    absences = Absences()
    before = snapshot({ANNE: 15.0})
    absences.failed(ANNE, before)

    assert absences.absent(before) == {ANNE}
    assert not absences.absent(snapshot({ANNE: 20.0}))
    assert not absences.absent(before), "once it has spoken it is forgiven"


def test_a_peer_unknown_when_it_failed_is_back_with_its_first_record() -> None:
    absences = Absences()
    absences.failed(ANNE, snapshot({}))

    assert not absences.absent(snapshot({ANNE: 15.0}))


@pytest.mark.parametrize(("hosts", "alive"), [([ANNE], False), ([ANNE, BETH], True), ([BETH], True)])
def test_an_expert_is_alive_when_somebody_present_serves_it(hosts: list[PeerId], alive: bool) -> None:
    absences = Absences()
    seen = snapshot(dict.fromkeys(hosts, 15.0))
    absences.failed(ANNE, seen)

    view = view_of(seen, 0, 1, absences)

    assert bool(view.alive_E[0]) is alive
