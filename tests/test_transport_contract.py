"""What every transport promises, asked of each."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from peer.errors import (
    CouldNotListen,
    DeadlineExceeded,
    NotAuthorised,
    PeerOverloaded,
    PeerUnreachable,
    RemoteError,
    RequestRejected,
)
from peer.identity import Identity
from peer.refusals import ERROR_OF_REFUSAL
from peer.transport import CHUNK_BYTES, CallContext, CallRefused, Frame, Method, Refusal
from protos.swarm_pb2 import InfoRequest
from tests.transport_worlds import (
    World,
    ask,
    before,
    echo,
    emulated_world,
    grpc_world,
    memory_world,
    sending,
    slow_world,
)


@pytest.fixture(
    params=[memory_world, grpc_world, emulated_world, slow_world], ids=["memory", "grpc", "emulated", "slow"]
)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    make: Callable[[], World] = request.param
    world = make()
    yield world
    await world.close()


@pytest.mark.parametrize("method", Method)
async def test_frames_come_back_whole_and_in_order(world: World, method: Method) -> None:
    peer, trainer = await world.serving(echo), world.member()

    answer = await ask(trainer, peer.endpoint, sending(b"one", b"two", b"three"), method=method)

    assert answer == [b"one", b"two", b"three"]


async def test_ten_megabytes_travel_intact_both_ways(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()
    contents = [secrets.token_bytes(CHUNK_BYTES) for _ in range(10)]

    answer = await ask(trainer, peer.endpoint, sending(*contents))

    assert answer == contents


async def test_an_answer_may_begin_before_the_call_has_ended(world: World) -> None:
    answered = asyncio.Event()

    async def frames() -> AsyncIterator[Frame]:
        yield b"first"
        await answered.wait()
        yield b"second"

    peer, trainer = await world.serving(echo), world.member()
    contents: list[bytes] = []

    async for frame in trainer.transport.call(peer.endpoint, Method.FORWARD, frames(), timeout_s=5):
        contents.append(frame)
        answered.set()

    assert contents == [b"first", b"second"]


@pytest.mark.parametrize("refusal", Refusal)
async def test_a_refusal_arrives_as_its_error_with_its_sentence(world: World, refusal: Refusal) -> None:
    async def refuse(_: CallContext) -> None:
        raise CallRefused(refusal, "not today: Grüße")

    peer, trainer = await world.serving(before(refuse)), world.member()

    with pytest.raises(ERROR_OF_REFUSAL[refusal], match="not today: Grüße") as error:
        await ask(trainer, peer.endpoint)

    assert error.value.peer_id == peer.identity.peer_id
    assert error.value.method == "Forward"


async def test_a_refusal_reaches_a_caller_that_is_still_writing(world: World) -> None:
    async def refuse(_: CallContext) -> None:
        raise CallRefused(Refusal.OVERLOADED, "not now")

    peer, trainer = await world.serving(before(refuse)), world.member()
    contents = [bytes(CHUNK_BYTES)] * 32

    for _ in range(10):
        with pytest.raises(PeerOverloaded, match="not now"):
            await ask(trainer, peer.endpoint, sending(*contents))


async def test_a_refusal_after_part_of_the_answer_still_counts(world: World) -> None:
    async def half(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        yield b"half"
        raise CallRefused(Refusal.OVERLOADED, "had to go")

    peer, trainer = await world.serving(half), world.member()
    answer = trainer.transport.call(peer.endpoint, Method.FORWARD, sending(b"x"), timeout_s=5)

    assert await anext(answer) == b"half"
    with pytest.raises(PeerOverloaded, match="had to go"):
        await anext(answer)


async def test_a_servicers_bug_ends_the_call_and_not_the_server(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    bugs = iter([ZeroDivisionError("a bug")])

    async def fail_once(_: CallContext) -> None:
        for bug in bugs:
            raise bug

    peer, trainer = await world.serving(before(fail_once)), world.member()

    with pytest.raises(PeerUnreachable, match="failed on the call"):
        await ask(trainer, peer.endpoint)

    assert await ask(trainer, peer.endpoint) == [b"hello"]
    assert capsys.readouterr().out.count("ZeroDivisionError: a bug") == 1


async def test_a_bug_in_the_callers_frames_is_raised_at_the_caller(world: World) -> None:
    async def frames() -> AsyncIterator[Frame]:
        yield b"x"
        raise ZeroDivisionError("a bug of ours")

    peer, trainer = await world.serving(echo), world.member()

    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        await ask(trainer, peer.endpoint, frames())


async def test_a_servicer_that_hangs_costs_the_caller_its_deadline_and_no_more(world: World) -> None:
    cut = asyncio.Event()

    async def hang(_: CallContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cut.set()

    peer, trainer = await world.serving(before(hang)), world.member()
    began_s = asyncio.get_running_loop().time()

    with pytest.raises(DeadlineExceeded):
        await ask(trainer, peer.endpoint, timeout_s=0.2)

    assert asyncio.get_running_loop().time() - began_s < 0.2 + 0.5
    await asyncio.wait_for(cut.wait(), 0.5)


async def test_a_caller_that_never_ends_its_stream_is_cut_at_its_deadline(world: World) -> None:
    async def frames() -> AsyncIterator[Frame]:
        yield b"x"
        await asyncio.Event().wait()

    peer, trainer = await world.serving(echo), world.member()

    with pytest.raises(DeadlineExceeded):
        await ask(trainer, peer.endpoint, frames(), timeout_s=0.2)


async def test_a_deadline_in_the_past_fails_at_once(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()

    with pytest.raises(DeadlineExceeded):
        await ask(trainer, peer.endpoint, timeout_s=-1.0)


async def test_closing_the_answer_cancels_the_servicer(world: World) -> None:
    cancelled = asyncio.Event()

    async def then_hang(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    peer, trainer = await world.serving(then_hang), world.member()
    answer = trainer.transport.call(peer.endpoint, Method.FORWARD, sending(b"x"), timeout_s=5)
    assert await anext(answer) == b"begun"

    await answer.aclose()

    await asyncio.wait_for(cancelled.wait(), 2)


async def test_cancelling_the_callers_task_cancels_the_servicer(world: World) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(_: CallContext) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    peer, trainer = await world.serving(before(hang)), world.member()
    call = asyncio.create_task(ask(trainer, peer.endpoint))
    await asyncio.wait_for(begun.wait(), 2)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(cancelled.wait(), 2)


async def test_nobody_listening_is_unreachable_before_the_deadline(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()
    endpoint = peer.endpoint
    await peer.transport.close()

    async with asyncio.timeout(2):
        with pytest.raises(PeerUnreachable):
            await ask(trainer, endpoint, timeout_s=10)


async def test_closing_lets_running_calls_end_and_takes_no_new_ones(world: World) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def wait(_: CallContext) -> None:
        begun.set()
        await may_end.wait()

    peer, trainer, late = await world.serving(before(wait)), world.member(), world.member()
    assert peer.server is not None
    endpoint = peer.endpoint
    running = asyncio.create_task(ask(trainer, endpoint))
    await begun.wait()

    closing = asyncio.create_task(peer.server.close(grace_s=5))
    await asyncio.sleep(0)  # it begins
    with pytest.raises(PeerUnreachable):
        await ask(late, endpoint)
    may_end.set()

    assert await running == [b"hello"]
    await closing


async def test_closing_cuts_what_outlasts_the_grace_and_may_be_repeated(world: World) -> None:
    begun = asyncio.Event()

    async def hang(_: CallContext) -> None:
        begun.set()
        await asyncio.Event().wait()

    peer, trainer = await world.serving(before(hang)), world.member()
    assert peer.server is not None
    running = asyncio.create_task(ask(trainer, peer.endpoint))
    await begun.wait()

    async with asyncio.timeout(2):
        await peer.server.close(grace_s=0.05)
        await peer.server.close(grace_s=0.05)

    with pytest.raises(PeerUnreachable):
        await running


async def test_a_servicer_knows_which_of_two_callers_is_calling(world: World) -> None:
    seen: list[str] = []

    async def note(context: CallContext) -> None:
        seen.append(context.caller)

    peer, one, two = await world.serving(before(note)), world.member(), world.member()

    for caller in (one, two, one):
        await ask(caller, peer.endpoint)

    assert seen == [one.identity.peer_id, two.identity.peer_id, one.identity.peer_id]


async def test_a_credential_for_another_peer_is_not_accepted(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()
    impostor = replace(peer.endpoint, peer_id=Identity.generate().peer_id)

    with pytest.raises(NotAuthorised, match="for another peer"):
        await ask(trainer, impostor)


async def test_another_certificate_than_the_records_is_not_trusted(world: World) -> None:
    peer, other, trainer = await world.serving(echo), world.member(), world.member()
    imitated = replace(peer.endpoint, certificate_der=other.transport.certificate_der)

    with pytest.raises(PeerUnreachable):
        await ask(trainer, imitated)


async def test_a_peer_that_restarts_with_a_new_certificate_is_reached_again(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()
    assert await ask(trainer, peer.endpoint) == [b"hello"]
    old = peer.endpoint
    await peer.transport.close()

    again = await world.serving(echo, identity=peer.identity, listen=old.address)

    with pytest.raises(PeerUnreachable):
        await ask(trainer, old)
    assert await ask(trainer, again.endpoint) == [b"hello"]


async def test_a_taken_port_cannot_be_listened_on(world: World) -> None:
    peer = await world.serving(echo)

    with pytest.raises(CouldNotListen, match="taken"):
        await world.serving(echo, listen=peer.endpoint.address)


async def test_info_needs_no_identity_and_brings_the_certificate(world: World) -> None:
    peer, stranger = await world.serving(echo), world.member()

    reply, certificate_der = await stranger.transport.info(
        peer.endpoint.address, InfoRequest(nonce=b"n" * 16), timeout_s=5
    )

    assert (reply.software_version, reply.signature) == ("test", b"n" * 16)
    assert certificate_der == peer.transport.certificate_der


async def test_info_of_nobody_is_unreachable(world: World) -> None:
    peer, stranger = await world.serving(echo), world.member()
    address = peer.endpoint.address
    await peer.transport.close()

    with pytest.raises(PeerUnreachable, match="cannot connect"):
        await stranger.transport.info(address, InfoRequest(), timeout_s=5)


async def test_many_calls_at_once_do_not_mix(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()

    answers = await asyncio.gather(*(ask(trainer, peer.endpoint, sending(b"%d" % n)) for n in range(300)))

    assert answers == [[b"%d" % n] for n in range(300)]


def test_every_refusal_has_an_error_that_is_not_retried_or_is_not_now() -> None:
    assert ERROR_OF_REFUSAL.keys() == set(Refusal)
    assert set(ERROR_OF_REFUSAL.values()) <= {RequestRejected, NotAuthorised, PeerOverloaded}
    assert all(issubclass(error, RemoteError) for error in ERROR_OF_REFUSAL.values())
