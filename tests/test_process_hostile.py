"""A peer's process and those who wish it ill, over gRPC and TLS: each is told why, in time, and nobody is harmed."""

import asyncio
import contextlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from experts.uid import RunId
from peer.bootstrap import NONCE_BYTES, parse_join, verify_info
from peer.call_stream import write_call
from peer.certificates import Certificate, pem_of
from peer.credentials import LIFETIME_S, METADATA_KEY, issue
from peer.grpc_status import SERVICE, grpc
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.messages import Call, ExpertRows, GroupReply, Mode, Outcome, ReplyLimits
from peer.reply_stream import read_reply
from peer.tensors import Role, decode, encode
from peer.transport import CHUNK_BYTES, Endpoint, Method
from peer.wire_codecs import Codec
from protos.swarm_pb2 import DTYPE_INT32, CallCredential, CallFrame, CallHeader, InfoRequest, TensorHeader
from tests.processes import Command, processes, start_swarm

pytestmark = [pytest.mark.process, pytest.mark.hostile]

D = 32
"""Of the `tiny` run."""
DEADLINE_S = 3.0
SLACK_S = 5.0
LEAVE_WITHIN_S = 5.0

Code = grpc.StatusCode
Frames = Sequence[bytes]


@dataclass(frozen=True)
class Target:
    """A peer's process, as anybody who reads its record knows it."""

    endpoint: Endpoint
    run_id: RunId
    process: Command


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Generator[Target]:
    with processes(tmp_path_factory.mktemp("hostile")) as started:
        (peer,) = start_swarm(started, num_peers=1).peers
        yield asyncio.run(_meet(peer))


async def _meet(peer: Command) -> Target:
    transport, join, nonce = GrpcTransport(Identity.generate()), parse_join(peer.join), bytes(NONCE_BYTES)
    try:
        reply, certificate_der = await transport.info(join.address, InfoRequest(nonce=nonce), timeout_s=30)
    finally:
        await transport.close()
    met = verify_info(reply, join=join, nonce=nonce, certificate_der=certificate_der)
    return Target(Endpoint(met.peer_id, met.address, certificate_der), met.manifest.run_id, peer)


# ---- calls, good and spoiled ----------------------------------------------------------------------------------------


def _call(target: Target, x_ND: Tensor, *, mode: Mode = Mode.TRAIN) -> Call:
    """Three pairs: two of expert 0.0, one of 0.1."""
    return Call(
        call_id=secrets.token_bytes(16),
        run_id=target.run_id,
        mode=mode,
        layer=0,
        experts=(ExpertRows(0, 2), ExpertRows(1, 1)),
        reply_codec=Codec.RAW,
        timeout_s=DEADLINE_S,
        tensors={Role.ROWS: encode(x_ND, Role.ROWS, Codec.RAW)},
    )


def _rows() -> Tensor:
    return torch.linspace(-1, 1, 3 * D).view(3, D)


def _frames(call: Call) -> Frames:
    async def collect() -> Frames:
        return [frame async for frame in write_call(call)]

    return asyncio.run(collect())


def _spoiled(spoil: Callable[[CallHeader], object]) -> Callable[[Target], Frames]:
    """A good call whose header was changed on its way."""

    def build(target: Target) -> Frames:
        header, *chunks = _frames(_call(target, _rows()))
        frame = CallFrame.FromString(header)
        spoil(frame.header)
        return [frame.SerializeToString(), *chunks]

    return build


def _announcing(shape: Sequence[int], size_bytes: int = 3 * D * 4) -> Callable[[Target], Frames]:
    def announce(header: CallHeader) -> None:
        header.tensors[0].shape[:] = shape
        header.tensors[0].size_bytes = size_bytes

    return _spoiled(announce)


def _with_index(values: Sequence[int]) -> Callable[[Target], Frames]:
    def build(target: Target) -> Frames:
        index_N = encode(torch.tensor(values, dtype=torch.int32), Role.ROW_INDEX, Codec.RAW)
        call = _call(target, _rows())
        return _frames(replace(call, tensors={**call.tensors, Role.ROW_INDEX: index_N}))

    return build


def _noise(_: Target) -> Frames:
    return [random.Random(4).randbytes(5000)]


def _chunk_first(target: Target) -> Frames:
    return list(reversed(_frames(_call(target, _rows()))))


