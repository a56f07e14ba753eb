"""An answer as frames: written by a peer, read by a trainer. Bytes in, validated `GroupReply`s out, one by one.

Runs on the event loop and handles bytes and Python integers only; finiteness is checked where tensors are decoded.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import cast

from peer.errors import MalformedMessage
from peer.framing import TensorAssembler, cut_into_chunks, parse_frame
from peer.messages import ExpertOutcome, GroupReply, Outcome, ReplyLimits
from peer.tensors import TensorSpec, check_header, header_of
from peer.transport import Frame
from protos import swarm_pb2 as pb

END: Frame = pb.ReplyFrame(end=pb.CallEnd()).SerializeToString()
"""The last frame of an answer that is whole."""


def write_reply(groups: Iterable[GroupReply]) -> Iterator[Frame]:
    """A whole answer: its groups, then the end."""
    for group in groups:
        yield from write_group(group)
    yield END


def write_group(group: GroupReply) -> Iterator[Frame]:
    """One group of an answer that goes on."""
    tensor = group.tensor
    yield pb.ReplyFrame(
        group=pb.GroupReply(
            experts=[
                pb.ExpertOutcome(index=e.index, outcome=cast("pb.Outcome", e.outcome), version=e.version)
                for e in group.experts
            ],
            tensor=header_of(tensor.spec) if tensor is not None else None,
        )
    ).SerializeToString()
    yield from cut_into_chunks([tensor.data] if tensor is not None else [])


async def read_reply(frames: AsyncIterator[Frame], limits: ReplyLimits) -> AsyncIterator[GroupReply]:
    """Each group as soon as it is whole. Raises MalformedMessage for whatever is no answer to this call.

    That includes an answer cut short: the groups before the cut have been yielded and are good. Whoever leaves early
    closes `frames`.
    """
    unanswered = set(limits.pairs_of)
    ended = False
    async for frame in frames:
        if ended:
            raise MalformedMessage("the answer goes on after its end")
        message = parse_frame(frame, pb.ReplyFrame)
        if isinstance(message, memoryview):
            raise MalformedMessage("a chunk that no group announced")
        if message.HasField("group"):
            yield await _read_group(message.group, frames, limits, unanswered)
        elif message.HasField("end"):
            ended = True
        else:
            raise MalformedMessage("an empty frame")
    if not ended:
        raise MalformedMessage("the answer was cut short")
    if unanswered:
        raise MalformedMessage(f"the answer leaves out {len(unanswered)} experts of the call")


async def _read_group(
    message: pb.GroupReply, frames: AsyncIterator[Frame], limits: ReplyLimits, unanswered: set[int]
) -> GroupReply:
    experts = _check_experts(message, unanswered)
    ok = [expert.index for expert in experts if expert.outcome is Outcome.OK]
    if message.HasField("tensor") != bool(ok):
        raise MalformedMessage("a group has a tensor exactly when one of its experts is OK")
    if not ok:
        return GroupReply(experts)
    assembler = TensorAssembler([_check_tensor(message, limits, ok)])
    while not assembler.is_complete:
        frame = await anext(frames, None)
        if frame is None:
            raise MalformedMessage("the answer was cut short inside a tensor")
        chunk = parse_frame(frame, pb.ReplyFrame)
        if not isinstance(chunk, memoryview):
            raise MalformedMessage("a tensor's chunks are interrupted by another frame")
        assembler.feed(chunk)
    return GroupReply(experts, assembler.tensors()[0])


def _check_experts(message: pb.GroupReply, unanswered: set[int]) -> tuple[ExpertOutcome, ...]:
    """Takes the group's experts off `unanswered`."""
    experts: list[ExpertOutcome] = []
    for expert in message.experts:
        if expert.index not in unanswered:
            raise MalformedMessage(f"expert {expert.index} was not asked, or has answered before")
        if expert.version < 0:
            raise MalformedMessage(f"expert {expert.index} is at version {expert.version}")
        try:
            outcome = Outcome(expert.outcome)
        except ValueError:
            raise MalformedMessage(f"expert {expert.index} has the unknown outcome {expert.outcome}") from None
        unanswered.remove(expert.index)
        experts.append(ExpertOutcome(expert.index, outcome, expert.version))
    if not experts:
        raise MalformedMessage("a group without experts")
    return tuple(experts)


def _check_tensor(message: pb.GroupReply, limits: ReplyLimits, ok: list[int]) -> TensorSpec:
    shape = (limits.rows_expected(ok), limits.dim)
    spec = check_header(message.tensor, codecs_allowed=(limits.codec,), max_bytes=4 * shape[0] * shape[1])
    if spec.role is not limits.role or spec.shape != shape:
        raise MalformedMessage(
            f"asked for {limits.role.name} of the shape {list(shape)}, got {spec.role.name} of {list(spec.shape)}"
        )
    return spec
