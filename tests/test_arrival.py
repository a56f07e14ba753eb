"""How long a call's next bytes are waited for."""

from peer.arrival import MAX_PAUSE_S, Arrival


def test_a_call_may_pause_but_not_for_long() -> None:
    assert Arrival(now_s=100.0).until_s == 100.0 + MAX_PAUSE_S


def test_whole_frames_buy_the_next_one_a_whole_pause_and_no_more() -> None:
    arrival = Arrival(now_s=100.0)

    for now_s in (101.0, 102.0, 120.0):
        arrival.came(1 << 20, now_s=now_s)

        assert arrival.until_s == now_s + MAX_PAUSE_S


def test_a_byte_now_and_then_buys_nothing() -> None:
    arrival = Arrival(now_s=100.0)

    for second in range(1, 20):
        arrival.came(1, now_s=100.0 + second)

    assert arrival.until_s < 100.1 + MAX_PAUSE_S
