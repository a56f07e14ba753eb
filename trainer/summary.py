"""What a trainer has to say when it is done: one JSON file beside its checkpoints. Pure data and arithmetic."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from experts.atomic_files import write_atomically

SUMMARY_FILE = "summary.json"
EDGE_SHARE = 0.05
"""Losses are reported as means over this share of the steps at either end, at least one."""


class TrainerSummary(BaseModel):
    """One trainer's run, from its first to its last step in this process."""

    model_config = ConfigDict(frozen=True)

    steps: int
    steps_skipped: int
    first_step_unix_s: float
    last_step_unix_s: float
    tokens: int
    """Trained; those of skipped steps are not."""
    train_bits_per_byte_first: float | None
    train_bits_per_byte_last: float | None
    val_bits_per_byte: float | None
    """On held-out text after the last step; None when it was stopped before."""
    calls: dict[str, int]
    pairs: dict[str, int]
    lost_by_reason: dict[str, int]
    backwards: dict[str, int]
    bytes_up: int
    bytes_down: int
    gave_up: str | None = None
    """Why training ended before its last step; None when it did not."""

    def write(self, folder: Path) -> None:
        write_atomically(folder / SUMMARY_FILE, self.model_dump_json(indent=2).encode())


def edge_means(bits_per_byte: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of the first and of the last 5 % of the steps; None without a step."""
    if not bits_per_byte:
        return None, None
    edge = max(1, math.floor(len(bits_per_byte) * EDGE_SHARE))
    return math.fsum(bits_per_byte[:edge]) / edge, math.fsum(bits_per_byte[-edge:]) / edge


def read_summary(folder: Path) -> TrainerSummary | None:
    """What a trainer wrote; None when it has not. Raises pydantic.ValidationError for anything else."""
    path = folder / SUMMARY_FILE
    return TrainerSummary.model_validate_json(path.read_bytes()) if path.exists() else None


def add_counts(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Sum per key."""
    total: dict[str, Any] = {}
    for part in counts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total
