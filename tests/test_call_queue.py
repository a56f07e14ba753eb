"""Who waits, who runs next, with whom, and who has to go."""

import itertools

import pytest

from peer.call_queue import CallQueue, Declined, Lane, Waiting

NOW_S = 1000.0
_names = itertools.count()


def forward(
    caller: str = "anne", *, rows: int = 10, score: float = 0.0, lane: Lane = Lane.FORWARD, timeout_s: float = 100.0,
    size_bytes: int = 0, small: bool = True,
) -> Waiting[str]:  # fmt: skip
    return Waiting(
        f"{lane.value} {next(_names)}",
        caller,
        lane,
        num_rows=rows,
        size_bytes=size_bytes,
        deadline_s=NOW_S + timeout_s,
        score=score,
        runs_together=small,
    )


def backward(caller: str = "anne", **fields) -> Waiting[str]:
    return forward(caller, lane=Lane.BACKWARD, **fields)


def queue_of(*calls: Waiting[str], max_rows: int = 1 << 20, max_bytes: int = 1 << 20) -> CallQueue[str]:
    queue = CallQueue[str](max_rows=max_rows, max_bytes=max_bytes)
    for call in calls:
        assert queue.offer(call, now_s=NOW_S) == []
    return queue


def batches(queue: CallQueue[str]) -> list[list[Waiting[str]]]:
    return list(iter(queue.pop_together, []))


# ---- what runs together


def test_small_calls_of_all_callers_run_together() -> None:
    calls = [forward("anne"), forward("beth"), forward("carl")]

    assert batches(queue_of(*calls)) == [calls]


def test_a_large_call_runs_alone() -> None:
    small, large, other = forward("anne"), forward("beth", rows=9000, small=False), forward("carl")

    assert batches(queue_of(small, large, other)) == [[small, other], [large]]


def test_no_more_run_together_than_is_faster() -> None:
    calls = [forward(rows=1000) for _ in range(5)]

    assert [len(batch) for batch in batches(queue_of(*calls))] == [2, 2, 1]


def test_forwards_and_backwards_do_not_run_together() -> None:
    queue = queue_of(forward(), backward(), forward())

    assert [{call.lane for call in batch} for batch in batches(queue)] == [{Lane.FORWARD}, {Lane.BACKWARD}]


def test_an_empty_queue_has_nothing() -> None:
    queue = queue_of()

    assert queue.pop_together() == []
    assert not queue.more_backwards()


# ---- turns


def test_a_turn_of_backwards_lasts_while_there_are_any() -> None:
    queue = queue_of(forward(small=False))
    queue.took(Lane.BACKWARD, 10, 0.5)
    queue.pop_together()  # the forwards' turn
    queue.offer(backward(small=False), now_s=NOW_S)
    queue.offer(forward(small=False), now_s=NOW_S)

    assert queue.pop_together()[0].lane is Lane.BACKWARD
    assert not queue.more_backwards()
    queue.offer(backward(small=False), now_s=NOW_S)
    assert queue.more_backwards()

    assert [batch[0].lane for batch in batches(queue)] == [Lane.BACKWARD, Lane.FORWARD]


def test_forwards_that_come_during_their_own_turn_wait_for_the_next_when_a_backward_does() -> None:
    queue = queue_of(forward(small=False), forward(small=False))
    queue.pop_together()
    queue.offer(forward(small=False), now_s=NOW_S)
    queue.offer(backward(), now_s=NOW_S)

    lanes = [batch[0].lane for batch in batches(queue)]

    assert lanes == [Lane.FORWARD, Lane.BACKWARD, Lane.FORWARD]


def test_a_turn_of_forwards_is_short_when_a_backward_waits() -> None:
    queue = queue_of(*(forward(rows=100, small=False) for _ in range(20)), backward())
    queue.took(Lane.FORWARD, 100, 0.1)

    lanes = [batch[0].lane for batch in batches(queue)]

    assert lanes.index(Lane.BACKWARD) == 2


