"""One call at the receiving side, the same for every transport: from proven caller to how it ended.

Whatever the caller does or leaves undone and whatever the servicer does, it ends by its deadline. A servicer's bug ends
one call, not the server.
"""

import asyncio
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import StrEnum

import structlog

from peer.transport import CallContext, CallRefused, Frame, Method, PeerId, Servicer
from protos.swarm_pb2 import InfoReply, InfoRequest

log = structlog.get_logger(__name__)

DEFAULT_CALL_S = 60.0
"""What a call gets that came without a deadline."""
MAX_CALL_S = 600.0
"""No call lasts longer, whatever its caller grants it."""
INFO_S = 5.0


class Failure(StrEnum):
    """How a call can end besides well and refused. The value is what the caller reads."""

    DEADLINE = "the call was not over by its deadline"
    BUG = "this peer failed on the call; its log has the traceback"


class CallerGone(Exception):
    """Raised by `send`: nobody is there to be told anything."""


def context_of(caller: PeerId, *, timeout_s: float | None) -> CallContext:
    """What the servicer is told, with a bounded deadline. On the event loop."""
    bounded_s = DEFAULT_CALL_S if timeout_s is None else min(timeout_s, MAX_CALL_S)
    return CallContext(caller, asyncio.get_running_loop().time() + bounded_s)


async def answer_call(
    servicer: Servicer,
    method: Method,
    frames: AsyncIterator[Frame],
    context: CallContext,
    send: Callable[[Frame], Awaitable[None]],
) -> CallRefused | Failure | None:
    """Serve one call; None when it ended well, or when nobody waits for it any more."""
    serve = {Method.FORWARD: servicer.forward, Method.BACKWARD: servicer.backward, Method.PROBE: servicer.probe}[method]
    try:
        async with asyncio.timeout_at(context.deadline_s), _closing(serve(frames, context)) as replies:
            async for frame in replies:
                await send(frame)
    except CallRefused as refusal:
        return refusal
    except CallerGone:
        return None
    except TimeoutError:
        return Failure.DEADLINE
    except Exception:
        # As text: a renderer that is handed the exception may print its frames' tensors, and block the loop.
        failure = traceback.format_exc()
        log.error("call.failed", method=method.value, caller=context.caller, exception=failure)  # noqa: TRY400
        return Failure.BUG
    return None


async def answer_info(servicer: Servicer, request: InfoRequest) -> InfoReply | CallRefused | Failure:
    """Serve one Info."""
    try:
        async with asyncio.timeout(INFO_S):
            return await servicer.info(request)
    except CallRefused as refusal:
        return refusal
    except TimeoutError:
        return Failure.DEADLINE
    except Exception:
        log.exception("info.failed")
        return Failure.BUG


@asynccontextmanager
async def _closing(replies: AsyncIterator[Frame]) -> AsyncGenerator[AsyncIterator[Frame]]:
    """Have the servicer's `finally` run now, not when the garbage is collected."""
    try:
        yield replies
    finally:
        if isinstance(replies, AsyncGenerator):
            await replies.aclose()
