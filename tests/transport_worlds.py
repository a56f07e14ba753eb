"""The transports as one kind of place for the contract suite, and a servicer that does as it is told."""

import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from peer.emulated_transport import EmulatedTransport
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.links import Link, uniform
from peer.memory_transport import MemoryNetwork
from peer.transport import CallContext, Endpoint, Frame, Method, Server, Transport
from protos.swarm_pb2 import InfoReply, InfoRequest

Answer = Callable[[AsyncIterator[Frame], CallContext], AsyncIterator[Frame]]


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


def emulated_world() -> World:
    """Every member behind links of its own that hold nothing back."""
    network = MemoryNetwork()
    return World(lambda identity: EmulatedTransport(network.transport(identity)))


def slow_world() -> World:
    """Over gRPC, every member behind links that delay and limit, a little."""

    def new_transport(identity: Identity) -> Transport:
        rng = random.Random(identity.peer_id)
        down = Link(bits_per_s=1e9, delay=uniform(0.002, 0.001), rng=rng)
        return EmulatedTransport(GrpcTransport(identity), up=Link(bits_per_s=1e9), down=down)

    return World(new_transport)


class TestServicer:
    """Answers every streamed method with one function."""

    __test__ = False

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def info(self, request: InfoRequest) -> InfoReply:
        return InfoReply(software_version="test", signature=request.nonce)

    def forward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._answer(frames, context)

    backward = probe = forward


async def echo(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
    async for frame in frames:
        yield frame


def before(action: Callable[[CallContext], Awaitable[None]], answer: Answer = echo) -> Answer:
    """A servicer's function that first does something else, such as waiting or refusing."""

    async def act(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        await action(context)
        async for reply in answer(frames, context):
            yield reply

    return act


async def sending(*contents: Frame) -> AsyncIterator[Frame]:
    for content in contents:
        yield content


async def ask(
    caller: Member,
    endpoint: Endpoint,
    frames: AsyncIterable[Frame] | None = None,
    *,
    method: Method = Method.FORWARD,
    timeout_s: float = 5.0,
) -> list[Frame]:
    """The whole answer."""
    stream = caller.transport.call(endpoint, method, frames or sending(b"hello"), timeout_s=timeout_s)
    async with aclosing(stream) as replies:
        return [frame async for frame in replies]
