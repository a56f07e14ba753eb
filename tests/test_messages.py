"""Calls and answers arrive as they were sent, and nothing else arrives."""

import copy
import random
from collections.abc import AsyncIterator, Callable

import pytest
import torch
from google.protobuf.message import DecodeError

from experts.settings import ExpertShape
from peer.call_stream import read_call
from peer.errors import MalformedMessage
from peer.framing import chunk_frame, parse_frame
from peer.manifest import RunManifest, WireSettings
from peer.messages import Call, CallLimits, ExpertOutcome, GroupReply, Mode, Outcome, ReplyLimits
from peer.reply_stream import read_reply, write_group, write_reply
from peer.tensors import Role, decode, decode_row_index, encode
from peer.transport import CHUNK_BYTES, CallRefused, Frame, Method, Refusal
from peer.wire_codecs import Codec
from protos import swarm_pb2 as pb
from tests.transport_worlds import sending
from tests.wire_calls import (
    LIMITS,
    ROW_INDEX_N,
    X_UD,
    D,
    backward_call,
    collect,
    forward_call,
    frames_of,
    on_the_wire,
    whole_answer,
)

FORWARD_LIMITS = ReplyLimits.of(forward_call(), Method.FORWARD, num_rows=3)


async def _refusal_of(
    frames: list[pb.CallFrame] | AsyncIterator[Frame], method: Method = Method.FORWARD
) -> tuple[Refusal, str]:
    with pytest.raises(CallRefused) as error:
        await read_call(on_the_wire(frames) if isinstance(frames, list) else frames, LIMITS, method)
    return error.value.refusal, str(error.value)


async def test_a_forward_arrives_as_it_was_sent() -> None:
    sent = forward_call()

    got = await read_call(on_the_wire(await frames_of(sent)), LIMITS, Method.FORWARD)

    assert _without_tensors(got) == _without_tensors(sent)
    assert torch.equal(decode(got.tensors[Role.ROWS]), X_UD)
    assert torch.equal(decode_row_index(got.tensors[Role.ROW_INDEX], num_rows=3), ROW_INDEX_N.long())
    assert (got.num_pairs, got.is_training, got.size_bytes) == (5, True, 3 * D * 4 + 5 * 4)


@pytest.mark.parametrize("resends", [False, True])
async def test_a_backward_arrives_with_or_without_its_rows(resends: bool) -> None:
    sent = backward_call(resends=resends)

    got = await read_call(on_the_wire(await frames_of(sent)), LIMITS, Method.BACKWARD)

    assert _without_tensors(got) == _without_tensors(sent)
    assert list(got.tensors) == list(sent.tensors)
    assert torch.equal(decode(got.tensors[Role.GRADIENTS]), torch.ones(5, D))


async def test_an_eval_forward_is_no_training() -> None:
    got = await read_call(on_the_wire(await frames_of(forward_call(mode=Mode.EVAL))), LIMITS, Method.FORWARD)

    assert not got.is_training


