from coordinator.metrics import swarm_registry
from coordinator.monitor import MAX_EVENTS, MAX_LINES, MAX_POINTS, Monitor
from peer.swarm_state import SwarmState
from tests.swarm_scenes import SIX_EXPERTS, peer, peer_id, scene, trainer

WIDE = SIX_EXPERTS.model_copy(update={"experts_per_layer": 40})
ALL = ("0.0", "0.1", "0.2", "1.0", "1.1", "1.2")


def told(monitor: Monitor, state: SwarmState) -> list[tuple[str, tuple[str, ...]]]:
    return [(event.name, event.subjects) for event in monitor.observe(state).events]


def test_a_fresh_swarm_is_no_news() -> None:
    assert told(Monitor(), scene()) == []


def test_the_same_state_twice_tells_nothing() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", *ALL)))

    assert told(monitor, scene(peer("ada", *ALL), at_unix_s=105.0)) == []


def test_a_peer_that_comes_is_told_with_what_is_served_now() -> None:
    monitor = Monitor()
    monitor.observe(scene())

    change = monitor.observe(scene(peer("ada", "0.0", "0.1"), at_unix_s=105.0))

    assert [(event.name, event.subjects) for event in change.events] == [
        ("peer.joined", (peer_id("ada"),)),
        ("experts.covered", ("0.0", "0.1")),
    ]
    assert {event.at_unix_s for event in change.events} == {105.0}
    assert change.events[1].text == "Experts 0.0, 0.1 are served"


def test_the_last_expert_to_be_served_completes_the_swarm() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", *ALL[:-1])))

    (event,) = monitor.observe(scene(peer("ada", *ALL))).events

    assert event.text == "All experts are served"


def test_a_peer_that_goes_leaves_experts_uncovered() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", *ALL[:3]), peer("bob", *ALL[3:])))

    change = monitor.observe(scene(peer("bob", *ALL[3:])))

    assert [(event.name, event.tone) for event in change.events] == [
        ("peer.left", "plain"),
        ("experts.uncovered", "bad"),
    ]
    assert change.events[1].subjects == ALL[:3]


def test_a_peer_that_drained_left_and_any_other_is_gone() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", state="draining"), peer("bob", state="online")))

    texts = {event.text for event in monitor.observe(scene()).events}

    assert texts == {f"Peer {peer_id('ada')[:8]} left", f"Peer {peer_id('bob')[:8]} is gone"}


def test_a_peer_with_a_tombstone_is_no_peer() -> None:
    monitor = Monitor()

    assert told(monitor, scene(peer("ada", state="offline"))) == []
    assert monitor.remembered().state.peers == ()


def test_a_peer_that_changes_its_state_or_flags_is_told() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", state="joining")))

    assert told(monitor, scene(peer("ada", state="online"))) == [("peer.state", (peer_id("ada"),))]
    assert told(monitor, scene(peer("ada", flags=("paused",)))) == [("peer.flags", (peer_id("ada"),))]


def test_a_replica_that_goes_uncovers_nothing() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", *ALL), peer("bob", "0.0")))

    assert told(monitor, scene(peer("ada", *ALL))) == [("peer.left", (peer_id("bob"),))]


def test_many_experts_are_told_in_one_line_of_bounded_length() -> None:
    monitor = Monitor()
    monitor.observe(scene(peer("ada", *(f"0.{index}" for index in range(40))), manifest=WIDE))

    _, uncovered = monitor.observe(scene(manifest=WIDE)).events

    assert len(uncovered.subjects) == 40
    assert uncovered.text == "Nobody serves experts 0.0, 0.1, 0.2, 0.3, 0.4, 0.5 and 34 more any more"


def test_trainers_come_and_go() -> None:
    monitor = Monitor()
    monitor.observe(scene())

    assert told(monitor, scene(trainers=[trainer("tim")])) == [("trainer.joined", (peer_id("tim"),))]
    assert told(monitor, scene(trainers=[trainer("tim", state="offline")])) == [("trainer.left", (peer_id("tim"),))]


def test_each_step_is_one_point_however_often_it_is_seen() -> None:
    monitor = Monitor()
    for step in (1, 1, 2):
        monitor.observe(scene(trainers=[trainer("tim", step=step, loss=8.0 - step)]))

    again = monitor.observe(scene(trainers=[trainer("tim", step=2, loss=6.0)]))

    assert again.losses == ()
    assert [line.points for line in monitor.remembered().losses] == [((1, 7.0), (2, 6.0))]


def test_a_trainer_without_a_loss_has_no_point() -> None:
    monitor = Monitor()

    assert monitor.observe(scene(trainers=[trainer("tim", step=0)])).losses == ()


def test_a_trainer_that_resumes_takes_its_later_points_back() -> None:
    monitor = Monitor()
    for step in (10, 20, 30, 20, 25):
        monitor.observe(scene(trainers=[trainer("tim", step=step, loss=float(step))]))

    (line,) = monitor.remembered().losses

    assert [step for step, _ in line.points] == [10, 20, 25]


def test_a_long_run_keeps_its_first_and_last_point_within_the_bound() -> None:
    monitor = Monitor()
    for step in range(3 * MAX_POINTS):
        monitor.observe(scene(trainers=[trainer("tim", step=step, loss=1.0)]))

    (line,) = monitor.remembered().losses

    assert len(line.points) <= MAX_POINTS
    assert (line.points[0][0], line.points[-1][0]) == (0, 3 * MAX_POINTS - 1)


def test_lines_of_trainers_long_gone_make_room() -> None:
    monitor = Monitor()
    for number in range(MAX_LINES + 3):
        monitor.observe(
            scene(trainers=[trainer("tim", step=number, loss=1.0), trainer(f"t{number}", step=1, loss=1.0)])
        )

    kept = {line.peer_id for line in monitor.remembered().losses}

    assert len(kept) == MAX_LINES
    assert peer_id("tim") in kept
    assert peer_id(f"t{MAX_LINES + 2}") in kept
    assert peer_id("t0") not in kept


def test_the_log_keeps_the_latest_events() -> None:
    monitor = Monitor()
    for round_number in range(MAX_EVENTS):
        monitor.observe(scene(peer("ada"), at_unix_s=float(round_number)))
        monitor.observe(scene(at_unix_s=round_number + 0.5))

    events = monitor.remembered().events

    assert len(events) == MAX_EVENTS
    assert events[-1].at_unix_s == MAX_EVENTS - 0.5


def test_metrics_count_what_an_operator_alerts_on() -> None:
    state = scene(
        peer("ada", "0.0"), peer("bob", state="draining"), trainers=[trainer("tim", step=3, loss=2.5), trainer("tom")]
    )

    registry = swarm_registry(lambda: state)

    assert registry.get_sample_value("swarmoe_peers", {"state": "online"}) == 1
    assert registry.get_sample_value("swarmoe_peers", {"state": "draining"}) == 1
    assert registry.get_sample_value("swarmoe_experts") == 6
    assert registry.get_sample_value("swarmoe_experts_uncovered") == 5
    assert registry.get_sample_value("swarmoe_trainer_step", {"peer_id": peer_id("tim")}) == 3
    assert registry.get_sample_value("swarmoe_trainer_bits_per_byte", {"peer_id": peer_id("tom")}) is None


def test_before_the_first_look_there_are_no_metrics() -> None:
    assert list(swarm_registry(lambda: None).collect()) == []
