from peer.fair_queue import FairQueue


def queue_of(**waiting: list[int]) -> FairQueue[str]:
    """Of each caller, items of so many rows, called `a0`, `a1`, ..."""
    queue: FairQueue[str] = FairQueue(quantum_rows=10)
    for caller, sizes in waiting.items():
        for number, num_rows in enumerate(sizes):
            queue.add(f"{caller}{number}", caller=caller, num_rows=num_rows)
    return queue


def drain(queue: FairQueue[str]) -> list[str]:
    return list(iter(queue.pop, None))


def test_one_callers_items_leave_in_the_order_they_came() -> None:
    queue = queue_of(a=[3, 30, 1])

    assert drain(queue) == ["a0", "a1", "a2"]
    assert queue.num_rows == 0


def test_a_greedy_caller_does_not_starve_a_modest_one() -> None:
    queue = queue_of(greedy=[10] * 100, modest=[10, 10])

    left = drain(queue)

    assert left.index("modest1") < 5


def test_rows_count_not_items() -> None:
    queue = queue_of(large=[40] * 10, small=[10] * 40)

    first = drain(queue)[:30]

    rows = {"large": 0, "small": 0}
    for item in first:
        rows[item.rstrip("0123456789")] += 40 if item.startswith("large") else 10
    assert abs(rows["large"] - rows["small"]) <= 40


def test_who_has_nothing_waiting_saves_nothing_up() -> None:
    queue = queue_of(busy=[10] * 20, idle=[1])
    for _ in range(10):
        queue.pop()

    for number in range(10):
        queue.add(f"late{number}", caller="idle", num_rows=10)

    assert sum(item.startswith("late") for item in drain(queue)[:6]) <= 4


def test_the_next_is_looked_at_without_being_taken() -> None:
    queue = queue_of(a=[25], b=[5])

    assert queue.next() == queue.next() == queue.pop() == "b0"


def test_what_is_withdrawn_leaves_nothing_behind() -> None:
    queue = queue_of(a=[5], b=[7])

    assert queue.remove("a0", caller="a")
    assert not queue.remove("a0", caller="a")

    assert (queue.num_rows, queue.rows_of("a"), list(queue.callers())) == (7, 0, ["b"])
    assert drain(queue) == ["b0"]
    assert not queue


def test_an_item_far_larger_than_a_round_gets_its_turn() -> None:
    queue = queue_of(huge=[10_000], small=[1])

    assert set(drain(queue)) == {"huge0", "small0"}
