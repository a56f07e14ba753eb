import pytest

from peer.kept_inputs import KeptInputs
from peer.transport import PeerId

ANNE, BETH = PeerId("anne"), PeerId("beth")


@pytest.fixture
def kept() -> KeptInputs[str]:
    return KeptInputs(max_bytes=100, lifetime_s=10.0)


def test_what_is_kept_is_handed_out_once(kept: KeptInputs[str]) -> None:
    kept.keep((ANNE, b"1"), "inputs", size_bytes=40, now_s=0.0)

    assert kept.take((ANNE, b"1"), now_s=1.0) == "inputs"
    assert kept.take((ANNE, b"1"), now_s=1.0) is None
    assert kept.size_bytes == 0


def test_one_caller_cannot_take_what_another_left(kept: KeptInputs[str]) -> None:
    kept.keep((ANNE, b"1"), "inputs", size_bytes=40, now_s=0.0)

    assert kept.take((BETH, b"1"), now_s=0.0) is None
    assert kept.take((ANNE, b"1"), now_s=0.0) == "inputs"


def test_the_oldest_make_room_for_the_newest(kept: KeptInputs[str]) -> None:
    for number in range(3):
        kept.keep((ANNE, bytes([number])), f"call {number}", size_bytes=40, now_s=float(number))

    assert len(kept) == 2
    assert kept.size_bytes == 80
    assert kept.take((ANNE, bytes([0])), now_s=3.0) is None
    assert kept.take((ANNE, bytes([2])), now_s=3.0) == "call 2"


def test_what_is_too_old_is_forgotten_with_its_bytes(kept: KeptInputs[str]) -> None:
    kept.keep((ANNE, b"1"), "inputs", size_bytes=40, now_s=0.0)

    kept.expire(now_s=10.0)

    assert (len(kept), kept.size_bytes) == (0, 0)


def test_what_is_too_old_is_forgotten_when_something_is_kept(kept: KeptInputs[str]) -> None:
    kept.keep((ANNE, b"1"), "inputs", size_bytes=40, now_s=0.0)

    kept.keep((ANNE, b"2"), "inputs", size_bytes=50, now_s=10.0)

    assert (len(kept), kept.size_bytes) == (1, 50)


def test_a_call_larger_than_the_cap_is_a_miss_and_pushes_nobody_out(kept: KeptInputs[str]) -> None:
    kept.keep((ANNE, b"1"), "small", size_bytes=40, now_s=0.0)

    kept.keep((ANNE, b"2"), "huge", size_bytes=101, now_s=0.0)

    assert kept.take((ANNE, b"2"), now_s=0.0) is None
    assert kept.take((ANNE, b"1"), now_s=0.0) == "small"


def test_a_repeated_call_replaces_itself(kept: KeptInputs[str]) -> None:
    kept.keep((ANNE, b"1"), "first", size_bytes=60, now_s=0.0)

    kept.keep((ANNE, b"1"), "again", size_bytes=60, now_s=1.0)

    assert kept.size_bytes == 60
    assert kept.take((ANNE, b"1"), now_s=1.0) == "again"
