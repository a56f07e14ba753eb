"""What one end of a line says in one breath travels as one message, and is heard as it was said."""

import asyncio
import random
from collections.abc import AsyncIterable

import pytest

from peer.grpc_line import END_OF_CALL, Mouth, Repeatable, heard
from tests.transport_worlds import sending


class Written:
    """The messages a mouth has written."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.mouth = Mouth(self._write)

    async def _write(self, message: bytes) -> None:
        await asyncio.sleep(0)
        self.messages.append(message)


def frames_in(messages: list[bytes]) -> list[bytes]:
    parts = [heard(message) for message in messages]
    assert None not in parts
    return [frame for part in parts if part is not None for frame in part[0]]


async def test_small_frames_of_one_breath_and_the_end_of_their_call_are_one_message() -> None:
    written = Written()

    for frame in (b"header", b"chunk"):
        await written.mouth.say(frame)
    await written.mouth.end_call()

    (message,) = written.messages
    assert heard(message) == ([b"header", b"chunk"], True)


async def test_what_is_said_before_a_pause_travels_without_waiting_for_the_rest() -> None:
    written = Written()

    await written.mouth.say(b"first")
    for _ in range(5):  # turns of the loop
        await asyncio.sleep(0)

    assert heard(written.messages[0]) == ([b"first"], False)


async def test_frames_of_any_size_keep_their_order() -> None:
    rng, written = random.Random(8), Written()
    frames = [b"\x0a" + bytes(rng.choice([0, 10, 1 << 14, 1 << 17, 1 << 20])) + b"%d" % n for n in range(60)]

    for frame in frames:
        await written.mouth.say(frame)
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    await written.mouth.end_call()

    assert frames_in(written.messages) == frames
    assert [heard(message)[1] for message in written.messages].index(True) == len(written.messages) - 1
    assert max(map(len, written.messages)) < 4 << 20


async def test_whoever_is_shut_up_says_no_more() -> None:
    written = Written()

    await written.mouth.say(b"first")
    written.mouth.shut()
    for _ in range(5):
        await asyncio.sleep(0)

    assert written.messages == []


def test_an_end_without_frames_is_an_end() -> None:
    assert heard(END_OF_CALL) == ([], True)


def test_any_other_message_is_one_frame() -> None:
    assert heard(b"\x0a\x00") == ([b"\x0a\x00"], False)
    assert heard(b"") == ([b""], False)


async def all_of(frames: AsyncIterable[bytes]) -> list[bytes]:
    return [frame async for frame in frames]


async def test_what_was_said_in_vain_is_said_again_and_the_rest_after_it() -> None:
    words = Repeatable(sending(b"a", b"b", b"c"))
    assert [await anext(words), await anext(words)] == [b"a", b"b"]

    assert words.rewind()

    assert await all_of(words) == [b"a", b"b", b"c"]
    assert not words.rewind()


async def test_what_was_heard_or_is_long_is_not_said_again() -> None:
    heard_of, long = Repeatable(sending(b"a", b"b")), Repeatable(sending(*[bytes(1 << 20)] * 5))
    assert await anext(heard_of) == b"a"
    heard_of.settle()
    assert len(await all_of(long)) == 5

    assert not heard_of.rewind()
    assert not long.rewind()


@pytest.mark.hostile
def test_a_bundle_of_noise_is_refused_or_is_frames_of_what_it_holds() -> None:
    rng = random.Random(3)

    for _ in range(2000):
        message = bytes([rng.randrange(2)]) + rng.randbytes(rng.randrange(12)) + bytes(rng.randrange(9))
        parts = heard(message)
        assert parts is None or sum(4 + len(frame) for frame in parts[0]) == len(message) - 1
