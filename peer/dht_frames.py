"""What a member and its DHT process say to each other: msgpack maps, each after its length, over one socket pair.

Both ends are ours, so a frame that does not decode is a bug and ends the conversation. Knows no verb.
"""

import asyncio
import struct
from typing import Any

import msgpack

Frame = dict[str, Any]

MAX_FRAME_BYTES = 64 << 20
"""A directory of ten thousand members fits; a length read from the middle of a frame most likely does not."""
_LENGTH = struct.Struct(">I")


def encode_frame(frame: Frame) -> bytes:
    """Length and body; ValueError above `MAX_FRAME_BYTES`."""
    body: bytes = msgpack.packb(frame)  # pyright: ignore[reportAssignmentType] - it declares None and never returns it
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is more than {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None when the other end is gone, also in the middle of a frame. ValueError if it is none."""
    try:
        (size_bytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if size_bytes > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size_bytes} bytes is announced; the limit is {MAX_FRAME_BYTES}")
        body = await reader.readexactly(size_bytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    frame = msgpack.unpackb(body)
    if not isinstance(frame, dict):
        raise ValueError(f"a frame is a map, not {type(frame).__name__}")  # noqa: TRY004
    return frame