def test_a_flood_of_backwards_does_not_hold_up_a_forward_for_ever() -> None:
    queue = queue_of(forward("beth", small=False))
    queue.took(Lane.BACKWARD, 100, 1.0)
    queue.pop_together()
    for call in (*(backward(rows=100, small=False, timeout_s=1e3) for _ in range(20)), forward("beth")):
        queue.offer(call, now_s=NOW_S)

    lanes = [batch[0].lane for batch in batches(queue)]

    assert lanes.index(Lane.FORWARD) == 2


# ---- in time


def test_a_call_whose_turn_would_come_too_late_is_declined_at_once() -> None:
    queue = queue_of(*(forward(rows=100) for _ in range(5)))
    queue.took(Lane.FORWARD, 100, 1.0)

    with pytest.raises(Declined, match=r"its turn would come in 5.0 s, and it has 3.5 s"):
        queue.offer(forward(rows=100, timeout_s=5.0), now_s=NOW_S)

    assert queue.offer(forward(rows=100, timeout_s=7.0), now_s=NOW_S) == []


def test_a_greedy_caller_is_in_its_own_way_and_in_nobody_elses() -> None:
    queue = queue_of(*(forward("greedy", rows=100) for _ in range(50)))
    queue.took(Lane.FORWARD, 100, 1.0)

    assert queue.offer(forward("modest", rows=100, timeout_s=5.0), now_s=NOW_S) == []
    with pytest.raises(Declined):
        queue.offer(forward("greedy", rows=100, timeout_s=5.0), now_s=NOW_S)


def test_a_backward_does_not_wait_for_its_callers_forwards() -> None:
    queue = queue_of(*(forward(rows=100) for _ in range(50)))
    queue.took(Lane.FORWARD, 100, 1.0)
    queue.took(Lane.BACKWARD, 100, 1.0)

    assert queue.offer(backward(rows=100, timeout_s=5.0), now_s=NOW_S) == []


def test_a_forward_waits_for_the_backwards_of_those_before_it() -> None:
    queue = queue_of(*(forward(rows=100) for _ in range(3)))
    queue.took(Lane.FORWARD, 100, 1.0)
    queue.took(Lane.BACKWARD, 100, 2.0)

    with pytest.raises(Declined, match=r"would come in 9.0 s"):
        queue.offer(forward(rows=100, timeout_s=9.0), now_s=NOW_S)


def test_a_call_must_start_early_enough_to_be_computed_and_to_travel() -> None:
    queue = queue_of()
    queue.took(Lane.BACKWARD, 100, 2.0)

    start_by_s = queue.start_by_s(backward(rows=50, timeout_s=10.0), now_s=NOW_S)

    assert start_by_s == pytest.approx(NOW_S + 10.0 - 1.0 - 0.5)


# ---- over capacity


def test_the_lowest_score_goes_first() -> None:
    low, high = forward(score=0.1), forward(score=0.9)
    queue = queue_of(high, low, max_rows=20)

    assert queue.offer(forward(score=0.5), now_s=NOW_S) == [low]
    with pytest.raises(Declined, match="20 rows"):
        queue.offer(forward(score=0.4), now_s=NOW_S)


def test_equals_do_not_displace_each_other() -> None:
    queue = queue_of(forward(score=0.5), forward(score=0.5), max_rows=20)

    with pytest.raises(Declined):
        queue.offer(forward(score=0.5), now_s=NOW_S)


def test_a_liar_about_scores_displaces_only_its_own_calls() -> None:
    honest = [forward("honest", score=0.1) for _ in range(2)]
    liars = [forward("liar", score=1e9) for _ in range(2)]
    queue = queue_of(*honest, *liars, max_rows=40)

    displaced: list[Waiting[str]] = []
    for _ in range(5):
        try:
            displaced += queue.offer(forward("liar", score=2e9), now_s=NOW_S)
        except Declined:
            break

    assert displaced
    assert {call.caller for call in displaced} == {"liar"}
    assert set(honest) < set(itertools.chain(*batches(queue)))