def _endless_bytes(target: Target) -> Frames:
    header, _ = _frames(_call(target, _rows()))
    return [header, *[CallFrame(chunk=bytes(CHUNK_BYTES)).SerializeToString()] * 50]


def _giant_frame(target: Target) -> Frames:
    return [bytes(5 * CHUNK_BYTES)]


HOSTILE: dict[str, tuple[Callable[[Target], Frames], grpc.StatusCode, str]] = {
    "random bytes": (_noise, Code.INVALID_ARGUMENT, "a frame does not decode"),
    "wrong run": (
        _spoiled(lambda header: setattr(header, "run_id", "f" * 32)),
        Code.FAILED_PRECONDITION,
        "the call is for 'ffff",
    ),
    "unknown expert": (
        _spoiled(lambda header: setattr(header.experts[0], "index", 99)),
        Code.INVALID_ARGUMENT,
        "expert 0.99 does not exist",
    ),
    "unknown layer": (
        _spoiled(lambda header: setattr(header, "layer", 1 << 31)),
        Code.INVALID_ARGUMENT,
        "the run has 1 MoE layers",
    ),
    "wrong dtype": (
        _spoiled(lambda header: setattr(header.tensors[0], "dtype", DTYPE_INT32)),
        Code.INVALID_ARGUMENT,
        "must be FLOAT32",
    ),
    "shape that does not match its bytes": (_announcing([4, D]), Code.INVALID_ARGUMENT, "takes 512"),
    "rank 9": (_announcing([1] * 9), Code.INVALID_ARGUMENT, "of rank 9"),
    "negative": (_announcing([-3, D]), Code.INVALID_ARGUMENT, "must be positive"),
    "huge shape": (_announcing([2**62, 4]), Code.OUT_OF_RANGE, "are allowed"),
    "5 GB": (_announcing([3, D], 5_000_000_000), Code.OUT_OF_RANGE, "announces 5000000000 bytes"),
    "more tensors than there are roles": (
        _spoiled(lambda header: header.tensors.extend([TensorHeader()] * 1000)),
        Code.INVALID_ARGUMENT,
        "unknown role",
    ),
    "rows of nobody": (
        _spoiled(lambda header: setattr(header.experts[0], "num_rows", 2**32 - 1)),
        Code.OUT_OF_RANGE,
        "this run allows",
    ),
    "NaN": (
        lambda target: _frames(_call(target, _rows().fill_(float("nan")))),
        Code.INVALID_ARGUMENT,
        "ROWS holds NaN or infinity",
    ),
    "index beyond the rows": (_with_index([0, 1, 3]), Code.INVALID_ARGUMENT, "reads row 3 of 3"),
    "negative index": (_with_index([0, -1, 2]), Code.INVALID_ARGUMENT, "reads row -1 of 3"),
    "chunk first": (_chunk_first, Code.INVALID_ARGUMENT, "a call starts with its header"),
    "cut short": (
        lambda target: _frames(_call(target, _rows()))[:1],
        Code.INVALID_ARGUMENT,
        "ended after 0 of 384 bytes",
    ),
    "more bytes than announced": (_endless_bytes, Code.INVALID_ARGUMENT, "more bytes than the header announced"),
    "giant frame": (_giant_frame, Code.RESOURCE_EXHAUSTED, "larger than max"),
    "nothing": (lambda _: [], Code.INVALID_ARGUMENT, "a call starts with its header"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_call_is_refused_with_a_sentence(target: Target, name: str) -> None:
    build, code, sentence = HOSTILE[name]
    frames = await asyncio.to_thread(build, target)

    refused, said, took_s = await _send(target, frames, _credential(target))

    assert (refused, sentence in said) == (code, True), (refused, said)
    assert took_s < DEADLINE_S + SLACK_S
    assert await _serves(target)


async def test_streams_that_never_end_are_cut_at_their_deadline_and_hold_nobody_up(target: Target) -> None:
    header, chunk = await asyncio.to_thread(_frames, _call(target, _rows()))
    first_byte = CallFrame(chunk=CallFrame.FromString(chunk).chunk[:1]).SerializeToString()
    end = threading.Event()

    def never_end() -> Iterator[bytes]:
        yield header
        yield first_byte
        end.wait()

    async with asyncio.TaskGroup() as tasks:
        sending = [tasks.create_task(_send(target, never_end(), _credential(target))) for _ in range(5)]
        assert await _serves(target)
    end.set()

    endings = [task.result() for task in sending]
    assert {code for code, _, _ in endings} == {Code.DEADLINE_EXCEEDED}
    assert max(took_s for _, _, took_s in endings) < DEADLINE_S + SLACK_S
    assert await _serves(target)


async def test_a_backward_of_nan_or_of_anothers_forward_teaches_nothing(target: Target) -> None:
    before = await _answer(target, _call(target, _rows(), mode=Mode.EVAL))
    nan_ND = encode(torch.full((3, D), float("nan")), Role.GRADIENTS, Codec.RAW)
    poisoner, forward = Identity.generate(), _call(target, _rows())
    await _answer(target, forward, identity=poisoner)
    poison = replace(forward, tensors={Role.GRADIENTS: nan_ND}, loss_tokens=1.0)

    (missing,) = await _answer(target, poison, method=Method.BACKWARD, identity=Identity.generate())
    frames = await asyncio.to_thread(_frames, poison)
    code, said, _ = await _send(target, frames, _credential(target, poisoner), method=Method.BACKWARD)

    assert {expert.outcome for expert in missing.experts} == {Outcome.MISSING_INPUTS}
    assert (code, said) == (Code.INVALID_ARGUMENT, "GRADIENTS holds NaN or infinity")
    after = await _answer(target, _call(target, _rows(), mode=Mode.EVAL))
    assert _outputs(after).equal(_outputs(before))
    assert {expert.version for group in after for expert in group.experts} == {0}


# ---- callers --------------------------------------------------------------------------------------------------------


def _somebody_elses(target: Target) -> bytes:
    """A credential that was issued for another server."""
    other = replace(target.endpoint, peer_id=Identity.generate().peer_id)
    return issue(Identity.generate(), other, now_unix_s=time.time())


def _of_another_certificate(target: Target) -> bytes:
    other = replace(target.endpoint, certificate_der=Certificate.generate().der)
    return issue(Identity.generate(), other, now_unix_s=time.time())


def _forged(target: Target) -> bytes:
    credential = CallCredential.FromString(_credential(target))
    credential.signature = bytes(64)
    return credential.SerializeToString()


def _replayed_under_another_key(target: Target) -> bytes:
    credential = CallCredential.FromString(_credential(target))
    credential.public_key = Identity.generate().public_key
    return credential.SerializeToString()


def _stretched(target: Target) -> bytes:
    """Signed for ten minutes, said to be good for eleven."""
    credential = CallCredential.FromString(_credential(target))
    credential.expires_at_unix_s += 30
    return credential.SerializeToString()


def _expired(target: Target) -> bytes:
    return issue(Identity.generate(), target.endpoint, now_unix_s=time.time() - 2 * LIFETIME_S)


STRANGERS: dict[str, tuple[Callable[[Target], bytes | None], str]] = {
    "no identity": (lambda _: None, "the call has no identity"),
    "noise": (lambda _: random.Random(5).randbytes(300), "the credential is malformed"),
    "too long": (lambda _: bytes(4000), "the credential is malformed: too long"),
    "forged": (_forged, "the credential is forged"),
    "another server's": (_somebody_elses, "the credential is for another peer"),
    "another certificate's": (_of_another_certificate, "names another certificate"),
    "replayed under another key": (_replayed_under_another_key, "the credential is forged"),
    "stretched": (_stretched, "the credential is forged"),
    "expired": (_expired, "the credential expired"),
}


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_caller_that_does_not_prove_who_it_is_is_refused_with_a_sentence(target: Target, name: str) -> None:
    credential_for, sentence = STRANGERS[name]
    frames = await asyncio.to_thread(_frames, _call(target, _rows()))

    code, said, took_s = await _send(target, frames, credential_for(target))

    assert (code, sentence in said) == (Code.UNAUTHENTICATED, True), (code, said)
    assert took_s < DEADLINE_S + SLACK_S
    assert await _serves(target)


@pytest.mark.parametrize(
    "garbage",
    [random.Random(6).randbytes(100_000), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ids=["noise", "http", "plain http2"],
)
async def test_plain_tcp_is_hung_up_on(target: Target, garbage: bytes) -> None:
    host, port = target.endpoint.address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))

    try:
        writer.write(garbage)
        async with asyncio.timeout(DEADLINE_S + SLACK_S):
            answer = await reader.read()
    except ConnectionError:
        answer = b""
    finally:
        writer.transport.abort()

    assert b"HTTP" not in answer
    assert await _serves(target)


async def test_connections_that_say_nothing_keep_nobody_out(target: Target) -> None:
    host, port = target.endpoint.address.rsplit(":", 1)
    silent = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(200)))

    try:
        assert await _serves(target)
    finally:
        for _, writer in silent:
            writer.transport.abort()


