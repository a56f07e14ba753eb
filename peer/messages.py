"""What trainers and peers say to each other, once it is known to be valid, and how much of it each side accepts.

Where experts see sequences, LENGTHS goes with ROWS and says how an expert's consecutive pairs fall into them.
Pairs are sorted by expert: `experts[0].num_rows` pairs of the first, then those of the second. A pair reads the
distinct row of its own number, or `row_index[n]`. A forward group's OUTPUTS holds the pairs of its OK experts, in the
order of the group; a backward group's ROW_GRADIENTS holds all U distinct rows of the call, and groups add up. Every
expert of a call is answered in exactly one group.

Knows neither frames (`call_stream`, `reply_stream`) nor what a tensor's values are (`tensors`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from experts.registry import expert_kind
from experts.uid import RunId
from peer.manifest import RunManifest
from peer.tensors import Role, WireTensor
from peer.transport import Method
from peer.wire_codecs import Codec
from protos import swarm_pb2 as pb

CALL_ID_BYTES = 16
MAX_CALL_BYTES = 256 << 20
"""Tensor bytes of one call: a peer holds several calls in memory at once. A larger micro-batch is several calls."""


class Mode(IntEnum):
    """Whether a forward may be followed by a backward."""

    TRAIN = pb.MODE_TRAIN
    EVAL = pb.MODE_EVAL


class Outcome(IntEnum):
    """What became of one expert's part of a call; see the schema for each."""

    OK = pb.OUTCOME_OK
    DECLINED = pb.OUTCOME_DECLINED
    UNKNOWN_EXPERT = pb.OUTCOME_UNKNOWN_EXPERT
    STALE = pb.OUTCOME_STALE
    MISSING_INPUTS = pb.OUTCOME_MISSING_INPUTS
    ALREADY_APPLIED = pb.OUTCOME_ALREADY_APPLIED
    NON_FINITE = pb.OUTCOME_NON_FINITE


@dataclass(frozen=True)
class ExpertRows:
    """One expert's consecutive pairs in a call."""

    index: int
    num_rows: int
    version: int = 0
    """Backward: the version its forward saw."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A forward (ROWS, perhaps ROW_INDEX, LENGTHS) or a backward (GRADIENTS; those too when the peer has lost them)."""

    call_id: bytes
    """16 bytes; a backward repeats its forward's."""
    run_id: RunId
    mode: Mode
    layer: int
    experts: tuple[ExpertRows, ...]
    reply_codec: Codec
    timeout_s: float
    """What was left of the caller's deadline when it sent."""
    tensors: Mapping[Role, WireTensor]
    """As they travel, in order."""
    loss_tokens: float = 0.0
    """Backward: the loss tokens the gradient sums over."""
    score: float = 0.0
    """Forward: the mean router weight of its pairs. Over capacity a peer declines its caller's lowest first."""

    @property
    def is_training(self) -> bool:
        return self.mode is Mode.TRAIN

    @property
    def num_pairs(self) -> int:
        """N"""
        return sum(expert.num_rows for expert in self.experts)

    @property
    def size_bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class ExpertOutcome:
    """One expert's part of an answer."""

    index: int
    outcome: Outcome
    version: int = 0
    """Optimiser steps taken. Forward: the version used. Backward: after it."""


@dataclass(frozen=True)
class GroupReply:
    """Part of an answer: these experts are done. `tensor` is there exactly when one of them is OK."""

    experts: tuple[ExpertOutcome, ...]
    tensor: WireTensor | None = None

    def __post_init__(self) -> None:
        if (self.tensor is not None) != any(expert.outcome is Outcome.OK for expert in self.experts):
            raise ValueError("a group has a tensor exactly when one of its experts is OK")


@dataclass(frozen=True)
class CallLimits:
    """What a peer accepts."""

    run_id: RunId
    dim: int
    num_layers: int
    experts_per_layer: int
    codecs: frozenset[Codec]
    max_rows: int
    max_bytes: int = MAX_CALL_BYTES
    max_sequence: int | None = None
    """Tokens of a sequence; None where experts see rows one by one."""

    @classmethod
    def of(cls, manifest: RunManifest) -> Self:
        return cls(
            run_id=manifest.run_id,
            dim=manifest.expert.dim,
            num_layers=manifest.moe_layers,
            experts_per_layer=manifest.experts_per_layer,
            codecs=frozenset(Codec.named(name) for name in manifest.wire.codecs),
            max_rows=manifest.wire.max_rows,
            max_sequence=manifest.model.context if expert_kind(manifest.expert.kind).is_sequence_level else None,
        )


@dataclass(frozen=True)
class ReplyLimits:
    """What a trainer accepts in answer to one call: as much as it asked for, in the form it asked for."""

    pairs_of: Mapping[int, int]
    """The experts of the call, each with the number of its pairs."""
    role: Role
    codec: Codec
    dim: int
    num_rows: int
    """U, the distinct rows of the call: a backward's answer has one gradient for each."""

    @classmethod
    def of(cls, call: Call, method: Method, *, num_rows: int) -> Self:
        """`num_rows` is U, which a backward that sends gradients only does not say itself."""
        sent, role = (Role.ROWS, Role.OUTPUTS) if method is Method.FORWARD else (Role.GRADIENTS, Role.ROW_GRADIENTS)
        dim = call.tensors[sent].spec.shape[1]
        return cls({expert.index: expert.num_rows for expert in call.experts}, role, call.reply_codec, dim, num_rows)

    def rows_expected(self, ok: Iterable[int]) -> int:
        """Rows of a group's tensor when these of its experts are OK."""
        return self.num_rows if self.role is Role.ROW_GRADIENTS else sum(self.pairs_of[index] for index in ok)
