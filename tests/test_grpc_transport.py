"""What only real sockets show: TLS, statuses, hostile bytes, frozen peers."""

import asyncio
import base64
import random
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from peer.addresses import split_address
from peer.answering import DEFAULT_CALL_S, MAX_CALL_S
from peer.call_stream import read_call, write_call
from peer.certificates import Certificate, pem_of
from peer.credentials import CLOCK_SKEW_S, LIFETIME_S, METADATA_KEY, issue
from peer.errors import (
    CouldNotListen,
    DeadlineExceeded,
    MalformedReply,
    PeerUnreachable,
)
from peer.event_loop import EventLoopThread
from peer.grpc_line import CALL_LIMIT_KEY, END_OF_CALL, MAX_IDLE_S, ServerLine, heard
from peer.grpc_status import ERROR_OF_STATUS, SERVICE, STATUS_OF_REFUSAL, grpc
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.reply_stream import write_reply
from peer.transport import CHUNK_BYTES, CallContext, Endpoint, Frame, Method, Refusal
from protos.swarm_pb2 import CallFrame, InfoRequest
from tests.transport_worlds import Member, World, ask, echo, grpc_world, sending
from tests.virtual_clock import run_skipping, skip
from tests.wire_calls import LIMITS, forward_call, frames_of, whole_answer

StatusCode = grpc.StatusCode


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = grpc_world()
    yield world
    await world.close()


