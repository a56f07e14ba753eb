"""The two transports as one kind of place for the contract suite, and a servicer that does as it is told."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.memory_transport import MemoryNetwork
from peer.transport import CallContext, Endpoint, Method, Server, Transport
from protos.swarm_pb2 import CallFrame, InfoReply, InfoRequest, ReplyFrame

Answer = Callable[[AsyncIterator[CallFrame], CallContext], AsyncIterator[ReplyFrame]]


@dataclass
class Member:
    """A transport and who it is."""

    identity: Identity
    transport: Transport
    server: Server | None = None

    @property
    def endpoint(self) -> Endpoint:
        assert self.server is not None
        return Endpoint(self.identity.peer_id, self.server.address, self.transport.certificate_der)


class World:
    """Makes members that can talk to each other."""

    def __init__(self, new_transport: Callable[[Identity], Transport]) -> None:
        self._new_transport = new_transport
        self._members: list[Member] = []

    def member(self, identity: Identity | None = None) -> Member:
        identity = identity or Identity.generate()
        self._members.append(Member(identity, self._new_transport(identity)))
        return self._members[-1]

    async def serving(self, answer: Answer, *, identity: Identity | None = None, listen: str = "127.0.0.1:0") -> Member:
        member = self.member(identity)
        member.server = await member.transport.serve(TestServicer(answer), listen)
        return member

    async def close(self) -> None:
        for member in self._members:
            await member.transport.close()


def memory_world() -> World:
    return World(MemoryNetwork().transport)


def grpc_world() -> World:
    return World(GrpcTransport)


class TestServicer:
    """Answers both methods with one function."""

    __test__ = False

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def info(self, request: InfoRequest) -> InfoReply:
        return InfoReply(software_version="test", signature=request.nonce)

    def forward(self, frames: AsyncIterator[CallFrame], context: CallContext) -> AsyncIterator[ReplyFrame]:
        return self._answer(frames, context)

    backward = forward


async def echo(frames: AsyncIterator[CallFrame], context: CallContext) -> AsyncIterator[ReplyFrame]:
    async for frame in frames:
        yield ReplyFrame(chunk=frame.chunk)


def before(action: Callable[[CallContext], Awaitable[None]], answer: Answer = echo) -> Answer:
    """A servicer's function that first does something else, such as waiting or refusing."""

    async def act(frames: AsyncIterator[CallFrame], context: CallContext) -> AsyncIterator[ReplyFrame]:
        await action(context)
        async for reply in answer(frames, context):
            yield reply

    return act


async def chunks(*contents: bytes) -> AsyncIterator[CallFrame]:
    for content in contents:
        yield CallFrame(chunk=content)


async def ask(
    caller: Member,
    endpoint: Endpoint,
    frames: AsyncIterable[CallFrame] | None = None,
    *,
    method: Method = Method.FORWARD,
    timeout_s: float = 5.0,
) -> list[bytes]:
    """The chunks of the whole answer."""
    stream = caller.transport.call(endpoint, method, frames or chunks(b"hello"), timeout_s=timeout_s)
    async with aclosing(stream) as replies:
        return [reply.chunk async for reply in replies]
