"""Room for calls' bytes: taken, shared, waited for, given back."""

import asyncio

import pytest

from peer.call_room import CallRoom, RoomTaken


def waiting(room: CallRoom, caller: str, size_bytes: int) -> "asyncio.Future[None]":
    return asyncio.ensure_future(room.wait(caller, size_bytes))


def fill(room: CallRoom, caller: str) -> int:
    """One byte after another, until there is no room for this caller."""
    num_bytes = 0
    while True:
        try:
            room.take(caller, 1)
        except RoomTaken:
            return num_bytes
        num_bytes += 1


async def test_a_call_that_does_not_fit_is_told_so() -> None:
    room = CallRoom(max_bytes=10)
    room.take("anne", 6)

    with pytest.raises(RoomTaken, match="6 of 10 bytes, 0 of them yours, and this one needs 5"):
        room.take("beth", 5)

    room.take("beth", 4)
    assert room.taken_bytes == 10


async def test_one_larger_than_the_room_gets_in_alone() -> None:
    room = CallRoom(max_bytes=10)

    room.take("anne", 50)

    assert room.taken_bytes == 50


async def test_nobody_takes_more_than_is_left_over() -> None:
    room = CallRoom(max_bytes=600)

    assert [fill(room, caller) for caller in ("anne", "beth", "carl")] == [300, 150, 75]

    room.give_back("anne", 300)
    assert fill(room, "carl") == 150


async def test_a_callers_only_call_may_be_larger_than_its_share() -> None:
    room = CallRoom(max_bytes=10)
    room.take("anne", 2)

    room.take("beth", 7)

    assert room.taken_bytes == 9


async def test_who_waits_gets_in_in_turn_when_there_is_room() -> None:
    room = CallRoom(max_bytes=20)
    room.take("anne", 10)
    first, second = waiting(room, "anne", 8), waiting(room, "anne", 2)
    await asyncio.sleep(0)

    room.give_back("anne", 5)
    await asyncio.sleep(0)
    assert not first.done()
    assert not second.done()  # it would fit, and would overtake
    room.give_back("anne", 5)

    await asyncio.gather(first, second)
    assert room.taken_bytes == 10


async def test_no_forward_overtakes_its_own_callers_backward() -> None:
    room = CallRoom(max_bytes=10)
    room.take("anne", 5)
    first = waiting(room, "anne", 2)
    await asyncio.sleep(0)

    with pytest.raises(RoomTaken):
        room.take("anne", 1)

    room.give_back("anne", 5)
    await first


async def test_who_waits_for_its_own_calls_to_end_holds_up_nobody_else() -> None:
    room = CallRoom(max_bytes=20)
    room.take("stranger", 10)
    stuck = waiting(room, "stranger", 10)
    await asyncio.sleep(0)

    room.take("anne", 5)
    await room.wait("beth", 5)

    assert not stuck.done()
    stuck.cancel()


async def test_who_has_nothing_in_the_room_is_not_kept_out_by_those_who_come_and_go() -> None:
    room = CallRoom(max_bytes=20)
    room.take("anne", 7)
    room.take("beth", 5)
    first = waiting(room, "carl", 10)
    await asyncio.sleep(0)
    room.give_back("beth", 5)

    with pytest.raises(RoomTaken):  # else the two could go on like this for ever
        room.take("beth", 5)

    room.give_back("anne", 7)
    await first


async def test_one_that_waits_for_the_whole_room_leaves_half_of_it_for_calls_to_pass() -> None:
    room = CallRoom(max_bytes=20)
    room.take("anne", 4)
    greedy = waiting(room, "greedy", 20)
    await asyncio.sleep(0)

    room.take("beth", 4)

    assert not greedy.done()
    room.give_back("anne", 4)
    room.give_back("beth", 4)
    await greedy


async def test_who_gives_up_waiting_has_taken_nothing_and_lets_the_next_in() -> None:
    room = CallRoom(max_bytes=20)
    room.take("anne", 5)
    gives_up, next_one = waiting(room, "anne", 8), waiting(room, "anne", 5)
    await asyncio.sleep(0)

    gives_up.cancel()

    await next_one
    assert room.taken_bytes == 10
    assert gives_up.cancelled()


async def test_who_is_let_in_and_gives_up_at_once_gives_its_room_back() -> None:
    room = CallRoom(max_bytes=10)
    room.take("anne", 5)
    unlucky = waiting(room, "beth", 8)
    await asyncio.sleep(0)

    room.give_back("anne", 5)
    unlucky.cancel()
    await asyncio.gather(unlucky, return_exceptions=True)

    assert room.taken_bytes == 0
