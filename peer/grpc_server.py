"""The listening side of gRPC: TLS, who is calling, statuses. What a call means is the servicer's."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError

from peer.addresses import join_address, split_address
from peer.answering import CallerGone, Failure, answer_call, answer_info, context_of
from peer.certificates import Certificate
from peer.credentials import METADATA_KEY, CredentialChecker
from peer.errors import CouldNotListen
from peer.grpc_line import MAX_IDLE_S, ServerLine, call_limit_s
from peer.grpc_status import SERVICE, SHARED_OPTIONS, STATUS_OF_REFUSAL, grpc, name_of
from peer.transport import CallContext, CallRefused, Frame, Method, PeerId, Refusal, Servicer
from protos.swarm_pb2 import InfoReply, InfoRequest

_OPTIONS = [
    *SHARED_OPTIONS,
    ("grpc.so_reuseport", 0),  # else a second daemon on a taken port gets half of the first one's calls
    ("grpc.max_concurrent_streams", 1024),
    # Callers ping while they wait for an answer; by default a server calls that abuse and hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]
_TIDY_EVERY_S = 5.0


class GrpcServer:
    """A listening servicer. Make it and `start` it on the event loop it belongs to."""

    def __init__(self, servicer: Servicer, listen: str, *, peer_id: PeerId, certificate: Certificate) -> None:
        """Binds the port: raises CouldNotListen when that is impossible, ValueError when `listen` is no address."""
        self._servicer = servicer
        self._checker = CredentialChecker(peer_id, certificate.sha256)
        self._server = grpc.aio.server(options=_OPTIONS)
        self._is_closing = False
        self._idle: dict[asyncio.Task[Any], float] = {}
        """Lines between two calls, and until when each may be, on the loop's clock."""
        self._tidying: asyncio.TimerHandle | None = None
        handlers = {
            "Info": grpc.unary_unary_rpc_method_handler(self._info),
            **{method.value: grpc.stream_stream_rpc_method_handler(partial(self._answer, method)) for method in Method},
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        host, _ = split_address(listen, allow_port_0=True)
        credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.pem)])
        try:
            port = self._server.add_secure_port(listen, credentials)
        except RuntimeError:
            raise CouldNotListen(
                f"cannot listen on {listen}: the port is taken, or the host is not one of this machine's"
            ) from None
        self._address = join_address(host, port)

    async def start(self) -> None:
        await self._server.start()
        self._tidy()

    @property
    def address(self) -> str:
        """HOST:PORT actually bound."""
        return self._address

    async def close(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s`, then cut them. Idempotent."""
        self._is_closing = True
        if self._tidying is not None:
            self._tidying.cancel()
        self._dismiss(now_s=math.inf)
        await self._server.stop(grace_s)

    async def _info(self, data: bytes, context: Any) -> bytes:
        try:
            request = InfoRequest.FromString(data)
        except DecodeError:
            answer = CallRefused(Refusal.INVALID, "the request does not decode")
        else:
            answer = await answer_info(self._servicer, request)
        if isinstance(answer, InfoReply):
            return answer.SerializeToString()
        return await _abort(context, answer)

    async def _answer(self, method: Method, _: AsyncIterator[Frame], context: Any) -> None:
        """Serve a line."""

        metadata, now_unix_s = dict(context.invocation_metadata() or ()), time.time()
        credential = metadata.get(METADATA_KEY)
        try:
            caller = self._checker.check(credential, now_unix_s=now_unix_s)
        except CallRefused as refusal:
            await _abort(context, refusal)
            return
        assert credential is not None, "a call without one does not pass"
        left_s = self._checker.passes_until_unix_s(credential) - now_unix_s
        ends_s = asyncio.get_running_loop().time() + left_s
        line, limit_s = ServerLine(context), call_limit_s(context, metadata)

        async def send(frame: Frame) -> None:
            try:
                await line.mouth.say(frame)
            except grpc.aio.BaseError:
                raise CallerGone from None

        try:
            while await self._answer_one(method, line, context, context_of(caller, timeout_s=limit_s), send):
                if self._is_closing or not await self._wait_for_another(line, ends_s=ends_s):
                    break
        finally:
            line.mouth.shut()

    async def _answer_one(
        self,
        method: Method,
        line: ServerLine,
        context: Any,
        call_context: CallContext,
        send: Callable[[Frame], Awaitable[None]],
    ) -> bool:
        """Answer a line's present call; False when it was the last."""
        ending = await answer_call(self._servicer, method, line.frames(), call_context, send)
        is_last = ending is not None or not line.is_at_end or self._is_closing
        with suppress(grpc.aio.BaseError):  # the caller is gone, as whoever reads or aborts next will hear
            await (line.mouth.flush() if is_last else line.mouth.end_call())
        if ending is not None:
            await _abort(context, ending)
        return not is_last

    async def _wait_for_another(self, line: ServerLine, *, ends_s: float) -> bool:
        """False when no call will come, or we have waited long enough."""
        waiting = asyncio.current_task()
        assert waiting is not None
        self._idle[waiting] = min(asyncio.get_running_loop().time() + MAX_IDLE_S, ends_s)
        try:
            return await line.next_call()
        except asyncio.CancelledError:
            if waiting in self._idle:  # by gRPC: the caller is gone
                raise
            return False
        finally:
            self._idle.pop(waiting, None)

    def _dismiss(self, *, now_s: float) -> None:
        """End the lines whose wait is over."""
        for waiting in [waiting for waiting, until_s in self._idle.items() if until_s <= now_s]:
            del self._idle[waiting]
            waiting.cancel()

    def _tidy(self) -> None:
        """One timer for all lines: each having its own costs every call something."""
        loop = asyncio.get_running_loop()
        self._dismiss(now_s=loop.time())
        self._tidying = loop.call_later(_TIDY_EVERY_S, self._tidy)


async def _abort(context: Any, ending: CallRefused | Failure) -> Any:
    """Ends the call with a status; gRPC does it by raising."""
    if isinstance(ending, CallRefused):
        await context.abort(STATUS_OF_REFUSAL[ending.refusal], str(ending), name_of(ending))
    is_late = ending is Failure.DEADLINE
    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.INTERNAL, str(ending))
