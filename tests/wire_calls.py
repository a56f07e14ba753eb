"""A good call and a good answer, for tests to send or to spoil."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

import torch

from experts.uid import RunId
from peer.call_stream import write_call
from peer.messages import Call, CallLimits, ExpertOutcome, ExpertRows, GroupReply, Mode, Outcome
from peer.tensors import Role, encode
from peer.transport import Frame
from peer.wire_codecs import Codec
from protos import swarm_pb2 as pb

RUN = RunId("0123456789abcdef")
D = 8
LIMITS = CallLimits(
    run_id=RUN,
    dim=D,
    num_layers=2,
    experts_per_layer=4,
    codecs=frozenset(Codec),
    max_rows=1000,
    max_bytes=1 << 20,
)
X_UD = torch.arange(3.0 * D).view(3, D)
ROW_INDEX_N = torch.tensor([0, 2, 1, 2, 0], dtype=torch.int32)
EXPERTS = (ExpertRows(3, 2, version=7), ExpertRows(1, 3, version=9))


def forward_call(**changes: object) -> Call:
    """Five pairs over three distinct rows."""
    fields: dict[str, object] = {
        "call_id": b"c" * 16,
        "run_id": RUN,
        "mode": Mode.TRAIN,
        "layer": 1,
        "experts": EXPERTS,
        "reply_codec": Codec.BF16,
        "timeout_s": 2.5,
        "tensors": {
            Role.ROWS: encode(X_UD, Role.ROWS, Codec.RAW),
            Role.ROW_INDEX: encode(ROW_INDEX_N, Role.ROW_INDEX, Codec.RAW),
        },
    }
    return Call(**(fields | changes))  # pyright: ignore[reportArgumentType]


def backward_call(*, resends: bool = False) -> Call:
    """The same call's backward."""
    gradients = {Role.GRADIENTS: encode(torch.ones(5, D), Role.GRADIENTS, Codec.BF16)}
    tensors = gradients | dict(forward_call().tensors) if resends else gradients
    return forward_call(tensors=tensors, loss_tokens=64.0)


def whole_answer(*, codec: Codec = Codec.BF16) -> list[GroupReply]:
    """Of the forward, in two groups."""
    return [
        GroupReply((ExpertOutcome(1, Outcome.OK, 9),), encode(torch.full((3, D), 2.0), Role.OUTPUTS, codec)),
        GroupReply((ExpertOutcome(3, Outcome.DECLINED),)),
    ]


async def frames_of(call: Call) -> list[pb.CallFrame]:
    """What protobuf makes of the call's frames."""
    return [pb.CallFrame.FromString(frame) async for frame in write_call(call)]


async def on_the_wire(frames: Iterable[pb.CallFrame | pb.ReplyFrame]) -> AsyncIterator[Frame]:
    """What protobuf makes of frames that may be of our own making."""
    for frame in frames:
        yield frame.SerializeToString()


async def collect(groups: AsyncIterable[GroupReply]) -> list[GroupReply]:
    return [group async for group in groups]
