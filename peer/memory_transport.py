"""A network inside one process: the same frames, identities, deadlines and refusals as gRPC, and faults on request.

Frames are bytes and Info is serialised both ways, so nothing can be shared by accident. Time is the event loop's
alone, so that it runs on a virtual clock as well; credentials are dated by it too.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from peer.addresses import join_address, split_address
from peer.answering import CallerGone, Failure, answer_call, answer_info, context_of
from peer.certificates import sha256_of
from peer.credentials import CredentialChecker, CredentialIssuer
from peer.errors import CouldNotListen, DeadlineExceeded, PeerUnreachable, RemoteError
from peer.faults import Fault, Faults
from peer.identity import Identity
from peer.refusals import ERROR_OF_REFUSAL
from peer.transport import CallRefused, Endpoint, Frame, Method, PeerId, Server, Servicer
from protos.swarm_pb2 import InfoReply, InfoRequest


class MemoryNetwork:
    """What `MemoryTransport`s share. Belongs to one event loop."""

    def __init__(self, *, seed: int = 0) -> None:
        self.faults = Faults(seed=seed)
        self._servers: dict[str, MemoryServer] = {}
        self._ports = itertools.count(1)
        self._certificates = itertools.count(1)

    def transport(self, identity: Identity) -> "MemoryTransport":
        """A member's way into this network; like a process, it has a certificate of its own."""
        return MemoryTransport(self, identity, b"certificate %d" % next(self._certificates))

    def bind(self, listen: str, server: "MemoryServer") -> str:
        host, port = split_address(listen, allow_port_0=True)
        address = join_address(host, port or next(self._ports))
        if address in self._servers:
            raise CouldNotListen(f"cannot listen on {listen}: the port is taken")
        self._servers[address] = server
        return address

    def release(self, address: str) -> None:
        self._servers.pop(address, None)

    def server_at(self, address: str) -> "MemoryServer | None":
        return self._servers.get(address)


class MemoryServer:
    """A listening servicer."""

    def __init__(self, network: MemoryNetwork, servicer: Servicer, listen: str, peer_id: PeerId, cert: bytes) -> None:
        self.servicer = servicer
        self.peer_id = peer_id
        self.certificate_der = cert
        self.checker = CredentialChecker(peer_id, sha256_of(cert))
        self._network = network
        self._address = network.bind(listen, self)
        self._calls: set[asyncio.Task[CallRefused | Failure | None]] = set()

    @property
    def address(self) -> str:
        return self._address

    def start(self, exchange: "_Exchange") -> asyncio.Task[CallRefused | Failure | None]:
        """Serve one call. The task is its caller's to cancel, and `close`'s."""
        call = asyncio.create_task(exchange.serve(self))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def close(self, grace_s: float) -> None:
        """See `Server`."""
        self._network.release(self._address)
        if self._calls:
            _, running = await asyncio.wait(self._calls, timeout=grace_s)
            for call in running:
                call.cancel()


