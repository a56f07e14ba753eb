"""What a watcher sees on a terminal and in a pipe, and what the metrics file keeps."""

import contextlib
import io
import json
import math
import os
import pty
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.progress import open_progress
from trainer.reports import StepReport

REPORT = StepReport(
    step=1,
    train_bits_per_byte=3.25,
    tokens=4096,
    tokens_per_s=12345.6,
    answered_share=0.995,
    pairs_lost=21,
    experts_alive=15,
    experts_total=16,
    skipped=None,
    wall_s=2.5,
)


def show(*reports: StepReport, total_steps: int = 30) -> list[str]:
    stream = io.StringIO()
    progress = open_progress(total_steps=total_steps, metrics_path=None, stream=stream)
    for report in reports:
        progress.step(report)
    progress.close()
    return stream.getvalue().splitlines()


def test_a_pipe_gets_one_complete_line_every_ten_steps_and_the_first_and_last() -> None:
    lines = show(*(replace(REPORT, step=step) for step in range(1, 26)), total_steps=25)

    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[0] == ("step 1/25  3.250 bits/byte  12,346 tokens/s  answered 99.5% (21 pairs lost)  experts 15/16")


def test_a_skipped_step_is_always_said_with_its_reason() -> None:
    lines = show(replace(REPORT, step=7, train_bits_per_byte=None, skipped="only 12% of layer 1 answered"))

    assert lines == ["step 7/30  skipped: only 12% of layer 1 answered"]


def test_a_step_without_losses_mentions_none() -> None:
    lines = show(replace(REPORT, pairs_lost=0, answered_share=1.0))

    assert "answered 100.0%  experts" in lines[0]


def test_notes_and_validation_are_said_at_once() -> None:
    stream = io.StringIO()
    progress = open_progress(total_steps=30, metrics_path=None, stream=stream)

    progress.note("resumed at step 12 [of 30]")
    progress.validation(20, 2.87654)

    assert stream.getvalue().splitlines() == [
        "resumed at step 12 [of 30]",
        "held-out text after 20 steps: 2.877 bits/byte",
    ]


def test_the_metrics_file_has_every_step_as_json_and_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for step in (1, 2):
        progress = open_progress(total_steps=2, metrics_path=path, stream=io.StringIO())
        progress.step(replace(REPORT, step=step))
        progress.close()
    progress.validation(2, 2.5)

    lines = [json.loads(line) for line in path.read_text().splitlines()]

    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0]["answered_share"] == 0.995
    assert lines[0]["skipped"] is None
    assert lines[2] == {"step": 2, "val_bits_per_byte": 2.5}


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    progress = open_progress(total_steps=2, metrics_path=path, stream=io.StringIO())

    progress.step(replace(REPORT, train_bits_per_byte=math.nan))

    assert json.loads(path.read_text())["train_bits_per_byte"] is None


@pytest.mark.hostile
def test_a_disk_that_refuses_metrics_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stream = io.StringIO()
    progress = open_progress(total_steps=30, metrics_path=tmp_path / "file" / "metrics.jsonl", stream=stream)

    for step in (2, 3, 4):
        progress.step(replace(REPORT, step=step))

    (line,) = stream.getvalue().splitlines()
    assert line.startswith("metrics are no longer written to ")
    assert line.endswith("metrics.jsonl: Not a directory") or line.endswith("File exists")


def watch_on_a_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a real terminal is sent for one step and a note."""
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "140"} | environment).items():
        monkeypatch.setenv(name, value)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        progress = open_progress(total_steps=30, metrics_path=None, stream=stream)
        progress.step(REPORT)
        progress.note("a [bold]peer[/bold] left")
        progress.close()
        progress.close()
    return _read_to_the_end(leader).decode()


def _read_to_the_end(leader: int) -> bytes:
    """All that came through: a terminal hands it on in its own time, and ends with EIO once nobody writes any more."""
    with os.fdopen(leader, "rb", buffering=0) as terminal:
        sent = b""
        with contextlib.suppress(OSError):
            while part := terminal.read(1 << 16):
                sent += part
        return sent


def test_a_terminal_gets_a_live_bar_and_notes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)

    sent = watch_on_a_terminal(monkeypatch)

    assert "3.250 bits/byte" in sent
    assert "1/30" in sent
    assert "a [bold]peer[/bold] left" in sent
    assert "\x1b[?25l" in sent, "the cursor is hidden while the bar is live"
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l"), "and is given back"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = "\x1b[38;5;"

    assert coloured in watch_on_a_terminal(monkeypatch)
    assert coloured not in watch_on_a_terminal(monkeypatch, NO_COLOR="1")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = watch_on_a_terminal(monkeypatch, TERM="dumb")

    assert "\x1b" not in sent
    assert "step 1/30" in sent
