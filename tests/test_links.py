"""Links as arithmetic: bandwidth to the percent, turns, latency; time is an argument."""

import heapq
import random
import statistics
from collections.abc import Mapping, Sequence

import pytest

from peer.links import Delay, Link, Stream, exponential, uniform

MBIT = 1e6
MIB = 1 << 20


def _send_whole(stream: Stream, size_bytes: int, *, now_s: float) -> float:
    """A message alone on its link: when it has gone."""
    for piece_bytes in stream.pieces(size_bytes):
        now_s = stream.send(piece_bytes, now_s=now_s)
    return now_s


def _share(link: Link, messages: Mapping[str, Sequence[int]], *, late_s: float = 0.0) -> dict[str, float]:
    """When each stream is done. They begin together and hand in the next piece `late_s` after the one before went."""
    pieces = {name: (p for size_bytes in sizes for p in link.pieces(size_bytes)) for name, sizes in messages.items()}
    streams, ends = {name: link.stream() for name in messages}, dict.fromkeys(messages, 0.0)
    turns = [(0.0, number, name) for number, name in enumerate(messages)]
    while turns:
        now_s, number, name = heapq.heappop(turns)
        if (piece_bytes := next(pieces[name], None)) is not None:
            ends[name] = streams[name].send(piece_bytes, now_s=now_s)
            heapq.heappush(turns, (ends[name] + late_s, number, name))
    return ends


def test_without_a_bandwidth_everything_goes_at_once() -> None:
    link = Link()

    assert list(link.pieces(10 * MIB)) == [10 * MIB]
    assert link.stream().send(10 * MIB, now_s=5.0) == 5.0


def test_a_message_takes_as_long_as_its_bits_do() -> None:
    link = Link(bits_per_s=8 * MBIT)

    assert _send_whole(link.stream(), MIB, now_s=100.0) == pytest.approx(100.0 + MIB / 1e6)


def test_pieces_add_up_to_their_message() -> None:
    link = Link(bits_per_s=8 * MBIT)

    assert sum(link.pieces(MIB + 1)) == MIB + 1
    assert max(link.pieces(MIB + 1)) == 5000
    assert list(link.pieces(0)) == []


@pytest.mark.parametrize("mbit", [0.5, 1, 20, 1000, 40_000])
@pytest.mark.parametrize("late_s", [0.0, 0.004], ids=["timers on time", "timers late"])
@pytest.mark.parametrize("num_streams", [1, 5])
def test_a_busy_link_carries_its_bandwidth_to_the_percent(mbit: float, late_s: float, num_streams: int) -> None:
    link = Link(bits_per_s=mbit * MBIT)
    sizes = [200, *[int(mbit * MBIT / 8 / 10)] * 20, 30]

    ends = _share(link, {str(number): sizes for number in range(num_streams)}, late_s=late_s)

    assert num_streams * sum(sizes) * 8 / max(ends.values()) == pytest.approx(mbit * MBIT, rel=0.01)


def test_streams_that_send_together_get_equal_shares() -> None:
    link = Link(bits_per_s=80 * MBIT)

    ends = _share(link, {"a": [MIB] * 4, "b": [4 * MIB], "c": [MIB // 2] * 8})

    assert min(ends.values()) > 0.97 * max(ends.values())


def test_a_small_message_waits_for_one_piece_of_each_other_not_for_their_megabytes() -> None:
    link = Link(bits_per_s=10 * MBIT)
    large = {f"large {number}": [MIB] for number in range(8)}

    ends = _share(link, {**large, "small": [500]})

    assert ends["small"] < 9 * 0.005
    assert max(ends.values()) == pytest.approx((8 * MIB + 500) * 8 / (10 * MBIT))


def test_a_link_that_was_idle_gives_nothing_for_it() -> None:
    link = Link(bits_per_s=8 * MBIT)
    stream = link.stream()
    _send_whole(stream, 5000, now_s=0.0)

    assert _send_whole(stream, 5000, now_s=10.0) == pytest.approx(10.005)
    assert _send_whole(link.stream(), 5000, now_s=20.0) == pytest.approx(20.005)


def test_late_timers_never_make_a_link_wider() -> None:
    link = Link(bits_per_s=8 * MBIT)
    streams = [link.stream() for _ in range(10)]
    rng = random.Random(1)
    now_s, sent_bytes, gone_s = 0.0, 0, 0.0

    while now_s < 10.0:
        gone_s = rng.choice(streams).send(5000, now_s=now_s)
        sent_bytes += 5000
        now_s = max(now_s, gone_s) + rng.random() * 0.04

    assert sent_bytes * 8 <= gone_s * 8 * MBIT * (1 + 1e-9)


def test_latency_is_drawn_once_for_each_stream_and_by_seed() -> None:
    def latencies(seed: int) -> list[float]:
        link = Link(delay=uniform(0.02, 0.01), rng=random.Random(seed))
        return [link.stream().latency_s for _ in range(1000)]

    assert latencies(3) == latencies(3) != latencies(4)
    assert min(latencies(3)) == pytest.approx(0.02, abs=1e-4)
    assert max(latencies(3)) == pytest.approx(0.03, abs=1e-4)


@pytest.mark.parametrize(
    ("delay", "mean_s", "deviation_s"),
    [
        (uniform(0.1), 0.1, 0.0),
        (uniform(0.1, 0.06), 0.13, 0.0173),
        (exponential(0.1), 0.1, 0.1),
        (exponential(0), 0, 0),
    ],
)
def test_delays_have_the_mean_and_the_spread_they_say(delay: Delay, mean_s: float, deviation_s: float) -> None:
    rng = random.Random(5)

    drawn = [delay(rng) for _ in range(5000)]

    assert statistics.mean(drawn) == pytest.approx(mean_s, rel=0.05)
    assert statistics.pstdev(drawn) == pytest.approx(deviation_s, rel=0.1, abs=1e-9)
