"""What a trainer says about one step. Data only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """One training step, as it is shown and written down."""

    step: int
    """Counted from 1; the step that has just ended."""
    train_bits_per_byte: float | None
    """Mean over the step's own tokens; None when no forward came through."""
    tokens: int
    """Tokens this trainer has trained on since the run began, resumed part included."""
    tokens_per_s: float
    answered_share: float
    """Pairs that came back over pairs sent, in this step's forwards."""
    pairs_lost: int
    experts_alive: int
    experts_total: int
    skipped: str | None
    """Why the step changed nothing; None when it did."""
    wall_s: float
    """Since this trainer began its first step."""
