"""What a run says about its experts: their shape and how they learn. Frozen, validated, part of the run's identity."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ExpertShape(BaseModel):
    """Every expert of a run has one kind and shape, so that a device can run them as one grouped GEMM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = "swiglu"
    """A registered expert kind: `ffn`, `swiglu`, or one of yours."""
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    """D, the width of the rows that travel."""
    hidden: Annotated[int, Field(ge=1, le=1 << 20)]
    """H, the expert's inner width."""


class ExpertOptimizerSettings(BaseModel):
    """One rule for all experts; each applies it on its own clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, lt=10)] = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm of one expert's update; none to switch clipping off."""
    warmup_tokens: Annotated[int, Field(ge=0)] = 0
    """Rows of its own an expert learns on while its rate rises linearly from zero."""
    decay_tokens: Annotated[int, Field(ge=1)] | None = None
    """Rows of its own after which a cosine has taken the rate down to `final_rate_share`; none: constant."""
    final_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    step_tokens: Annotated[int, Field(ge=1)] = 1
    """Rows an expert gathers before it takes a step; 1 steps after every backward."""
