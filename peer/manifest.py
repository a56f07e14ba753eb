"""The run manifest: everything that must be the same for all who train one model together. Its hash is the run id.

Frozen pydantic, TOML on disk, signed by the owner. Local matters (devices, ports, folders) are not in it.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.uid import ExpertUid, RunId

PROTOCOL_VERSION = 1
"""Members with another version refuse each other. Raised when the wire or the meaning of a field changes."""

WireCodec = Literal["fp32", "bf16", "fp16", "int8"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Section):
    """The dense trunk, laid out like Qwen2-MoE so that an export is exact."""

    dim: Annotated[int, Field(ge=8, le=1 << 16)] = 128
    layers: Annotated[int, Field(ge=1, le=256)] = 2
    heads: Annotated[int, Field(ge=1)] = 4
    kv_heads: Annotated[int, Field(ge=1)] = 2
    context: Annotated[int, Field(ge=2, le=1 << 20)] = 128
    """S, tokens in a sequence."""
    vocab: Annotated[int, Field(ge=2)] = 256
    """256: bytes."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    shared_hidden: Annotated[int, Field(ge=0)] = 128
    """Inner width of the gated shared expert that every trainer runs itself; the floor when nobody answers. 0: none."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        if self.dim % self.heads or self.heads % self.kv_heads or (self.dim // self.heads) % 2:
            raise ValueError("model.dim must be a multiple of model.heads with an even quotient, heads of kv_heads")
        return self


class RouterSettings(_Section):
    """A preset by name, and what to change in it."""

    preset: str = "mixtral"
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Experts per token; none: the preset's own."""
    balance: Annotated[float, Field(ge=0)] | None = None
    """Weight of the preset's balance loss; none: the preset's own."""


class TrunkOptimizerSettings(_Section):
    """AdamW over embeddings, attention, norms, shared experts and routers, on each trainer."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps after which a cosine has taken the rate down to a tenth; none: constant."""


class BatchSettings(_Section):
    """What one trainer feeds into one step."""

    sequences: Annotated[int, Field(ge=1)] = 16
    """B, sequences in a micro-batch."""
    micro_batches: Annotated[int, Field(ge=1)] = 2
    """Micro-batches a step adds up; they are in flight together."""


class WireSettings(_Section):
    """What may travel, in which form, for how long."""

    codecs: tuple[WireCodec, ...] = ("fp32", "bf16", "fp16", "int8")
    """The receiver accepts these and nothing else."""
    forward_codec: WireCodec = "int8"
    """Of rows and outputs."""
    backward_codec: WireCodec = "bf16"
    """Of gradients, both ways. int8 rounds them at random, right in the mean."""
    call_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    step_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    max_staleness: Annotated[int, Field(ge=0)] = 64
    """Optimiser steps an expert may have taken between a forward and its backward."""
    max_rows: Annotated[int, Field(ge=1)] = 1 << 18
    """Pairs in one call."""

    @model_validator(mode="after")
    def _codecs_allowed(self) -> "WireSettings":
        for codec in (self.forward_codec, self.backward_codec):
            if codec not in self.codecs:
                raise ValueError(f"wire.codecs does not allow {codec}, which this run sends")
        return self


class AveragingSettings(_Section):
    """How the trunks of several trainers stay one model."""

    policy: Literal["auto", "none"] = "auto"


class RunManifest(_Section):
    """One run. Everything but `owner` and `name` decides what is trained; all of it is hashed."""

    protocol_version: Literal[1] = PROTOCOL_VERSION
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"[A-Za-z0-9._-]+")] = "demo"
    owner: str = ""
    """Peer id of the owner's key; filled in by the coordinator that signs."""
    seed: int = 0
    moe_layers: Annotated[int, Field(ge=1)] = 2
    """Layers whose feed-forward part is a mixture; the last ones of `model.layers`."""
    experts_per_layer: Annotated[int, Field(ge=1, le=1 << 16)] = 8
    expert: ExpertShape
    expert_optimizer: ExpertOptimizerSettings = ExpertOptimizerSettings()
    model: ModelSettings = ModelSettings()
    router: RouterSettings = RouterSettings()
    trunk_optimizer: TrunkOptimizerSettings = TrunkOptimizerSettings()
    batch: BatchSettings = BatchSettings()
    wire: WireSettings = WireSettings()
    averaging: AveragingSettings = AveragingSettings()
    min_answered_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A step is skipped when in any layer fewer of the pairs than this came back."""
    steps: Annotated[int, Field(ge=1)] = 300
    """Suggested length; `train --steps` overrides it locally."""

    @model_validator(mode="after")
    def _shapes_agree(self) -> "RunManifest":
        if self.expert.dim != self.model.dim:
            raise ValueError(f"expert.dim ({self.expert.dim}) must equal model.dim ({self.model.dim})")
        if self.moe_layers > self.model.layers:
            raise ValueError(f"moe_layers ({self.moe_layers}) is more than model.layers ({self.model.layers})")
        return self

    @property
    def run_id(self) -> RunId:
        """SHA-256 of the canonical JSON, first 32 hex digits."""
        return RunId(hashlib.sha256(self.canonical_json()).hexdigest()[:32])

    def canonical_json(self) -> bytes:
        """The bytes that are hashed and signed: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def num_experts(self) -> int:
        """Of all layers together."""
        return self.moe_layers * self.experts_per_layer

    def uids(self) -> list[ExpertUid]:
        """Every expert of the run, in order."""
        return [ExpertUid(layer, index) for layer in range(self.moe_layers) for index in range(self.experts_per_layer)]

    def differences(self, other: "RunManifest") -> list[str]:
        """Which fields differ, as `a.b: ours X, theirs Y`; empty when the two are one run."""
        ours, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return [
            f"{key}: ours {ours.get(key)!r}, theirs {theirs.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]


def load_manifest(path: Path) -> RunManifest:
    """Read a run file. Raises OSError, tomllib.TOMLDecodeError or pydantic.ValidationError."""
    return RunManifest.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
