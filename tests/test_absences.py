from dataclasses import replace

import pytest

from experts.uid import ExpertUid
from peer.snapshot import DirectorySnapshot, Replica, take_snapshot
from peer.transport import Endpoint, PeerId
from trainer.absences import Absences
from trainer.swarm import view_of

ANNE, BETH = PeerId("anne"), PeerId("beth")
UID = ExpertUid(0, 0)


def replica(peer_id: PeerId, *, claimed_at_unix_s: float = 0.0) -> Replica:
    return Replica(
        uid=UID,
        endpoint=Endpoint(peer_id, "127.0.0.1:1", b""),
        version=0,
        claimed_at_unix_s=claimed_at_unix_s,
        bias=0.0,
        share=1.0,
        rows_served=0,
        queued_rows=0,
        throughput_tokens_per_s=0.0,
        latency_s=None,
    )


def snapshot(replicas: list[Replica], expiries: dict[PeerId, float]) -> DirectorySnapshot:
    return replace(take_snapshot({}, {}, {}, now_unix_s=0.0), replicas_by_uid={UID: tuple(replicas)}, expiries=expiries)


def test_nobody_is_absent_before_failing() -> None:
    view = snapshot([replica(ANNE)], {ANNE: 15.0})

    assert not Absences().is_absent(replica(ANNE), view)


def test_a_peer_that_failed_is_absent_until_it_signs_a_newer_record() -> None:
    absences = Absences()
    before = snapshot([replica(ANNE)], {ANNE: 15.0})
    absences.failed(ANNE, before)

    assert absences.is_absent(replica(ANNE), before)
    assert not absences.is_absent(replica(ANNE), snapshot([replica(ANNE)], {ANNE: 20.0}))
    assert not absences.is_absent(replica(ANNE), before), "once it has spoken it is forgiven"


def test_a_peer_unknown_when_it_failed_is_back_with_its_first_record() -> None:
    absences = Absences()
    absences.failed(ANNE, snapshot([], {}))

    assert not absences.is_absent(replica(ANNE), snapshot([replica(ANNE)], {ANNE: 15.0}))


@pytest.mark.parametrize(("replicas", "alive"), [([ANNE], False), ([ANNE, BETH], True), ([BETH], True)])
def test_an_expert_is_alive_when_somebody_present_serves_it(replicas: list[PeerId], alive: bool) -> None:
    absences = Absences()
    seen = snapshot([replica(peer_id) for peer_id in replicas], dict.fromkeys(replicas, 15.0))
    absences.failed(ANNE, seen)

    view = view_of(seen, 0, 1, absences)

    assert bool(view.alive_E[0]) is alive