async def test_a_peer_leaves_in_time_though_nobody_lets_go_of_it(target: Target) -> None:
    peer, end = target.process, threading.Event()
    header, _ = await asyncio.to_thread(_frames, _call(target, _rows()))
    address = peer.event("http.listening")["address"]
    host, port = address.rsplit(":", 1)
    begun = threading.Semaphore(0)

    def never_end() -> Iterator[bytes]:
        yield header
        begun.release()
        end.wait()

    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(_send(target, never_end(), _credential(target), timeout_s=60)) for _ in range(3)]
        for _ in held:
            assert await asyncio.to_thread(begun.acquire, timeout=DEADLINE_S)
        assert await _serves(target)
        _, page = await asyncio.open_connection(host, int(port))
        page.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began_s = time.monotonic()
        code = await asyncio.to_thread(peer.end)
        left_after_s = time.monotonic() - began_s
        end.set()
        page.transport.abort()

    assert (code, left_after_s < LEAVE_WITHIN_S) == (0, True), peer.log()
    assert {task.result()[0] for task in held} == {Code.UNAVAILABLE}
    assert len(peer.events("peer.cut_off_calls")) == 1
    assert peer.events("call.failed") == peer.events("compute.failed") == []  # in all of the above
    assert "Traceback" not in peer.stderr


