import pytest

from peer.batching import Batcher


@pytest.fixture
def batcher() -> Batcher[str]:
    return Batcher(max_tokens=8, max_wait_s=0.5)


def test_a_lone_request_waits_for_company_then_goes(batcher: Batcher[str]) -> None:
    batcher.add("a", num_tokens=3, now_s=100.0)

    assert batcher.pop_ready(now_s=100.49) == []
    assert batcher.next_deadline_s() == 100.5
    assert batcher.pop_ready(now_s=100.5) == ["a"]
    assert batcher.next_deadline_s() is None


def test_a_full_batch_does_not_wait(batcher: Batcher[str]) -> None:
    batcher.add("a", num_tokens=5, now_s=0.0)
    batcher.add("b", num_tokens=3, now_s=0.0)

    assert batcher.pop_ready(now_s=0.0) == ["a", "b"]


def test_requests_leave_in_order_and_whole(batcher: Batcher[str]) -> None:
    for name, num_tokens in [("a", 6), ("b", 6), ("c", 1)]:
        batcher.add(name, num_tokens=num_tokens, now_s=0.0)

    assert batcher.pop_ready(now_s=1.0) == ["a"]
    assert batcher.pop_ready(now_s=1.0) == ["b", "c"]
    assert batcher.num_tokens == 0


def test_a_request_larger_than_a_batch_leaves_alone(batcher: Batcher[str]) -> None:
    batcher.add("huge", num_tokens=100, now_s=0.0)
    batcher.add("small", num_tokens=1, now_s=0.0)

    assert batcher.pop_ready(now_s=0.0) == ["huge"]
    assert batcher.pop_ready(now_s=0.5) == ["small"]


def test_without_waiting_whatever_has_come_is_the_next_batch() -> None:
    batcher: Batcher[str] = Batcher(max_tokens=8, max_wait_s=0.0)
    batcher.add("a", num_tokens=0, now_s=3.0)

    assert batcher.pop_ready(now_s=3.0) == ["a"]


@pytest.mark.parametrize(("max_tokens", "max_wait_s"), [(0, 0.0), (1, -0.1)])
def test_a_batcher_that_could_never_release_anything_is_refused(max_tokens: int, max_wait_s: float) -> None:
    with pytest.raises(ValueError, match="at least"):
        Batcher(max_tokens=max_tokens, max_wait_s=max_wait_s)