async def _read_and_answer(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
    await read_call(frames, LIMITS, Method.FORWARD)
    for frame in write_reply(whole_answer()):
        yield frame


@asynccontextmanager
async def _raw_channel(endpoint: Endpoint) -> AsyncIterator[Any]:
    """What a client of somebody else's making has: a connection, and whatever bytes it likes."""
    async with grpc.aio.secure_channel(endpoint.address, *_raw(endpoint)) as channel:
        yield channel


def _raw(endpoint: Endpoint) -> tuple[grpc.ChannelCredentials, list[tuple[str, str | int]]]:
    credentials = grpc.ssl_channel_credentials(pem_of(endpoint.certificate_der))
    return credentials, [("grpc.ssl_target_name_override", "swarmoe"), ("grpc.max_send_message_length", -1)]


async def _status_of(
    endpoint: Endpoint, frames: Iterable[bytes], *, credential: bytes | None, timeout_s: float | None = 5.0
) -> tuple[grpc.StatusCode, str]:
    """What a hostile caller is told. By gRPC's synchronous client, which does not forget statuses."""
    metadata = () if credential is None else ((METADATA_KEY, credential),)

    def call() -> tuple[grpc.StatusCode, str]:
        with grpc.secure_channel(endpoint.address, *_raw(endpoint)) as channel:
            replies = channel.stream_stream(f"/{SERVICE}/Forward")(iter(frames), metadata=metadata, timeout=timeout_s)
            try:
                list(replies)
            except grpc.RpcError:
                return replies.code(), replies.details()
            return StatusCode.OK, ""

    return await asyncio.to_thread(call)


def _credential(peer: Member) -> bytes:
    return issue(Identity.generate(), peer.endpoint, now_unix_s=time.time())


async def _still_serves(world: World, peer: Member) -> bool:
    return len(await ask(world.member(), peer.endpoint, write_call(forward_call()))) > 0


def test_every_status_and_every_refusal_is_translated() -> None:
    assert ERROR_OF_STATUS.keys() == set(StatusCode) - {StatusCode.OK}
    assert STATUS_OF_REFUSAL.keys() == set(Refusal)
    assert len(set(STATUS_OF_REFUSAL.values())) == len(Refusal)
    assert set(ERROR_OF_STATUS.values()) == {PeerUnreachable, DeadlineExceeded, MalformedReply}


@pytest.mark.parametrize("status", sorted(ERROR_OF_STATUS, key=lambda status: status.name))
async def test_a_status_that_is_no_refusal_arrives_as_the_tables_error(status: grpc.StatusCode) -> None:
    async def abort(_: Any, context: Any) -> None:
        await context.abort(status, "said the other side")

    async with _raw_server(abort) as endpoint:
        with pytest.raises(ERROR_OF_STATUS[status], match="said the other side"):
            await _call(endpoint)


@asynccontextmanager
async def _raw_server(forward: Any) -> AsyncIterator[Endpoint]:
    """Somebody else's server behind a good certificate."""
    certificate = Certificate.generate()
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handlers = {"Forward": grpc.stream_stream_rpc_method_handler(forward)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.pem)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield Endpoint(Identity.generate().peer_id, f"127.0.0.1:{port}", certificate.der)
    finally:
        await server.stop(0)


async def _call(endpoint: Endpoint) -> list[bytes]:
    transport = GrpcTransport(Identity.generate())
    try:
        async with aclosing(transport.call(endpoint, Method.FORWARD, sending(b"x"), timeout_s=5)) as replies:
            return [frame async for frame in replies]
    finally:
        await transport.close()


@asynccontextmanager
async def _counting_echo() -> AsyncIterator[tuple[Endpoint, list[int]]]:
    """A server that echoes; for each stream how many calls it carried."""
    calls: list[int] = []

    async def echo_calls(_: Any, context: Any) -> None:
        line, number = ServerLine(context), len(calls)
        calls.append(0)
        while True:
            calls[number] += 1
            async for frame in line.frames():
                await line.mouth.say(frame)
            await line.mouth.end_call()
            if not await line.next_call():
                return

    async with _raw_server(echo_calls) as endpoint:
        yield endpoint, calls


async def test_calls_one_after_the_other_share_a_stream() -> None:
    trainer = grpc_world().member()
    async with _counting_echo() as (endpoint, calls):
        answers = [await ask(trainer, endpoint, sending(b"%d" % n)) for n in range(5)]
        await trainer.transport.close()

    assert answers == [[b"%d" % n] for n in range(5)]
    assert calls == [5]


async def test_calls_side_by_side_have_streams_of_their_own_and_leave_them_to_the_next() -> None:
    trainer = grpc_world().member()
    async with _counting_echo() as (endpoint, calls):
        for _ in range(3):
            await asyncio.gather(*(ask(trainer, endpoint) for _ in range(4)))
        await trainer.transport.close()

    assert sum(calls) == 12
    assert len(calls) == 4


async def test_a_call_that_is_given_up_takes_its_stream_with_it() -> None:
    trainer = grpc_world().member()
    async with _counting_echo() as (endpoint, calls):
        assert await ask(trainer, endpoint) == [b"hello"]
        with pytest.raises(DeadlineExceeded):
            await ask(trainer, endpoint, _trickling(b"half a call"), timeout_s=0.2)
        assert await ask(trainer, endpoint) == [b"hello"]
        await trainer.transport.close()

    assert calls == [2, 1]


async def _trickling(*frames: Frame) -> AsyncIterator[Frame]:
    for frame in frames:
        yield frame
    await asyncio.Event().wait()


async def test_a_stream_that_nobody_uses_does_not_hold_up_a_closing_server(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()
    assert peer.server is not None
    await asyncio.gather(*(ask(trainer, peer.endpoint) for _ in range(3)))

    async with asyncio.timeout(2):
        await peer.server.close(grace_s=30)

    with pytest.raises(PeerUnreachable):
        await ask(trainer, peer.endpoint)


@pytest.mark.hostile
@pytest.mark.parametrize(("age_s", "lasts_s"), [(0, MAX_IDLE_S), (LIFETIME_S + CLOCK_SKEW_S - 40, 40)])
def test_a_stream_without_a_call_is_closed_in_time_and_with_its_credential_at_the_latest(
    age_s: float, lasts_s: float
) -> None:
    async def scenario() -> grpc.StatusCode:
        world = grpc_world()
        try:
            peer = await world.serving(echo)
            credential = issue(Identity.generate(), peer.endpoint, now_unix_s=time.time() - age_s)
            async with _raw_channel(peer.endpoint) as channel:
                line = channel.stream_stream(f"/{SERVICE}/Forward")(metadata=((METADATA_KEY, credential),))
                for _ in range(2):
                    await line.write(b"hello")
                    await line.write(END_OF_CALL)
                    while not (heard(await line.read()) or ([], False))[1]:
                        pass
                    skip(lasts_s - 10)
                ended = asyncio.ensure_future(line.read())
                for _ in range(10):  # when time goes by first, the server may not have begun to wait
                    skip(lasts_s)
                    if (await asyncio.wait({ended}, timeout=0.5))[0]:
                        break
                assert await ended is grpc.aio.EOF
                return await line.code()
        finally:
            await world.close()

    assert run_skipping(scenario()) is StatusCode.OK


def test_a_caller_leaves_a_stream_before_its_server_does() -> None:
    async def scenario() -> list[int]:
        trainer = grpc_world().member()
        async with _counting_echo() as (endpoint, calls):
            for pause_s in (0, 20, 20, 40, *[20] * 20):
                skip(pause_s)
                assert await ask(trainer, endpoint) == [b"hello"]
            await trainer.transport.close()
        return calls

    three, most, rest = run_skipping(scenario())

    assert three == 3  # then comes the long pause
    assert most == LIFETIME_S / 2 / 20  # then half of a credential's life is over
    assert rest == 24 - three - most


@asynccontextmanager
async def _closing_server(answered: Iterable[bool], *, status: grpc.StatusCode = StatusCode.OK) -> AsyncIterator[Any]:
    """Answers a stream's first call, or not; closes it when a second one comes. And how many streams there were."""
    streams: list[bool] = []
    answers = iter(answered)

    async def answer_once(_: Any, context: Any) -> None:
        streams.append(next(answers))
        line = ServerLine(context)
        async for frame in line.frames():
            if streams[-1]:
                await line.mouth.say(frame)
        if streams[-1]:
            await line.mouth.end_call()
            await line.next_call()
        if status is not StatusCode.OK:
            await context.abort(status)

    async with _raw_server(answer_once) as endpoint:
        yield endpoint, streams


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
async def test_a_call_whose_stream_had_been_closed_between_two_calls_is_made_once_more(num_chunks: int) -> None:
    trainer = grpc_world().member()
    frames = [b"header", *(b"%d" % n * CHUNK_BYTES for n in range(num_chunks))]
    async with _closing_server([True] * 3) as (endpoint, streams):
        for _ in range(3):
            assert await ask(trainer, endpoint, sending(*frames)) == frames
        await trainer.transport.close()

    assert len(streams) == 3


async def test_a_call_is_made_no_third_time() -> None:
    trainer = grpc_world().member()
    async with _closing_server([True, False]) as (endpoint, streams):
        assert await ask(trainer, endpoint) == [b"hello"]
        assert await ask(trainer, endpoint) == []  # as any answer that ends early
        await trainer.transport.close()

    assert streams == [True, False]


async def test_a_call_whose_stream_breaks_is_not_made_again() -> None:
    trainer = grpc_world().member()
    async with _closing_server([True, True], status=StatusCode.UNAVAILABLE) as (endpoint, streams):
        assert await ask(trainer, endpoint) == [b"hello"]
        with pytest.raises(PeerUnreachable):
            await ask(trainer, endpoint)
        await trainer.transport.close()

    assert streams == [True]


async def test_a_call_that_waits_for_its_own_words_when_its_stream_closes_ends_by_its_deadline() -> None:
    trainer = grpc_world().member()
    async with _closing_server([True, True]) as (endpoint, streams):
        assert await ask(trainer, endpoint) == [b"hello"]
        with pytest.raises(DeadlineExceeded):
            await ask(trainer, endpoint, _trickling(b"half a call"), timeout_s=0.2)
        await trainer.transport.close()

    assert streams == [True]


@pytest.mark.hostile
async def test_what_follows_a_good_call_on_its_stream_is_judged_like_any_call(world: World) -> None:
    peer = await world.serving(_read_and_answer)
    good = [frame.SerializeToString() for frame in await frames_of(forward_call())]
    noise = random.Random(4).randbytes(1000)

    for second, reason in (
        ([noise], "does not decode"),
        (good[1:], "starts with its header"),
        ([b""], "its header"),
        ([b"\0\xff"], "bundle"),
    ):
        status, sentence = await _status_of(
            peer.endpoint, [*good, END_OF_CALL, *good, END_OF_CALL, *second], credential=_credential(peer)
        )
        assert (status, reason in sentence) == (StatusCode.INVALID_ARGUMENT, True), sentence
        assert await _still_serves(world, peer)


@pytest.mark.hostile
@pytest.mark.parametrize("limit", ["", "-1", "nan", "1e99", "9" * 40, "0"])
async def test_a_call_limit_that_makes_no_sense_is_no_licence(world: World, limit: str) -> None:
    left_s: list[float] = []

    async def note(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        left_s.append(context.deadline_s - asyncio.get_running_loop().time())
        yield b"x"

    peer = await world.serving(note)
    async with _raw_channel(peer.endpoint) as channel:
        metadata = ((METADATA_KEY, _credential(peer)), (CALL_LIMIT_KEY, limit))
        with suppress(grpc.aio.AioRpcError):
            await channel.stream_stream(f"/{SERVICE}/Forward")(iter([]), metadata=metadata).read()

    assert all(left <= MAX_CALL_S for left in left_s)
    assert await ask(world.member(), peer.endpoint) == [b"x"]


@pytest.mark.hostile
async def test_a_frame_beyond_the_limit_is_malformed() -> None:
    async def send(_: Any, context: Any) -> None:
        await context.write(bytes(5 * CHUNK_BYTES))

    async with _raw_server(send) as endpoint:
        with pytest.raises(MalformedReply):
            await _call(endpoint)


@pytest.mark.hostile
async def test_no_identity_and_a_forged_one_are_unauthenticated_with_a_sentence(world: World) -> None:
    peer = await world.serving(_read_and_answer)
    stranger = Identity.generate()
    other = Endpoint(stranger.peer_id, peer.endpoint.address, peer.endpoint.certificate_der)
    good = _credential(peer)

    for credential, reason in (
        (None, "no identity"),
        (b"\x00\x01\x02", "malformed"),
        (good[:-1] + bytes([good[-1] ^ 1]), "forged"),
        (issue(stranger, other, now_unix_s=time.time()), "for another peer"),
        (issue(stranger, peer.endpoint, now_unix_s=time.time() - 3600), "expired"),
    ):
        status, sentence = await _status_of(peer.endpoint, [b""], credential=credential)
        assert status is StatusCode.UNAUTHENTICATED
        assert reason in sentence
    assert await _still_serves(world, peer)


@pytest.mark.hostile
async def test_hostile_frames_get_the_right_status_and_the_next_good_call_is_served(world: World) -> None:
    peer = await world.serving(_read_and_answer)
    header, chunk = [frame.SerializeToString() for frame in await frames_of(forward_call())]
    announcing = await frames_of(forward_call())
    announcing[0].header.tensors[0].shape[:] = [2**62, 4]
    announcing[0].header.tensors[0].size_bytes = 5_000_000_000
    wrong_run = await frames_of(forward_call(run_id="another"))
    noise = random.Random(4).randbytes(1000)

    for frames, expected, reason in (
        ([noise], StatusCode.INVALID_ARGUMENT, "does not decode"),
        ([header[: len(header) // 2]], StatusCode.INVALID_ARGUMENT, "does not decode"),
        ([chunk, header], StatusCode.INVALID_ARGUMENT, "starts with its header"),
        ([header], StatusCode.INVALID_ARGUMENT, "ended after 0 of 116"),
        ([header, chunk, chunk], StatusCode.INVALID_ARGUMENT, "more bytes"),
        ([], StatusCode.INVALID_ARGUMENT, "starts with its header"),
        ([announcing[0].SerializeToString()], StatusCode.OUT_OF_RANGE, "at most"),
        ([wrong_run[0].SerializeToString()], StatusCode.FAILED_PRECONDITION, "another"),
    ):
        status, sentence = await _status_of(peer.endpoint, frames, credential=_credential(peer))
        assert (status, reason in sentence) == (expected, True), sentence
        assert await _still_serves(world, peer)


@pytest.mark.hostile
async def test_a_frame_beyond_the_limit_is_refused_by_the_connection(world: World) -> None:
    peer = await world.serving(_read_and_answer)

    status, _ = await _status_of(peer.endpoint, [bytes(5 * CHUNK_BYTES)], credential=_credential(peer))

    assert status is not StatusCode.OK
    assert await _still_serves(world, peer)


@pytest.mark.hostile
async def test_a_stream_that_trickles_for_ever_is_cut_at_its_deadline(world: World) -> None:
    peer, caller = await world.serving(_read_and_answer), world.member()
    header, chunk = await frames_of(forward_call())

    async def trickle() -> AsyncIterator[Frame]:
        yield header.SerializeToString()
        for at in range(len(chunk.chunk)):
            yield CallFrame(chunk=chunk.chunk[at : at + 1]).SerializeToString()
            await asyncio.sleep(0.05)

    began_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await ask(caller, peer.endpoint, trickle(), timeout_s=0.3)

    assert time.monotonic() - began_s < 0.3 + 0.5
    assert await _still_serves(world, peer)


@pytest.mark.parametrize(("timeout_s", "granted_s"), [(None, DEFAULT_CALL_S), (1e6, MAX_CALL_S), (20.0, 20.0)])
async def test_a_call_has_a_deadline_whatever_its_caller_says(
    world: World, timeout_s: float | None, granted_s: float
) -> None:
    left_s: list[float] = []

    async def note(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        left_s.append(context.deadline_s - asyncio.get_running_loop().time())
        yield b"x"

    peer = await world.serving(note)

    status, _ = await _status_of(peer.endpoint, [], credential=_credential(peer), timeout_s=timeout_s)

    assert status is StatusCode.OK
    assert granted_s - 2 < left_s[0] <= granted_s + 0.1


async def test_connections_are_tls_1_3_with_the_certificate_of_the_record(world: World) -> None:
    peer = await world.serving(echo)
    context = ssl.create_default_context(cadata=pem_of(peer.endpoint.certificate_der).decode())
    context.set_alpn_protocols(["h2"])
    host, port = peer.endpoint.address.rsplit(":", 1)

    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="swarmoe")
    tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
    negotiated = tls.version(), tls.selected_alpn_protocol()
    writer.transport.abort()

    assert negotiated == ("TLSv1.3", "h2")


@pytest.mark.hostile
async def test_tls_1_2_is_refused(world: World) -> None:
    peer = await world.serving(echo)
    context = ssl.create_default_context(cadata=pem_of(peer.endpoint.certificate_der).decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, port = peer.endpoint.address.rsplit(":", 1)

    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.open_connection(host, int(port), ssl=context, server_hostname="swarmoe")


@pytest.mark.hostile
async def test_plaintext_is_refused(world: World) -> None:
    peer = await world.serving(_read_and_answer)

    async with grpc.aio.insecure_channel(peer.endpoint.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(f"/{SERVICE}/Info")(b"", timeout=2)

    assert error.value.code() is StatusCode.UNAVAILABLE
    assert await _still_serves(world, peer)


async def test_info_reports_who_is_not_there_in_words(world: World, closed_port: str, silent_listener: str) -> None:
    stranger = world.member().transport

    with pytest.raises(PeerUnreachable, match="cannot connect"):
        await stranger.info(closed_port, InfoRequest(), timeout_s=5)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await stranger.info(silent_listener, InfoRequest(), timeout_s=0.2)
    with pytest.raises(PeerUnreachable, match="cannot connect"):
        await stranger.info("does-not-exist.invalid:1", InfoRequest(), timeout_s=5)


async def test_info_of_something_else_is_malformed(world: World) -> None:
    async def say_something_else(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(say_something_else, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(MalformedReply, match="no swarmoe listens there"):
            await world.member().transport.info(f"127.0.0.1:{port}", InfoRequest(), timeout_s=5)


async def test_info_of_a_hostile_size_or_noise_is_an_error_and_not_a_crash(world: World) -> None:
    peer = await world.serving(echo)

    async with _raw_channel(peer.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(f"/{SERVICE}/Info")(b"\xff\xff\xff", timeout=5)

    assert error.value.code() is StatusCode.INVALID_ARGUMENT
    assert (await world.member().transport.info(peer.endpoint.address, InfoRequest(), timeout_s=5))[0] is not None


async def test_ipv6_is_listened_on_and_dialled(world: World) -> None:
    if not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    peer = await world.serving(echo, listen="[::1]:0")

    assert peer.endpoint.address.startswith("[::1]:")
    assert await ask(world.member(), peer.endpoint) == [b"hello"]
    assert (await world.member().transport.info(peer.endpoint.address, InfoRequest(), timeout_s=5))[1]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@asynccontextmanager
async def _far_away(address: str, *, latency_s: float) -> AsyncIterator[str]:
    """Another address of the same server, so much further off in each direction."""

    meetings: list[asyncio.Task[None]] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await asyncio.sleep(latency_s)
                writer.write(data)
        except ConnectionError:
            pass  # one end is gone, and so is the other
        finally:
            writer.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*split_address(address))
        await asyncio.gather(carry(reader, server_writer), carry(server_reader, writer))
        await asyncio.gather(writer.wait_closed(), server_writer.wait_closed(), return_exceptions=True)

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        meetings.append(asyncio.create_task(meet(reader, writer)))

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as relay:
        yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        await asyncio.gather(*meetings)


async def test_a_peer_on_the_other_side_of_the_world_is_reached_at_once(world: World) -> None:
    peer = await world.serving(echo)

    async with _far_away(peer.endpoint.address, latency_s=0.15) as address:
        assert await ask(world.member(), replace(peer.endpoint, address=address)) == [b"hello"]
        await world.close()


async def test_the_connection_to_a_peer_that_moved_is_closed(world: World) -> None:
    peer, trainer = await world.serving(echo), world.member()

    async with asyncio.timeout(5), _far_away(peer.endpoint.address, latency_s=0) as former:
        await ask(trainer, replace(peer.endpoint, address=former))
        assert await ask(trainer, peer.endpoint) == [b"hello"]
        # which ends once nobody is connected any more

    assert await ask(trainer, peer.endpoint) == [b"hello"]


def test_the_connection_to_a_peer_that_is_not_called_for_minutes_is_closed() -> None:
    async def scenario() -> None:
        world = grpc_world()
        try:
            peer, trainer = await world.serving(echo), world.member()
            async with asyncio.timeout(150 + 5), _far_away(peer.endpoint.address, latency_s=0) as address:
                assert await ask(trainer, replace(peer.endpoint, address=address)) == [b"hello"]
                skip(150)
            assert await ask(trainer, peer.endpoint) == [b"hello"]
        finally:
            await world.close()

    run_skipping(scenario())


async def test_an_address_of_another_machine_cannot_be_listened_on(world: World) -> None:
    with pytest.raises(CouldNotListen, match="not one of this machine's"):
        await world.serving(echo, listen="192.0.2.1:0")


def test_it_works_on_the_processes_own_loop_thread() -> None:
    async def scenario() -> list[bytes]:
        world = grpc_world()
        try:
            return await ask(world.member(), (await world.serving(echo)).endpoint)
        finally:
            await world.close()

    with EventLoopThread() as loop:
        assert loop.run(scenario(), timeout_s=10) == [b"hello"]


_FREEZABLE = """
import asyncio, base64
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from tests.transport_worlds import TestServicer, before

async def hang(context):
    print("called", flush=True)
    await asyncio.Event().wait()

async def main():
    identity = Identity.generate()
    transport = GrpcTransport(identity)
    server = await transport.serve(TestServicer(before(hang)), "127.0.0.1:0")
    certificate = base64.b64encode(transport.certificate_der).decode()
    print(identity.peer_id, server.address, certificate, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("sign", "noticed_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 5.0)], ids=["killed", "frozen"]
)
async def test_a_peer_that_dies_or_freezes_in_a_call_is_noticed_long_before_the_deadline(
    world: World, sign: signal.Signals, noticed_s: float
) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _FREEZABLE, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        peer_id, address, certificate = (await process.stdout.readline()).decode().split()
        endpoint = Endpoint(peer_id, address, base64.b64decode(certificate))  # pyright: ignore[reportArgumentType]
        call = asyncio.create_task(ask(world.member(), endpoint, timeout_s=30))
        assert await process.stdout.readline() == b"called\n"

        process.send_signal(sign)
        began_s = time.monotonic()

        with pytest.raises(PeerUnreachable):
            await call
        assert time.monotonic() - began_s < noticed_s
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
