"""Members over gRPC and TLS 1.3: the dialling side, and the `Transport` of real processes.

One connection per endpoint, certificate included: a peer that restarted with a new certificate is another endpoint.
"""

import asyncio
import math
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from peer.addresses import split_address
from peer.answering import DEFAULT_CALL_S
from peer.certificates import SERVER_NAME, Certificate, pem_of
from peer.credentials import LIFETIME_S, METADATA_KEY, CredentialIssuer
from peer.errors import DeadlineExceeded, MalformedReply, PeerUnreachable
from peer.grpc_line import CALL_LIMIT_KEY, Attempt, CallerLine, Repeatable
from peer.grpc_server import GrpcServer
from peer.grpc_status import SERVICE, SHARED_OPTIONS, StatusWitness, grpc
from peer.identity import Identity
from peer.transport import Endpoint, Frame, Method, PeerId, Servicer
from protos.swarm_pb2 import InfoReply, InfoRequest

_OPTIONS: list[tuple[str, int | str]] = [
    *SHARED_OPTIONS,
    ("grpc.ssl_target_name_override", SERVER_NAME),
    ("grpc.keepalive_time_ms", 1000),  # while calls are open; this is what notices a frozen or cut-off peer
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # not a pause: what TCP, TLS and HTTP/2 together may take
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


_MAX_IDLE_LINES = 64
"""Per connection and method. As many calls as were ever under way together, up to this."""
_MAX_UNUSED_S = 120.0
"""A connection without a call for so long is closed: peers come and go, and most do not come back."""
_TIDY_EVERY_S = 10.0


@dataclass(eq=False)
class _Connection:
    channel: Any
    used_s: float
    """When it was dialled or a call last ended, on the loop's clock."""
    num_calls: int = 0
    is_retired: bool = False
    idle: defaultdict[Method, list[CallerLine]] = field(default_factory=lambda: defaultdict(list))
    """Open lines that nobody uses, the last used last."""

    def take_idle(self, method: Method, *, timeout_s: float, now_s: float) -> CallerLine | None:
        lines = self.idle[method]
        while lines:
            line = lines.pop()
            if line.is_good_for(timeout_s, now_s=now_s):
                return line
            line.cut()
        return None

    def keep(self, method: Method, line: CallerLine, *, now_s: float) -> None:
        if self.is_retired or len(self.idle[method]) == _MAX_IDLE_LINES:
            line.cut()
        else:
            line.rest(now_s=now_s)
            self.idle[method].append(line)

    def cut_idle(self, *, now_s: float = math.inf) -> None:
        """Those whose time is over; by default all."""
        for method, lines in self.idle.items():
            self.idle[method] = [line for line in lines if line.is_good_for(0, now_s=now_s)]
            for line in lines:
                if not line.is_good_for(0, now_s=now_s):
                    line.cut()


class GrpcTransport:
    """Dials and listens as one identity with one certificate. Belongs to the event loop it is first used on."""

    def __init__(self, identity: Identity, certificate: Certificate | None = None) -> None:
        self._identity = identity
        self._certificate = certificate or Certificate.generate()
        self._issuer = CredentialIssuer(identity)
        self._connections: dict[PeerId, tuple[Endpoint, _Connection]] = {}
        self._unclosed: set[_Connection] = set()
        """These, and the retired ones whose last calls are under way."""
        self._closing: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.TimerHandle | None = None
        self._servers: list[GrpcServer] = []

    @property
    def certificate_der(self) -> bytes:
        """What our servers present."""
        return self._certificate.der

    async def info(self, address: str, request: InfoRequest, *, timeout_s: float) -> tuple[InfoReply, bytes]:
        """See `Transport`. Two handshakes: one to see the certificate, one that trusts nothing else."""
        try:
            async with asyncio.timeout(timeout_s):
                certificate_der = await _certificate_at(address)
                return await _ask(address, request, certificate_der), certificate_der
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s", peer_id=address, method="Info") from None
        except ssl.SSLError as error:
            raise MalformedReply(f"no swarmoe listens there: {error.reason}", peer_id=address, method="Info") from None
        except OSError as error:
            reason = error.strerror or "the connection broke"
            raise PeerUnreachable(f"cannot connect: {reason}", peer_id=address, method="Info") from None

    async def call(
        self, endpoint: Endpoint, method: Method, frames: AsyncIterable[Frame], *, timeout_s: float
    ) -> AsyncGenerator[Frame]:
        """See `Transport`."""
        if timeout_s <= 0:
            raise DeadlineExceeded("no time left", peer_id=endpoint.peer_id, method=method.value)
        now_s = asyncio.get_running_loop().time()
        connection = self._connect(endpoint)
        connection.num_calls += 1
        line = connection.take_idle(method, timeout_s=timeout_s, now_s=now_s)
        words = Repeatable(frames) if line is not None else None
        line = line or self._open(connection, endpoint, method, timeout_s)
        attempt = Attempt(line, words or frames, deadline_s=now_s + timeout_s)
        is_over = False
        try:
            if words is not None:
                if not await line.is_answered():
                    await attempt.sender  # which has nobody to say the rest to
                    await attempt.give_up()
                    if not words.rewind():
                        raise PeerUnreachable("the peer closed", peer_id=endpoint.peer_id, method=method.value)
                    # Once, and to the same peer. It has taken nothing of the call; had it taken a backward all the
                    # same, the call id would tell it so.
                    line = self._open(connection, endpoint, method, timeout_s)
                    attempt = Attempt(line, words, deadline_s=now_s + timeout_s)
                words.settle()
            async for frame in line.replies():
                yield frame
            await attempt.sender
            is_over = line.is_open
        except grpc.aio.AioRpcError:
            failure = await line.error()
            if isinstance(failure, PeerUnreachable):
                self._retire(endpoint, connection)  # the next call dials afresh instead of waiting out a back-off
            if failure is not None:
                raise failure from None
        except asyncio.CancelledError:
            sender = attempt.sender
            if sender.done() and not sender.cancelled() and (bug := sender.exception()) is not None:
                raise bug from None  # `frames` raised, for which the line was cut
            if attempt.is_late and not _is_cancelled():
                raise DeadlineExceeded(
                    f"no answer within {timeout_s:g} s", peer_id=endpoint.peer_id, method=method.value
                ) from None
            raise
        finally:
            connection.num_calls -= 1
            connection.used_s = asyncio.get_running_loop().time()
            if is_over:
                attempt.deadline.cancel()
                connection.keep(method, line, now_s=connection.used_s)
            else:
                await attempt.give_up()
            self._close_if_over(connection)

    async def serve(self, servicer: Servicer, listen: str) -> GrpcServer:
        """See `Transport`."""
        server = GrpcServer(servicer, listen, peer_id=self._identity.peer_id, certificate=self._certificate)
        await server.start()
        self._servers.append(server)
        return server

    async def close(self) -> None:
        """Cut every call, in and out, and close. Idempotent."""
        for server in self._servers:
            await server.close(0)
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
        connections = list(self._unclosed)
        self._connections.clear()
        self._unclosed.clear()
        for connection in connections:
            await connection.channel.close()
        await asyncio.gather(*self._closing)

    def _open(self, connection: _Connection, endpoint: Endpoint, method: Method, timeout_s: float) -> CallerLine:
        credential = self._issuer.credential(endpoint, now_unix_s=time.time())
        call_limit_s = max(timeout_s, DEFAULT_CALL_S)
        rpc = connection.channel.stream_stream(f"/{SERVICE}/{method.value}")(
            metadata=((METADATA_KEY, credential), (CALL_LIMIT_KEY, str(int(1e3 * call_limit_s))))
        )
        return CallerLine(
            rpc,
            peer_id=endpoint.peer_id,
            method=method.value,
            call_limit_s=call_limit_s,
            until_s=asyncio.get_running_loop().time() + LIFETIME_S / 2,  # as long as its credential lives at the least
        )

    def _connect(self, endpoint: Endpoint) -> _Connection:
        known, connection = self._connections.get(endpoint.peer_id, (None, None))
        if connection is not None and known is not None:
            if known == endpoint:
                return connection
            self._retire(known, connection)
        now_s = asyncio.get_running_loop().time()
        connection = _Connection(_dial(endpoint.address, endpoint.certificate_der), used_s=now_s)
        self._connections[endpoint.peer_id] = (endpoint, connection)
        self._unclosed.add(connection)
        if self._tidying is None:
            self._tidy_later()
        return connection

    def _retire(self, endpoint: Endpoint, connection: _Connection) -> None:
        """No new calls on this one; it closes with its last call."""
        connection.is_retired = True
        connection.cut_idle()
        if self._connections.get(endpoint.peer_id) == (endpoint, connection):
            del self._connections[endpoint.peer_id]
        self._close_if_over(connection)

    def _close_if_over(self, connection: _Connection) -> None:
        if connection.is_retired and connection.num_calls == 0 and connection in self._unclosed:
            self._unclosed.remove(connection)
            closing = asyncio.create_task(connection.channel.close())  # ours: awaited in `close`
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _tidy_later(self) -> None:
        self._tidying = asyncio.get_running_loop().call_later(_TIDY_EVERY_S, self._tidy)

    def _tidy(self) -> None:
        """Let go of what nobody has used for long; from time to time, while there are connections."""
        self._tidying = None
        now_s = asyncio.get_running_loop().time()
        for endpoint, connection in list(self._connections.values()):
            connection.cut_idle(now_s=now_s)
            if connection.num_calls == 0 and now_s - connection.used_s > _MAX_UNUSED_S:
                self._retire(endpoint, connection)
        if self._connections:
            self._tidy_later()


def _dial(address: str, certificate_der: bytes) -> Any:
    credentials = grpc.ssl_channel_credentials(root_certificates=pem_of(certificate_der))
    return grpc.aio.secure_channel(address, credentials, options=_OPTIONS)


async def _ask(address: str, request: InfoRequest, certificate_der: bytes) -> InfoReply:
    async with _dial(address, certificate_der) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Info")(request.SerializeToString())
        witness = StatusWitness(call)
        try:
            return InfoReply.FromString(await call)
        except grpc.aio.AioRpcError:
            failure = await witness.error(peer_id=PeerId(address), method="Info")
            assert failure is not None, "an answer that failed has another status than OK"
            raise failure from None
        except DecodeError:
            raise MalformedReply("the answer does not decode", peer_id=address, method="Info") from None


def _is_cancelled() -> bool:
    """Did somebody cancel the task that waits, and not only its call?"""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _certificate_at(address: str) -> bytes:
    """The certificate (DER) of whoever listens there; nothing is trusted yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    host, port = split_address(address)
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        certificate_der = tls.getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    assert certificate_der is not None, "a TLS server always sends its certificate"
    return certificate_der
