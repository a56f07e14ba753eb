"""What a peer measured of its link and its device, as its record tells it. Bounded; measures and judges nothing."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Speed = Annotated[float, Field(ge=1e-3, le=1e18, allow_inf_nan=False)]
"""Per second. Never zero: what reads records divides by it."""


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer member may say more


class MeasuredLink(_Measured):
    """The way from a peer to another member, as calls see it: with TLS, through gRPC."""

    up_bits_per_s: Speed
    down_bits_per_s: Speed
    latency_ms: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    """There and back, with nothing to carry."""

    @property
    def bits_per_s(self) -> float:
        """W. A call moves as many bits up as down, so the slower way decides."""
        return min(self.up_bits_per_s, self.down_bits_per_s)


class MeasuredDevice(_Measured):
    """A device while it has nothing to do but one kind of expert, forward and backward."""

    tokens_per_s: Speed
    flops_per_s: Speed
    """F, what it achieves; not what its maker says."""


class Rates(_Measured):
    """What a peer measured at its start; none: it could not be measured."""

    link: MeasuredLink | None = None
    device: MeasuredDevice | None = None

    def refined(self, tokens_per_s: float | None) -> "Rates":
        """With what the device does on real calls, once there were some: their sizes, and steps, included."""
        if tokens_per_s is None or self.device is None:
            return self
        flops_per_s = self.device.flops_per_s * tokens_per_s / self.device.tokens_per_s
        device = MeasuredDevice(tokens_per_s=tokens_per_s, flops_per_s=flops_per_s)
        return self.model_copy(update={"device": device})
