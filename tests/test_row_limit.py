from peer.pace import Pace
from peer.row_limit import NO_LIMIT, RowLimit


def test_there_is_no_limit_until_something_did_not_fit() -> None:
    assert RowLimit().rows(now_s=0.0) == NO_LIMIT


def test_half_of_what_did_not_fit_is_tried_next_for_a_minute() -> None:
    limit = RowLimit()

    limit.shrink(100, now_s=5.0)

    assert limit.rows(now_s=64.9) == 50
    assert limit.rows(now_s=65.0) == NO_LIMIT


def test_a_limit_is_never_less_than_one_row() -> None:
    limit = RowLimit()

    limit.shrink(1, now_s=0.0)

    assert limit.rows(now_s=1.0) == 1


def test_a_pace_is_unknown_until_something_was_seen_and_then_follows_the_latest() -> None:
    pace = Pace[str]()
    assert pace.seconds("forward", 100) == 0.0

    pace.observe("forward", 100, 1.0)
    assert pace.seconds("forward", 50) == 0.5
    for _ in range(50):
        pace.observe("forward", 100, 3.0)

    assert 2.9 < pace.seconds("forward", 100) <= 3.0
    assert pace.seconds("backward", 100) == 0.0
