"""What a run says about its experts: their shape and how they learn. Frozen, validated, part of the run's identity."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_DEFAULT_BLOCKS = 4


class ExpertShape(BaseModel, frozen=True, extra="forbid"):
    """Every expert of a run has one kind and shape, so that a device can run them as one grouped GEMM."""

    kind: str = "swiglu"
    """A registered expert kind: `ffn`, `swiglu`, `block`, `stack`, or one of yours."""
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    """D, the width of the rows that travel."""
    hidden: Annotated[int, Field(ge=1, le=1 << 20)]
    """H, the expert's inner width."""
    blocks: Annotated[int, Field(ge=1, le=64)] = _DEFAULT_BLOCKS
    """Transformer blocks of a `stack`, one after the other; of no other kind."""

    @model_validator(mode="after")
    def _only_stacks_have_blocks(self) -> Self:
        if self.kind != "stack" and self.blocks != _DEFAULT_BLOCKS:
            raise ValueError(f"expert.blocks belongs to expert.kind stack; a {self.kind} has none")
        return self


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
    """Rows an expert gathers before it takes a step; 1 steps after every backward, or after all that came at once."""
