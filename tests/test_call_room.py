"""Room for calls' bytes: taken, waited for, given back."""

import asyncio

import pytest

from peer.call_room import CallRoom, RoomTaken


def waiting(room: CallRoom, size_bytes: int) -> "asyncio.Future[None]":
    return asyncio.ensure_future(room.wait(size_bytes))


async def test_a_call_that_does_not_fit_is_told_so() -> None:
    room = CallRoom(max_bytes=10)
    room.take(6)

    with pytest.raises(RoomTaken, match="6 of 10 bytes, and this one needs 5"):
        room.take(5)

    room.take(4)
    assert room.taken_bytes == 10


async def test_one_larger_than_the_room_gets_in_alone() -> None:
    room = CallRoom(max_bytes=10)

    room.take(50)

    assert room.taken_bytes == 50


async def test_who_waits_gets_in_in_turn_when_there_is_room() -> None:
    room = CallRoom(max_bytes=10)
    room.take(10)
    first, second = waiting(room, 8), waiting(room, 2)
    await asyncio.sleep(0)

    room.give_back(7)
    await asyncio.sleep(0)
    assert not first.done()
    assert not second.done()  # it would fit, and would overtake
    room.give_back(3)

    await asyncio.gather(first, second)
    assert room.taken_bytes == 10


async def test_nobody_overtakes_those_who_wait() -> None:
    room = CallRoom(max_bytes=10)
    room.take(5)
    first = waiting(room, 8)
    await asyncio.sleep(0)

    with pytest.raises(RoomTaken):
        room.take(1)

    room.give_back(5)
    await first


async def test_who_gives_up_waiting_has_taken_nothing_and_lets_the_next_in() -> None:
    room = CallRoom(max_bytes=10)
    room.take(5)
    gives_up, next_one = waiting(room, 8), waiting(room, 5)
    await asyncio.sleep(0)

    gives_up.cancel()

    await next_one
    assert room.taken_bytes == 10
    assert gives_up.cancelled()


async def test_who_is_let_in_and_gives_up_at_once_gives_its_room_back() -> None:
    room = CallRoom(max_bytes=10)
    room.take(5)
    unlucky = waiting(room, 8)
    await asyncio.sleep(0)

    room.give_back(5)
    unlucky.cancel()
    await asyncio.gather(unlucky, return_exceptions=True)

    assert room.taken_bytes == 0