# ---- sending --------------------------------------------------------------------------------------------------------


def _credential(target: Target, identity: Identity | None = None) -> bytes:
    """A good one; of somebody nobody knows unless told otherwise: joining is open."""
    return issue(identity or Identity.generate(), target.endpoint, now_unix_s=time.time())


async def _send(
    target: Target,
    frames: Iterable[bytes],
    credential: bytes | None,
    *,
    method: Method = Method.FORWARD,
    timeout_s: float = DEADLINE_S,
) -> tuple[grpc.StatusCode, str, float]:
    """Whatever bytes, over a channel of our own making: status, sentence, and how long that took.

    gRPC's blocking client: its asyncio one forgets a status that comes while it is still writing.
    """
    return await asyncio.to_thread(_send_blocking, target, frames, credential, method, timeout_s)


def _send_blocking(
    target: Target, frames: Iterable[bytes], credential: bytes | None, method: Method, timeout_s: float
) -> tuple[grpc.StatusCode, str, float]:
    tls = grpc.ssl_channel_credentials(pem_of(target.endpoint.certificate_der))
    options = [("grpc.ssl_target_name_override", "swarmoe"), ("grpc.max_send_message_length", -1)]
    metadata = () if credential is None else ((METADATA_KEY, credential),)
    began_s = time.monotonic()
    with grpc.secure_channel(target.endpoint.address, tls, options=options) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{method.value}")(iter(frames), metadata=metadata, timeout=timeout_s)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        return call.code(), call.details() or "", time.monotonic() - began_s


async def _answer(
    target: Target, call: Call, *, method: Method = Method.FORWARD, identity: Identity | None = None
) -> list[GroupReply]:
    """A call by our own client."""
    transport = GrpcTransport(identity or Identity.generate())
    limits = ReplyLimits.of(call, method, num_rows=3)
    try:
        frames = transport.call(target.endpoint, method, write_call(call), timeout_s=30)
        return [group async for group in read_reply(frames, limits)]
    finally:
        await transport.close()


async def _serves(target: Target) -> bool:
    """The next good call is answered, with numbers."""
    return bool(_outputs(await _answer(target, _call(target, _rows(), mode=Mode.EVAL))).isfinite().all())


def _outputs(groups: Sequence[GroupReply]) -> Tensor:
    assert {expert.outcome for group in groups for expert in group.experts} == {Outcome.OK}
    return torch.cat([decode(group.tensor) for group in groups if group.tensor is not None])
