import io
import json

from swarmoe.local_log import Event, MergedLog


def told(*lines: tuple[str, bool]) -> tuple[str, list[Event]]:
    stream, events = io.StringIO(), list[Event]()
    log = MergedLog(stream, events.append)
    for text, is_stdout in lines:
        log.line("peer-0", text, is_stdout)
    return stream.getvalue(), events


def test_a_log_event_becomes_one_readable_line() -> None:
    shown, events = told(
        (json.dumps({"event": "peer.online", "level": "info", "timestamp": "now", "experts": 4}), False)
    )

    assert shown.split() == ["peer-0", "peer.online", "experts=4"]
    assert events[0].name == "peer.online"
    assert events[0].fields["experts"] == 4


def test_a_warning_says_that_it_is_one_and_a_traceback_follows() -> None:
    line = json.dumps({"event": "compute.failed", "level": "error", "exception": "Traceback ..."})

    shown, _ = told((line, False))

    assert "error: compute.failed" in shown
    assert shown.endswith("Traceback ...\n")


def test_what_is_no_event_is_passed_on_as_it_is() -> None:
    shown, events = told(("join: 127.0.0.1:1/key", True), ("Segmentation fault", False), ('"a string"', False))

    assert [event.name for event in events] == ["stdout", "stderr", "stderr"]
    assert "join: 127.0.0.1:1/key" in shown
    assert "Segmentation fault" in shown


def test_a_member_cannot_pass_its_answer_off_as_an_event() -> None:
    _, (event,) = told((json.dumps({"event": "expert.restored", "uid": "0.0"}), True))

    assert event.name == "stdout"


def test_events_for_listeners_are_told_but_not_shown() -> None:
    shown, events = told((json.dumps({"event": "expert.fresh", "uid": "0.3"}), False))

    assert shown == ""
    assert events[0].fields["uid"] == "0.3"