async def test_small_tensors_share_a_chunk_and_large_ones_take_several() -> None:
    large = forward_call(
        tensors={
            Role.ROWS: encode(torch.zeros(CHUNK_BYTES // 16, 8), Role.ROWS, Codec.RAW),
            Role.ROW_INDEX: encode(ROW_INDEX_N, Role.ROW_INDEX, Codec.RAW),
        }
    )

    assert [len(frame.chunk) for frame in await frames_of(forward_call())] == [0, 3 * D * 4 + 5 * 4]
    assert [len(frame.chunk) for frame in await frames_of(large)] == [0, CHUNK_BYTES, CHUNK_BYTES, 5 * 4]


@pytest.mark.parametrize("size", [1, 7, 95, 96, 97])
async def test_chunks_of_any_size_make_the_same_call(size: int) -> None:
    header, chunk = await frames_of(forward_call())
    pieces = [chunk.chunk[at : at + size] for at in range(0, len(chunk.chunk), size)]

    got = await read_call(
        on_the_wire([header, *(pb.CallFrame(chunk=piece) for piece in pieces)]), LIMITS, Method.FORWARD
    )

    assert torch.equal(decode(got.tensors[Role.ROWS]), X_UD)


@pytest.mark.parametrize("size_bytes", [1, 127, 128, 16383, 16384, CHUNK_BYTES])
def test_a_chunk_frame_is_what_protobuf_makes_of_it(size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)

    frame = chunk_frame([data[:1], data[1:]])

    assert frame == pb.CallFrame(chunk=data).SerializeToString() == pb.ReplyFrame(chunk=data).SerializeToString()
    assert parse_frame(frame, pb.CallFrame) == parse_frame(frame, pb.ReplyFrame) == data


@pytest.mark.parametrize("frame", [b"\x12\x81\x00x", b"\x12\x01y\x12\x01x", b"\x92\x80\x00\x01x"])
def test_a_chunk_that_is_encoded_otherwise_is_the_one_that_protobuf_reads(frame: bytes) -> None:
    assert pb.CallFrame.FromString(frame).chunk == b"x"
    assert parse_frame(frame, pb.CallFrame) == b"x"


@pytest.mark.hostile
def test_no_bytes_are_read_otherwise_than_protobuf_reads_them() -> None:
    rng = random.Random(5)
    original = chunk_frame([b"some bytes"])

    for _ in range(2000):
        frame = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            frame[rng.randrange(min(4, len(frame)))] = rng.randrange(256)
        del frame[rng.randrange(len(frame) + 1) :]
        try:
            expected = pb.CallFrame.FromString(bytes(frame))
        except DecodeError:
            with pytest.raises(MalformedMessage, match="does not decode"):
                parse_frame(bytes(frame), pb.CallFrame)
        else:
            got = parse_frame(bytes(frame), pb.CallFrame)
            assert (got == expected.chunk) if expected.WhichOneof("frame") == "chunk" else (got == expected)


def test_limits_are_the_manifests() -> None:
    wire = WireSettings(codecs=("fp32", "int8"), backward_codec="fp32")
    manifest = RunManifest(expert=ExpertShape(dim=128, hidden=256), wire=wire)

    limits = CallLimits.of(manifest)

    assert (limits.run_id, limits.dim, limits.num_layers, limits.experts_per_layer) == (manifest.run_id, 128, 2, 8)
    assert limits.codecs == {Codec.RAW, Codec.INT8}


async def test_another_run_is_refused_naming_both() -> None:
    refusal, reason = await _refusal_of(await frames_of(forward_call(run_id="another")))

    assert refusal is Refusal.WRONG_RUN
    assert LIMITS.run_id in reason
    assert "another" in reason


Spoil = Callable[[pb.CallHeader], object]


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda h: setattr(h, "call_id", b"short"), "call id has 16 bytes"),
        (lambda h: setattr(h, "mode", 0), "mode 0"),
        (lambda h: setattr(h, "mode", 77), "mode 77"),
        (lambda h: setattr(h, "timeout_ms", 0), "timeout_ms"),
        (lambda h: setattr(h, "reply_codec", 0), "reply_codec 0"),
        (lambda h: setattr(h, "reply_codec", 77), "reply_codec 77"),
        (lambda h: setattr(h, "layer", 2), "layer 2 does not exist"),
        (lambda h: setattr(h, "layer", 2**32 - 1), "does not exist"),
        (lambda h: h.ClearField("experts"), "names no expert"),
        (lambda h: setattr(h.experts[0], "index", 4), "expert 1.4 does not exist"),
        (lambda h: setattr(h.experts[0], "index", 1), "expert 1.1 is named twice"),
        (lambda h: setattr(h.experts[0], "num_rows", 0), "has 0 rows"),
        (lambda h: setattr(h.experts[0], "version", -1), "at version -1"),
        (lambda h: setattr(h.experts[0], "num_rows", 3), "add up to 6"),
        (lambda h: h.ClearField("tensors"), "a forward carries ROWS"),
        (lambda h: h.tensors.pop(0), "a forward carries ROWS"),
        (lambda h: h.tensors.pop(1), "ROWS has 3 rows, the experts' counts add up to 5"),
        (lambda h: h.tensors.append(h.tensors[0]), "announced twice"),
        (lambda h: setattr(h.tensors[0], "role", pb.ROLE_OUTPUTS), "a forward carries ROWS"),
        (lambda h: setattr(h.tensors[0], "dtype", pb.DTYPE_INT32), "must be FLOAT32"),
        (lambda h: setattr(h.tensors[0], "codec", 9), "unknown"),
        (lambda h: setattr(h.tensors[0], "size_bytes", 95), "takes 96"),
        (lambda h: h.tensors[0].shape.extend([1] * 7), "rank 9"),
        (lambda h: h.tensors[0].shape.append(1), "rank 3"),
        (lambda h: h.tensors[0].shape.reverse(), "rows of 3, this run's have 8"),
    ],
)
async def test_a_header_with_one_thing_wrong_is_invalid_and_says_so(spoil: Spoil, reason: str) -> None:
    frames = await frames_of(forward_call())
    spoil(frames[0].header)

    refusal, sentence = await _refusal_of(frames)

    assert refusal is Refusal.INVALID
    assert reason in sentence


