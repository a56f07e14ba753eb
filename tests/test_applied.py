import pytest

from peer.applied import AppliedBackwards
from peer.transport import PeerId

ANNE = PeerId("anne")
KEY = (ANNE, b"1")


def applied(*, max_reply_bytes: int = 100, max_ids: int = 10) -> AppliedBackwards[str]:
    return AppliedBackwards(max_reply_bytes=max_reply_bytes, lifetime_s=30.0, max_ids=max_ids)


def test_a_repeat_within_the_lifetime_gets_the_same_answer() -> None:
    backwards = applied()
    backwards.record(KEY, "gradients", size_bytes=10, now_s=0.0)

    assert backwards.was_applied(KEY)
    assert backwards.reply(KEY, now_s=29.9) == "gradients"


def test_a_late_repeat_is_still_known_but_its_answer_is_gone() -> None:
    backwards = applied()
    backwards.record(KEY, "gradients", size_bytes=10, now_s=0.0)

    assert backwards.reply(KEY, now_s=30.0) is None
    assert backwards.was_applied(KEY)
    assert backwards.reply_bytes == 0


def test_answers_leave_by_bytes_oldest_first_while_ids_stay() -> None:
    backwards = applied(max_reply_bytes=25)
    for number in range(3):
        backwards.record((ANNE, bytes([number])), f"reply {number}", size_bytes=10, now_s=0.0)

    assert backwards.reply((ANNE, bytes([0])), now_s=0.0) is None
    assert backwards.reply((ANNE, bytes([2])), now_s=0.0) == "reply 2"
    assert all(backwards.was_applied((ANNE, bytes([number]))) for number in range(3))


def test_an_answer_larger_than_the_cap_is_not_kept_but_its_id_is() -> None:
    backwards = applied(max_reply_bytes=5)

    backwards.record(KEY, "large", size_bytes=10, now_s=0.0)

    assert backwards.was_applied(KEY)
    assert backwards.reply(KEY, now_s=0.0) is None


def test_ids_are_bounded() -> None:
    backwards = applied(max_ids=2)
    for number in range(3):
        backwards.record((ANNE, bytes([number])), "r", size_bytes=1, now_s=0.0)

    assert [backwards.was_applied((ANNE, bytes([number]))) for number in range(3)] == [False, True, True]
    assert backwards.reply_bytes == 2


def test_a_backward_cannot_be_recorded_twice() -> None:
    backwards = applied()
    backwards.record(KEY, "gradients", size_bytes=10, now_s=0.0)

    with pytest.raises(ValueError, match="twice"):
        backwards.record(KEY, "gradients", size_bytes=10, now_s=0.0)
