"""Whom `--kill-every` kills, and when. A rule: it gets the time and a seed, and kills nobody itself."""

import random
from collections.abc import Sequence

RESTART_AFTER_S = 5.0
QUIET_END_S = 30.0
"""No kill this close to the end, so that the swarm can mend before it is judged."""


class KillPlan:
    """A kill is due every `every_s` from the first training step on, while more than QUIET_END_S of training remain."""

    def __init__(self, *, every_s: float, seed: int) -> None:
        self._every_s = every_s
        self._rng = random.Random(f"kills {seed}")
        self._next_s: float | None = None

    def training_began(self, *, now_s: float) -> None:
        """Idempotent."""
        if self._next_s is None:
            self._next_s = now_s + self._every_s

    def next_s(self) -> float | None:
        """When to look again; None before training."""
        return self._next_s

    def pick(self, alive: Sequence[str], *, remaining_s: float, now_s: float) -> str | None:
        """The peer to kill now, or none: too early, nobody there, or too close to the end."""
        if self._next_s is None or now_s < self._next_s:
            return None
        self._next_s += self._every_s
        if not alive or remaining_s <= QUIET_END_S:
            return None
        return self._rng.choice(sorted(alive))


def remaining_s(*, steps_done: int, steps: int, elapsed_s: float) -> float:
    """Training time that is left, at the pace so far; infinite before the first step."""
    return (steps - steps_done) * elapsed_s / steps_done if steps_done else float("inf")
