"""What somebody who watches training sees, and what is written down for later. Decides nothing.

On a terminal one live line at the bottom, and what happens above it; elsewhere one plain line every few steps. Either
way every step is appended to a file of JSON lines.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from trainer.reports import StepReport

PLAIN_EVERY_STEPS = 10


class Progress:
    """Told by the training loop's thread alone."""

    def __init__(self, screen: "Screen", metrics: "MetricsFile | None") -> None:
        self._screen = screen
        self._metrics = metrics

    def step(self, report: StepReport) -> None:
        """A step has ended."""
        self._screen.step(report)
        self._write(asdict(report))

    def validation(self, step: int, bits_per_byte: float) -> None:
        """The model was tried on held-out text after `step` steps."""
        self._screen.note(f"held-out text after {step} steps: {bits_per_byte:.3f} bits/byte")
        self._write({"step": step, "val_bits_per_byte": bits_per_byte})

    def note(self, text: str) -> None:
        """Something a watcher should know: a checkpoint, a resume, what was lost."""
        self._screen.note(text)

    def close(self) -> None:
        """Leave the terminal in order. Idempotent."""
        self._screen.close()

    def _write(self, values: Mapping[str, object]) -> None:
        complaint = self._metrics.write(values) if self._metrics is not None else None
        if complaint is not None:
            self._screen.note(complaint)


def open_progress(*, total_steps: int, metrics_path: Path | None, stream: TextIO) -> Progress:
    """Live when `stream` is a terminal that can, plain otherwise; colour follows NO_COLOR."""
    console = Console(file=stream)
    is_live = console.is_terminal and not console.is_dumb_terminal
    screen = LiveScreen(console, total_steps=total_steps) if is_live else PlainScreen(stream, total_steps=total_steps)
    return Progress(screen, MetricsFile(metrics_path) if metrics_path is not None else None)


class MetricsFile:
    """Appends one JSON object per line. A disk that refuses ends the writing, not the training.

    A resumed trainer writes the steps since its checkpoint again: of a step's lines the last counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_broken = False

    def write(self, values: Mapping[str, object]) -> str | None:
        """Append; returns why not, once, when the disk refuses. Numbers that are not finite become null."""
        if self._is_broken:
            return None
        line = json.dumps({key: _finite(value) for key, value in values.items()}, allow_nan=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._is_broken = True
            return f"metrics are no longer written to {self._path}: {error.strerror}"
        return None


class Screen(Protocol):
    """Where a watcher looks."""

    def step(self, report: StepReport) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainScreen:
    """One line every few steps, each complete in itself, for logs and pipes."""

    def __init__(self, stream: TextIO, *, total_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps

    def step(self, report: StepReport) -> None:
        is_due = report.step % PLAIN_EVERY_STEPS == 0 or report.step in (1, self._total_steps)
        if is_due or report.skipped is not None:
            self.note(f"step {report.step}/{self._total_steps}  {describe(report)}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class LiveScreen:
    """A bar that stays at the bottom of the terminal; notes scroll by above it."""

    def __init__(self, console: Console, *, total_steps: int) -> None:
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("train", total=total_steps, status="")
        self._bar.start()

    def step(self, report: StepReport) -> None:
        self._bar.update(self._task, completed=report.step, status=describe(report))
        if report.skipped is not None:
            self.note(f"step {report.step} {describe(report)}")

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def describe(report: StepReport) -> str:
    """A step in one line, without its number."""
    if report.skipped is not None:
        return f"skipped: {report.skipped}"
    bits = "?" if report.train_bits_per_byte is None else f"{report.train_bits_per_byte:.3f}"
    lost = f" ({report.pairs_lost} pairs lost)" if report.pairs_lost else ""
    return (
        f"{bits} bits/byte  {report.tokens_per_s:,.0f} tokens/s  answered {report.answered_share:.1%}{lost}  "
        f"experts {report.experts_alive}/{report.experts_total}"
    )


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