def test_whoever_has_most_waiting_makes_room_for_a_newcomer() -> None:
    greedy = [forward("greedy", score=9.0 - number) for number in range(4)]
    queue = queue_of(*greedy, max_rows=40)

    assert queue.offer(forward("newcomer", score=0.01), now_s=NOW_S) == [greedy[-1]]


def test_a_backward_displaces_a_forward_and_never_the_other_way_round() -> None:
    low, kept = forward(score=0.1), backward()
    queue = queue_of(low, kept, max_rows=20)

    assert queue.offer(backward(), now_s=NOW_S) == [low]
    with pytest.raises(Declined):
        queue.offer(forward(score=9.0), now_s=NOW_S)


def test_when_a_call_is_declined_nobody_has_made_room_for_it() -> None:
    calls = [forward("anne", score=0.1), forward("beth", score=0.2)]
    queue = queue_of(*calls, max_rows=20)

    with pytest.raises(Declined):
        queue.offer(forward("anne", rows=1000, score=0.0), now_s=NOW_S)

    assert queue.num_rows == 20


def test_bytes_are_bounded_as_rows_are() -> None:
    low = forward(size_bytes=600, score=0.1)
    queue = queue_of(low, max_bytes=1000)

    assert queue.offer(forward(size_bytes=600, score=0.2), now_s=NOW_S) == [low]
    assert queue.size_bytes == 600


def test_the_number_of_calls_is_bounded_however_small_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.call_queue._MAX_CALLS", 3)
    queue = queue_of(*(forward(rows=1) for _ in range(3)))

    with pytest.raises(Declined):
        queue.offer(forward(rows=1), now_s=NOW_S)


class Looked(Waiting[str]):
    """Counts how often anybody looks at the forwards of a queue."""

    times = 0

    def __getattribute__(self, name: str) -> object:
        Looked.times += 1
        return super().__getattribute__(name)


def test_a_backward_that_displaces_all_forwards_looks_at_each_of_them_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_calls = 200
    waiting = [Looked(str(n), f"caller {n % 7}", Lane.FORWARD, 1, 1, NOW_S + 100.0, n / 9) for n in range(num_calls)]
    queue = queue_of(*waiting, max_bytes=num_calls)
    monkeypatch.setattr(Looked, "times", 0)

    displaced = queue.check(backward(size_bytes=num_calls), now_s=NOW_S)

    assert set(displaced) == set(waiting)
    assert Looked.times < 10 * num_calls


def test_a_forward_that_displaces_one_looks_at_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [Looked(str(n), "anne", Lane.FORWARD, 10, 1, NOW_S + 100.0, n) for n in range(200)]
    queue = queue_of(*waiting, max_rows=2000)
    monkeypatch.setattr(Looked, "times", 0)

    assert queue.check(forward("anne", score=50.0), now_s=NOW_S) == waiting[:1]

    assert Looked.times < 10


def test_a_call_larger_than_all_bounds_gets_in_when_it_is_alone() -> None:
    queue = queue_of(max_rows=5, max_bytes=5)

    assert queue.offer(forward(rows=100, size_bytes=100), now_s=NOW_S) == []


def test_what_is_withdrawn_makes_room() -> None:
    call = forward(size_bytes=10)
    queue = queue_of(call, max_rows=10)

    assert queue.withdraw(call)
    assert not queue.withdraw(call)

    assert (queue.num_rows, queue.size_bytes) == (0, 0)
    assert queue.offer(forward(), now_s=NOW_S) == []


def test_how_many_rows_go_there_and_back_in_a_second_is_known_after_both() -> None:
    queue = queue_of()
    assert queue.trips_per_s is None

    queue.took(Lane.FORWARD, 100, 1.0)
    assert queue.trips_per_s is None

    queue.took(Lane.BACKWARD, 100, 3.0)
    assert queue.trips_per_s == pytest.approx(25.0)
