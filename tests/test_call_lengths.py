"""Calls to experts that see sequences: LENGTHS goes with ROWS, and says something possible."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from experts.settings import ExpertShape
from peer.call_stream import read_call
from peer.errors import MalformedMessage
from peer.manifest import RunManifest
from peer.messages import Call, CallLimits
from peer.tensors import Role, WireTensor, decode_lengths, encode
from peer.transport import CallRefused, Method, Refusal
from peer.wire_codecs import Codec
from tests.wire_calls import LIMITS, backward_call, forward_call, frames_of, on_the_wire

SEQUENCES = replace(LIMITS, max_sequence=2)
"""Of two tokens at most: the call's 2 and 3 pairs make three sequences or more."""


def encoded(lengths: Sequence[int]) -> WireTensor:
    return encode(torch.tensor(lengths, dtype=torch.int32), Role.LENGTHS, Codec.RAW)


def with_lengths(call: Call, lengths: Sequence[int]) -> Call:
    return replace(call, tensors={**call.tensors, Role.LENGTHS: encoded(lengths)})


async def read(call: Call, limits: CallLimits, method: Method = Method.FORWARD) -> Call:
    return await read_call(on_the_wire(await frames_of(call)), limits, method)


def test_a_run_whose_experts_see_sequences_says_how_long_these_may_be() -> None:
    block = RunManifest(expert=ExpertShape(kind="block", dim=128, hidden=256))
    swiglu = RunManifest(expert=ExpertShape(dim=128, hidden=256))

    assert CallLimits.of(block).max_sequence == block.model.context
    assert CallLimits.of(swiglu).max_sequence is None


async def test_lengths_travel_with_the_rows_there_and_in_a_backward_sent_with_rows() -> None:
    forward = await read(with_lengths(forward_call(), [2, 2, 1]), SEQUENCES)
    again = await read(with_lengths(backward_call(resends=True), [2, 1, 2]), SEQUENCES, Method.BACKWARD)
    gradients_only = await read(backward_call(), SEQUENCES, Method.BACKWARD)

    assert decode_lengths(forward.tensors[Role.LENGTHS], counts=(2, 3), longest=2) == (2, 2, 1)
    assert decode_lengths(again.tensors[Role.LENGTHS], counts=(2, 3), longest=2) == (2, 1, 2)
    assert set(gradients_only.tensors) == {Role.GRADIENTS}


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("call", "limits", "method", "reason"),
    [
        (forward_call(), SEQUENCES, Method.FORWARD, "a forward carries LENGTHS, ROWS"),
        (with_lengths(forward_call(), [2, 2, 1]), LIMITS, Method.FORWARD, "a forward carries ROWS"),
        (
            backward_call(resends=True),
            SEQUENCES,
            Method.BACKWARD,
            "a backward carries GRADIENTS, perhaps LENGTHS, ROWS",
        ),
        (with_lengths(backward_call(), [2, 2, 1]), SEQUENCES, Method.BACKWARD, "a backward carries GRADIENTS"),
        (
            with_lengths(forward_call(), [2, 3]),
            SEQUENCES,
            Method.FORWARD,
            "2 sequences; these experts' rows make 3 to 5",
        ),
        (with_lengths(forward_call(), [1] * 6), SEQUENCES, Method.FORWARD, "6 sequences"),
    ],
    ids=["forward without", "of rows", "backward without", "gradients only", "too few", "too many"],
)
async def test_lengths_out_of_place_are_refused_by_the_header(
    call: Call, limits: CallLimits, method: Method, reason: str
) -> None:
    with pytest.raises(CallRefused) as refused:
        await read(call, limits, method)

    assert refused.value.refusal is Refusal.INVALID
    assert reason in str(refused.value)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([1, 3, 1], "a sequence of 3; this run's have at most 2"),
        ([2**31 - 1, 1, 1], "a sequence of 2147483647"),
        ([2, 0, 2, 1], "at least one token"),
        ([2, -1, 2, 2], "at least one token"),
        ([1, 2, 2], "do not fit"),
        ([2, 1, 1], "do not fit"),
    ],
    ids=["long", "huge", "empty", "negative", "straddling", "too few rows"],
)
def test_lengths_that_cannot_be_are_malformed(lengths: list[int], reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        decode_lengths(encoded(lengths), counts=(2, 3), longest=2)
