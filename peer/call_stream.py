"""A call as frames: written by a trainer, read by a peer. Bytes in, a validated `Call` out, or a refusal.

Runs on the event loop and handles bytes and Python integers only. Row indices, lengths and finiteness are checked where
the tensors are decoded, on the compute thread.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import NoReturn, cast

from peer.errors import MalformedMessage
from peer.framing import TensorAssembler, cut_into_chunks, parse_frame
from peer.messages import CALL_ID_BYTES, Call, CallLimits, ExpertRows, Mode
from peer.tensors import Role, TensorSpec, TensorTooLarge, check_header, header_of
from peer.transport import CallRefused, Frame, Method, Refusal
from peer.wire_codecs import Codec
from protos import swarm_pb2 as pb

Admit = Callable[[Call, int], Awaitable[None]]
"""Hears of a call, still without tensors, and how many bytes these take decoded. May wait; may raise CallRefused."""


async def write_call(call: Call) -> AsyncIterator[Frame]:
    """The call as it travels; each chunk is copied out of its tensor when it is its turn."""
    yield pb.CallFrame(
        header=pb.CallHeader(
            call_id=call.call_id,
            run_id=call.run_id,
            mode=cast("pb.Mode", call.mode),
            layer=call.layer,
            experts=[pb.ExpertRows(index=e.index, num_rows=e.num_rows, version=e.version) for e in call.experts],
            reply_codec=cast("pb.Codec", call.reply_codec),
            timeout_ms=max(1, round(call.timeout_s * 1000)),
            loss_tokens=call.loss_tokens,
            score=call.score,
            tensors=[header_of(tensor.spec) for tensor in call.tensors.values()],
        )
    ).SerializeToString()
    for frame in cut_into_chunks(tensor.data for tensor in call.tensors.values()):
        yield frame


async def read_call(
    frames: AsyncIterator[Frame],
    limits: CallLimits,
    method: Method,
    *,
    admit: Admit | None = None,
) -> Call:
    """The whole call, or CallRefused with a sentence at the first frame that cannot be part of one.

    No tensor is read before `admit` returns. Ends when the stream ends; how long that may take is the transport's to
    enforce.
    """
    try:
        return await _read_call(frames, limits, method, admit)
    except TensorTooLarge as error:
        raise CallRefused(Refusal.TOO_LARGE, str(error)) from None
    except MalformedMessage as error:
        raise CallRefused(Refusal.INVALID, str(error)) from None


async def _read_call(frames: AsyncIterator[Frame], limits: CallLimits, method: Method, admit: Admit | None) -> Call:
    first = await anext(frames, None)
    message = None if first is None else parse_frame(first, pb.CallFrame)
    if not isinstance(message, pb.CallFrame) or not message.HasField("header"):
        _malformed("a call starts with its header")
    header = message.header
    _check_header(header, limits, method)
    specs = _check_tensors(header, limits, method)
    call = Call(
        call_id=header.call_id,
        run_id=limits.run_id,
        mode=Mode(header.mode),
        layer=header.layer,
        experts=tuple(ExpertRows(e.index, e.num_rows, e.version) for e in header.experts),
        reply_codec=Codec(header.reply_codec),
        timeout_s=header.timeout_ms / 1000,
        tensors={},
        loss_tokens=header.loss_tokens if method is Method.BACKWARD else 0.0,
        score=header.score,
    )
    if admit is not None:
        await admit(call, sum(spec.decoded_bytes for spec in specs.values()))
    assembler = TensorAssembler(list(specs.values()))
    async for frame in frames:
        chunk = parse_frame(frame, pb.CallFrame)
        if not isinstance(chunk, memoryview):
            _malformed("after its header a call has chunks only")
        assembler.feed(chunk)
    return replace(call, tensors=dict(zip(specs, assembler.tensors(), strict=True)))


def _check_header(header: pb.CallHeader, limits: CallLimits, method: Method) -> None:
    """Everything but the tensors."""
    if header.run_id != limits.run_id:
        message = f"this peer trains run {limits.run_id}, the call is for {header.run_id[:64]!r}"
        raise CallRefused(Refusal.WRONG_RUN, message)
    if len(header.call_id) != CALL_ID_BYTES:
        _malformed(f"a call id has {CALL_ID_BYTES} bytes, not {len(header.call_id)}")
    if header.mode not in (Mode.TRAIN, Mode.EVAL):
        _malformed(f"mode {header.mode} is unknown")
    if header.timeout_ms == 0:
        _malformed("timeout_ms is 0: the call was over before it was sent")
    if header.reply_codec not in limits.codecs:
        _malformed(f"reply_codec {header.reply_codec} is not one this run allows")
    if not 0.0 <= header.score < math.inf:  # written so that NaN fails it too
        _malformed(f"score must be finite and at least 0, not {header.score}")
    if method is Method.BACKWARD:
        if header.mode != Mode.TRAIN:
            _malformed("an eval call has no backward")
        if not (math.isfinite(header.loss_tokens) and header.loss_tokens > 0):
            _malformed(f"loss_tokens must be positive and finite, not {header.loss_tokens}")
    _check_experts(header, limits)


def _check_experts(header: pb.CallHeader, limits: CallLimits) -> None:
    if header.layer >= limits.num_layers:
        _malformed(f"layer {header.layer} does not exist: the run has {limits.num_layers} MoE layers")
    if not header.experts:
        _malformed("the call names no expert")
    seen: set[int] = set()
    for expert in header.experts:
        uid = f"{header.layer}.{expert.index}"
        if expert.index >= limits.experts_per_layer:
            _malformed(f"expert {uid} does not exist: a layer of this run has {limits.experts_per_layer}")
        if expert.index in seen:
            _malformed(f"expert {uid} is named twice")
        if expert.num_rows == 0 or expert.version < 0:
            _malformed(f"expert {uid} has {expert.num_rows} rows at version {expert.version}")
        seen.add(expert.index)


def _check_tensors(header: pb.CallHeader, limits: CallLimits, method: Method) -> dict[Role, TensorSpec]:
    """What will follow, in order: the right tensors, of shapes that fit each other and the call."""
    specs: dict[Role, TensorSpec] = {}
    left_bytes = limits.max_bytes
    for tensor in header.tensors:
        spec = check_header(tensor, codecs_allowed=limits.codecs, max_bytes=left_bytes)
        if spec.role in specs:
            _malformed(f"{spec.role.name} is announced twice")
        if spec.role.rank == 2 and spec.shape[1] != limits.dim:
            _malformed(f"{spec.role.name} has rows of {spec.shape[1]}, this run's have {limits.dim}")
        specs[spec.role] = spec
        left_bytes -= spec.size_bytes
    _check_roles(set(specs), method, limits)
    _check_counts(specs, num_pairs=sum(expert.num_rows for expert in header.experts), max_rows=limits.max_rows)
    if limits.max_sequence is not None and Role.LENGTHS in specs:
        _check_sequences(header, specs[Role.LENGTHS].num_rows, max_sequence=limits.max_sequence)
    return specs


def _check_roles(roles: set[Role], method: Method, limits: CallLimits) -> None:
    index = {Role.ROW_INDEX}
    inputs = {Role.ROWS} if limits.max_sequence is None else {Role.ROWS, Role.LENGTHS}
    carried = ", ".join(sorted(role.name for role in inputs))
    if method is Method.FORWARD and roles - index != inputs:
        _malformed(f"a forward carries {carried}, perhaps ROW_INDEX, and nothing else")
    if method is Method.BACKWARD and roles not in (
        {Role.GRADIENTS},
        {Role.GRADIENTS} | inputs,
        {Role.GRADIENTS} | inputs | index,
    ):
        _malformed(f"a backward carries GRADIENTS, perhaps {carried}, and ROW_INDEX only with ROWS")


def _check_counts(specs: dict[Role, TensorSpec], *, num_pairs: int, max_rows: int) -> None:
    """Whatever is per pair has N rows; distinct rows are N too unless an index says which pair reads which."""
    if num_pairs > max_rows or (Role.ROWS in specs and specs[Role.ROWS].num_rows > max_rows):
        raise CallRefused(Refusal.TOO_LARGE, f"the call has {num_pairs} rows; this run allows {max_rows}")
    per_pair = Role.ROW_INDEX if Role.ROW_INDEX in specs else Role.ROWS
    for role in (per_pair, Role.GRADIENTS):
        if role in specs and specs[role].num_rows != num_pairs:
            _malformed(f"{role.name} has {specs[role].num_rows} rows, the experts' counts add up to {num_pairs}")


def _check_sequences(header: pb.CallHeader, num_sequences: int, *, max_sequence: int) -> None:
    """As many as the experts' pairs can make: none is empty, longer than the run's context, or of two experts."""
    fewest = sum(-(-expert.num_rows // max_sequence) for expert in header.experts)
    most = sum(expert.num_rows for expert in header.experts)
    if not fewest <= num_sequences <= most:
        _malformed(f"LENGTHS has {num_sequences} sequences; these experts' rows make {fewest} to {most}")


def _malformed(message: str) -> NoReturn:
    raise MalformedMessage(message)