@pytest.mark.hostile
@pytest.mark.parametrize("loss_tokens", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_backward_over_no_loss_tokens_is_invalid(loss_tokens: float) -> None:
    frames = await frames_of(backward_call())
    frames[0].header.loss_tokens = loss_tokens

    assert "loss_tokens must be positive" in (await _refusal_of(frames, Method.BACKWARD))[1]


@pytest.mark.hostile
@pytest.mark.parametrize("score", [-0.1, float("nan"), float("inf")])
async def test_a_score_that_nobody_could_have_is_invalid(score: float) -> None:
    frames = await frames_of(forward_call())
    frames[0].header.score = score

    assert "score must be finite" in (await _refusal_of(frames))[1]


@pytest.mark.hostile
async def test_a_backward_needs_gradients_and_training_and_rows_for_an_index() -> None:
    forward = await frames_of(forward_call(loss_tokens=1.0))
    evaluated = await frames_of(backward_call())
    index_only = await frames_of(backward_call(resends=True))
    evaluated[0].header.mode = pb.MODE_EVAL
    del index_only[0].header.tensors[1]

    for frames, reason in (
        (forward, "a backward carries GRADIENTS"),
        (evaluated, "an eval call has no backward"),
        (index_only, "a backward carries GRADIENTS"),
    ):
        refusal, sentence = await _refusal_of(frames, Method.BACKWARD)
        assert refusal is Refusal.INVALID
        assert reason in sentence


@pytest.mark.hostile
@pytest.mark.parametrize("shape", [[1_250_000_000, 1], [2**62, 4], [2**62, 2**62]])
async def test_five_gigabytes_are_too_large_at_the_header_without_waiting_for_them(shape: list[int]) -> None:
    header = (await frames_of(forward_call()))[0]
    header.header.tensors[0].shape[:] = shape
    header.header.tensors[0].size_bytes = 5_000_000_000
    frames = on_the_wire([header, pb.CallFrame(chunk=b"never read")])

    refusal, sentence = await _refusal_of(frames)

    assert refusal is Refusal.TOO_LARGE
    assert "at most 1048576" in sentence
    assert b"never read" in await anext(frames)


@pytest.mark.hostile
async def test_tensors_that_fit_one_by_one_but_not_together_are_too_large() -> None:
    limits = CallLimits(**(vars(LIMITS) | {"max_bytes": 3 * D * 4 + 5 * 4 - 1}))

    with pytest.raises(CallRefused, match="ROW_INDEX announces 20 bytes; at most 19") as error:
        await read_call(on_the_wire(await frames_of(forward_call())), limits, Method.FORWARD)

    assert error.value.refusal is Refusal.TOO_LARGE


@pytest.mark.hostile
async def test_more_rows_than_the_run_allows_are_too_large() -> None:
    limits = CallLimits(**(vars(LIMITS) | {"max_rows": 4}))

    with pytest.raises(CallRefused, match="5 rows; this run allows 4") as error:
        await read_call(on_the_wire(await frames_of(forward_call())), limits, Method.FORWARD)

    assert error.value.refusal is Refusal.TOO_LARGE


@pytest.mark.hostile
async def test_frames_out_of_place_are_invalid() -> None:
    header, chunk = await frames_of(forward_call())
    half = pb.CallFrame(chunk=chunk.chunk[:50])

    for frames, reason in (
        ([], "starts with its header"),
        ([chunk, header], "starts with its header"),
        ([pb.CallFrame()], "starts with its header"),
        ([header, header, chunk], "chunks only"),
        ([header, pb.CallFrame()], "chunks only"),
        ([header], "after 0 of 116 bytes"),
        ([header, half], "after 50 of 116 bytes"),
        ([header, pb.CallFrame(chunk=b""), chunk], "empty chunk"),
        ([header, chunk, pb.CallFrame(chunk=b"x")], "more bytes"),
        ([header, half, chunk], "more bytes"),
    ):
        refusal, sentence = await _refusal_of(frames)
        assert refusal is Refusal.INVALID
        assert reason in sentence


@pytest.mark.hostile
async def test_a_stream_that_never_ends_is_refused_at_its_first_byte_too_many() -> None:
    header, _ = await frames_of(forward_call())

    async def endless() -> AsyncIterator[Frame]:
        yield header.SerializeToString()
        while True:
            yield chunk_frame([bytes(50)])

    assert await _refusal_of(endless()) == (Refusal.INVALID, "more bytes than the header announced")


@pytest.mark.hostile
async def test_no_random_change_to_a_call_does_anything_but_refuse_it_or_keep_it_whole() -> None:
    rng = random.Random(20)
    frames = await frames_of(forward_call())
    original = frames[0].SerializeToString()
    num_refused = 0

    for _ in range(500):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            call = await read_call(sending(bytes(data), frames[1].SerializeToString()), LIMITS, Method.FORWARD)
        except CallRefused:
            num_refused += 1
        else:
            assert call.num_pairs == 5
            assert call.tensors[Role.ROWS].spec.shape == (3, D)

    assert 0 < num_refused < 500


async def test_an_answer_arrives_group_by_group() -> None:
    groups = await collect(read_reply(sending(*write_reply(whole_answer())), FORWARD_LIMITS))

    assert [group.experts for group in groups] == [group.experts for group in whole_answer()]
    assert groups[0].tensor is not None
    assert torch.equal(decode(groups[0].tensor), torch.full((3, D), 2.0))
    assert groups[1].tensor is None


async def test_a_backwards_answer_has_a_gradient_for_every_distinct_row() -> None:
    limits = ReplyLimits.of(backward_call(), Method.BACKWARD, num_rows=3)
    answer = GroupReply(
        (ExpertOutcome(3, Outcome.OK, 8), ExpertOutcome(1, Outcome.STALE, 80)),
        encode(X_UD, Role.ROW_GRADIENTS, Codec.BF16),
    )

    (group,) = await collect(read_reply(sending(*write_reply([answer])), limits))

    assert group.experts == answer.experts
    assert group.tensor is not None
    assert group.tensor.spec.shape == (3, D)


def test_a_group_has_a_tensor_exactly_when_an_expert_is_ok() -> None:
    tensor = encode(X_UD, Role.OUTPUTS, Codec.RAW)

    with pytest.raises(ValueError, match="exactly when"):
        GroupReply((ExpertOutcome(1, Outcome.OK),))
    with pytest.raises(ValueError, match="exactly when"):
        GroupReply((ExpertOutcome(1, Outcome.STALE),), tensor)


_OK_GROUP, _CHUNK = map(pb.ReplyFrame.FromString, write_group(whole_answer()[0]))
(_DECLINED,) = map(pb.ReplyFrame.FromString, write_group(whole_answer()[1]))
_END = pb.ReplyFrame(end=pb.CallEnd())


def _spoilt(frame: pb.ReplyFrame, spoil: Callable[[pb.GroupReply], object]) -> pb.ReplyFrame:
    changed = copy.deepcopy(frame)
    spoil(changed.group)
    return changed


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "cut short"),
        ([_OK_GROUP, _CHUNK, _DECLINED], "cut short"),
        ([_OK_GROUP], "cut short inside a tensor"),
        ([_OK_GROUP, pb.ReplyFrame(chunk=b"x")], "cut short inside a tensor"),
        ([_OK_GROUP, _DECLINED], "interrupted"),
        ([_OK_GROUP, _CHUNK, _CHUNK], "no group announced"),
        ([_OK_GROUP, pb.ReplyFrame(chunk=_CHUNK.chunk + b"x")], "more bytes"),
        ([_OK_GROUP, pb.ReplyFrame(chunk=b"")], "empty chunk"),
        ([_CHUNK], "no group announced"),
        ([pb.ReplyFrame()], "empty frame"),
        ([_END], "leaves out 2 experts"),
        ([_DECLINED, _END], "leaves out 1 experts"),
        ([_OK_GROUP, _CHUNK, _DECLINED, _END, _END], "after its end"),
        ([_DECLINED, _DECLINED], "has answered before"),
        ([_spoilt(_DECLINED, lambda g: setattr(g.experts[0], "index", 2))], "was not asked"),
        ([_spoilt(_DECLINED, lambda g: setattr(g.experts[0], "outcome", 0))], "unknown outcome 0"),
        ([_spoilt(_DECLINED, lambda g: setattr(g.experts[0], "outcome", 99))], "unknown outcome 99"),
        ([_spoilt(_DECLINED, lambda g: setattr(g.experts[0], "outcome", pb.OUTCOME_OK))], "exactly when"),
        ([_spoilt(_DECLINED, lambda g: setattr(g.experts[0], "version", -5))], "at version -5"),
        ([_spoilt(_DECLINED, lambda g: g.ClearField("experts"))], "without experts"),
        ([_spoilt(_OK_GROUP, lambda g: setattr(g.experts[0], "outcome", pb.OUTCOME_STALE))], "exactly when"),
        ([_spoilt(_OK_GROUP, lambda g: setattr(g.tensor, "role", pb.ROLE_ROW_GRADIENTS))], "asked for OUTPUTS"),
        ([_spoilt(_OK_GROUP, lambda g: setattr(g.tensor, "codec", pb.CODEC_RAW))], "not allow"),
        ([_spoilt(_OK_GROUP, lambda g: setattr(g.tensor, "size_bytes", 5_000_000_000))], "at most"),
        ([_spoilt(_OK_GROUP, lambda g: g.tensor.shape.__setitem__(0, 2**62))], "at most"),
        ([_spoilt(_OK_GROUP, lambda g: g.tensor.shape.reverse())], "asked for OUTPUTS of the shape"),
    ],
)
async def test_an_answer_with_one_thing_wrong_is_malformed_and_says_so(
    frames: list[pb.ReplyFrame], reason: str
) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        await collect(read_reply(on_the_wire(frames), FORWARD_LIMITS))


async def test_the_groups_before_a_cut_are_good() -> None:
    groups = read_reply(on_the_wire([_OK_GROUP, _CHUNK]), FORWARD_LIMITS)

    assert (await anext(groups)).experts == whole_answer()[0].experts
    with pytest.raises(MalformedMessage, match="cut short"):
        await anext(groups)


@pytest.mark.parametrize(("ours", "schema"), [(Mode, pb.Mode), (Outcome, pb.Outcome)], ids=["mode", "outcome"])
def test_our_names_are_the_schemas_without_its_unspecified(ours: type[Mode | Outcome], schema: object) -> None:
    named = {f"{ours.__name__.upper()}_{member.name}": member.value for member in ours}

    assert named == {name: value for name, value in schema.items() if value}  # pyright: ignore


def _without_tensors(call: Call) -> dict[str, object]:
    return {name: value for name, value in vars(call).items() if name != "tensors"}
