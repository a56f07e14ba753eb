"""What a trainer writes down when it is done."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer.summary import SUMMARY_FILE, TrainerSummary, add_counts, edge_means, read_summary

SUMMARY = TrainerSummary(
    steps=10,
    steps_skipped=1,
    first_step_unix_s=100.0,
    last_step_unix_s=160.5,
    tokens=1000,
    train_bits_per_byte_first=7.5,
    train_bits_per_byte_last=3.25,
    val_bits_per_byte=None,
    calls={"sent": 3, "answered": 2, "lost": 1},
    pairs={"sent": 30, "answered": 20, "lost": 10},
    lost_by_reason={"timeout": 10},
    backwards={"sent": 2, "applied": 2},
    bytes_up=5,
    bytes_down=7,
)


@pytest.mark.parametrize(
    ("losses", "first", "last"),
    [
        ([4.0], 4.0, 4.0),
        ([5.0, 4.0, 3.0], 5.0, 3.0),
        ([float(loss) for loss in range(39)], 0.0, 38.0),
        ([float(loss) for loss in range(40)], 0.5, 38.5),
        ([float(loss) for loss in range(100)], 2.0, 97.0),
    ],
)
def test_the_edges_are_five_percent_of_the_steps_and_at_least_one(
    losses: list[float], first: float, last: float
) -> None:
    assert edge_means(losses) == (first, last)


def test_without_a_step_there_are_no_edges() -> None:
    assert edge_means([]) == (None, None)


def test_a_summary_reads_back_as_it_was_written(tmp_path: Path) -> None:
    SUMMARY.write(tmp_path)

    assert read_summary(tmp_path) == SUMMARY


def test_a_trainer_that_has_not_ended_has_none(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None


def test_what_is_no_summary_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / SUMMARY_FILE).write_text('{"steps": 3}')

    with pytest.raises(ValidationError):
        read_summary(tmp_path)


def test_counts_of_several_trainers_add_up_by_name() -> None:
    assert add_counts([{"sent": 3, "lost": 1}, {"sent": 4}, {}]) == {"sent": 7, "lost": 1}