class MemoryTransport:
    """One member's `Transport`."""

    def __init__(self, network: MemoryNetwork, identity: Identity, certificate_der: bytes) -> None:
        self._network = network
        self._identity = identity
        self._certificate_der = certificate_der
        self._issuer = CredentialIssuer(identity)
        self._servers: list[MemoryServer] = []

    @property
    def certificate_der(self) -> bytes:
        return self._certificate_der

    async def info(self, address: str, request: InfoRequest, *, timeout_s: float) -> tuple[InfoReply, bytes]:
        """See `Transport`."""
        server = self._network.server_at(address)
        if server is None or self._network.faults.are_apart(self._identity.peer_id, server.peer_id):
            raise PeerUnreachable("cannot connect: nobody listens there", peer_id=address, method="Info")
        received = InfoRequest.FromString(request.SerializeToString())
        try:
            async with asyncio.timeout(timeout_s):
                answer = await answer_info(server.servicer, received)
        except TimeoutError:
            answer = Failure.DEADLINE
        if not isinstance(answer, InfoReply):
            raise _error_of(answer, peer_id=PeerId(address), method="Info")
        return InfoReply.FromString(answer.SerializeToString()), server.certificate_der

    async def call(
        self, endpoint: Endpoint, method: Method, frames: AsyncIterable[Frame], *, timeout_s: float
    ) -> AsyncGenerator[Frame]:
        """See `Transport`."""
        now_s = asyncio.get_running_loop().time()
        fault = self._network.faults.draw(self._identity.peer_id, endpoint.peer_id, method)
        server = self._network.server_at(endpoint.address)
        if fault.is_unreachable or server is None or server.certificate_der != endpoint.certificate_der:
            raise PeerUnreachable("cannot connect", peer_id=endpoint.peer_id, method=method.value)
        credential = self._issuer.credential(endpoint, now_unix_s=now_s)
        exchange = _Exchange(method, frames, fault, credential, deadline_s=now_s + timeout_s)
        serving = server.start(exchange)
        serving.add_done_callback(exchange.end)
        try:
            for num_read in itertools.count():
                if num_read == fault.cut_after:
                    raise PeerUnreachable("the connection broke", peer_id=endpoint.peer_id, method=method.value)
                frame = await exchange.next_reply()
                if frame is None:
                    break
                yield frame
            if exchange.bug_of_caller is not None:
                raise exchange.bug_of_caller
            if serving.cancelled():
                raise PeerUnreachable("the peer closed", peer_id=endpoint.peer_id, method=method.value)
            if (ending := serving.result()) is not None:
                raise _error_of(ending, peer_id=endpoint.peer_id, method=method.value)
        except TimeoutError:
            raise _error_of(Failure.DEADLINE, peer_id=endpoint.peer_id, method=method.value) from None
        finally:
            serving.cancel()

    async def serve(self, servicer: Servicer, listen: str) -> Server:
        """See `Transport`."""
        server = MemoryServer(self._network, servicer, listen, self._identity.peer_id, self._certificate_der)
        self._servers.append(server)
        return server

    async def close(self) -> None:
        """See `Transport`."""
        for server in self._servers:
            await server.close(0)


class _Exchange:
    """The wire of one call: what the caller sends, what comes back, and what is lost on the way."""

    def __init__(
        self, method: Method, frames: AsyncIterable[Frame], fault: Fault, credential: bytes, *, deadline_s: float
    ) -> None:
        self.bug_of_caller: Exception | None = None
        self._method = method
        self._frames = frames
        self._fault = fault
        self._credential = credential
        self._deadline_s = deadline_s
        self._replies: asyncio.Queue[Frame | None] = asyncio.Queue()

    async def serve(self, server: MemoryServer) -> CallRefused | Failure | None:
        """The receiving side, in a task of its own."""
        now_s = asyncio.get_running_loop().time
        if self._fault.loses_request:
            await asyncio.Event().wait()
        await asyncio.sleep(self._fault.delay_s)
        try:
            caller = server.checker.check(self._credential, now_unix_s=now_s())
        except CallRefused as refusal:
            return refusal
        context = context_of(caller, timeout_s=self._deadline_s - now_s())
        return await answer_call(server.servicer, self._method, self._received(), context, self._send)

    async def next_reply(self) -> Frame | None:
        """The next frame, None at the end; TimeoutError at the deadline."""
        async with asyncio.timeout_at(self._deadline_s):
            return await self._replies.get()

    def end(self, _: object) -> None:
        """The receiving side is done. If its answer is lost, nobody hears of that either."""
        if not self._fault.loses_answer:
            self._replies.put_nowait(None)

    async def _received(self) -> AsyncIterator[Frame]:
        try:
            async for frame in self._frames:
                yield frame
        except Exception as bug:
            self.bug_of_caller = bug
            raise CallerGone from bug

    async def _send(self, frame: Frame) -> None:
        if not self._fault.loses_answer:
            self._replies.put_nowait(frame)


def _error_of(ending: CallRefused | Failure, *, peer_id: PeerId, method: str) -> RemoteError:
    if isinstance(ending, CallRefused):
        return ERROR_OF_REFUSAL[ending.refusal](str(ending), peer_id=peer_id, method=method)
    kind = DeadlineExceeded if ending is Failure.DEADLINE else PeerUnreachable
    return kind(str(ending), peer_id=peer_id, method=method)
