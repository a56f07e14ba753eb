"""What an expert is when it is not computing: its weights, its optimiser's moments and its clock."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clock:
    """How far one expert has learned. Its own, whatever the rest of the swarm does."""

    version: int = 0
    """Optimiser steps taken."""
    rows_learned: int = 0
    """Rows those steps were made of; drives its schedule."""


@dataclass(frozen=True)
class ExpertState:
    """A detached copy of one expert, on the CPU. A gradient gathered for a step not yet taken is not part of it."""

    weights: Mapping[str, Tensor]
    """float32, by parameter name."""
    moments: Mapping[str, Tensor]
    """float32, by `moment.parameter`; empty for SGD."""
    clock: Clock
