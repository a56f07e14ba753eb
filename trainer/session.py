"""From the first step to the last: step, show, checkpoint, validate, and know when to give up. Knows no process.

Where the experts are is the model's; what happens outside (records, signals) comes in as functions, so that a test can
run a whole session on experts in process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from peer.manifest import RunManifest
from trainer.checkpoint import CheckpointNotSaved, TrainerState, random_state, restore_random_state, save
from trainer.evaluate import bits_per_byte
from trainer.ledger import Counts
from trainer.loop import StepOutcome, TrainingLoop
from trainer.progress import Progress
from trainer.reports import StepReport
from trainer.scope import evaluating
from trainer.summary import TrainerSummary, edge_means

log = structlog.get_logger(__name__)

CHECKPOINT_EVERY_STEPS = 50
VALIDATE_EVERY_STEPS = 50
VALIDATION_WINDOWS = 64
GIVE_UP_AFTER_S = 180.0
"""Of nothing but skipped steps."""
_PAUSE_AFTER_SKIP_S = 5.0


@dataclass(frozen=True)
class Surroundings:
    """What a session is told by the process around it, and what it tells."""

    is_stopped: Callable[[], bool]
    experts_alive: Callable[[], int]
    wait_for_experts: Callable[[float], bool]
    """Block until more experts are served than now, or all of them, at most this many seconds."""
    tell: Callable[[StepReport], object]


class TrainingSession:
    """One trainer's run in this process. Owned by one thread."""

    def __init__(
        self,
        loop: TrainingLoop,
        manifest: RunManifest,
        *,
        folder: Path,
        shard: int,
        steps: int,
        progress: Progress,
        surroundings: Surroundings,
    ) -> None:
        self._loop = loop
        self._manifest = manifest
        self._folder = folder
        self._shard = shard
        self._steps = steps
        self._progress = progress
        self._around = surroundings
        self._step = 0
        self._tokens = 0
        self._losses: list[float] = []
        self._num_skipped = 0
        self._first_step_unix_s = self._last_step_unix_s = time.time()

    def resume(self, state: TrainerState) -> None:
        """Go on where `state` was, exactly, but for the experts: they are as the swarm has them."""
        self._loop.model.load_state_dict(dict(state.trunk))
        self._loop.optimizer.load_state_tensors(state.optimizer)
        restore_random_state(state.random)
        self._step, self._tokens, self._shard = state.step, state.tokens, state.trainer_shard
        if state.data_fingerprint != self._loop.data.fingerprint:
            self._progress.note("the text is not the one this checkpoint was trained on; going on with the new one")
        self._progress.note(
            f"resumed at step {state.step}: trunk, optimiser, random state and data position exactly as saved; "
            f"experts as the swarm has them now ({self._around.experts_alive()} of {self._manifest.num_experts} served)"
        )

    def run(self) -> TrainerSummary:
        """Train until the last step, a stop or giving up; checkpoint and sum up whichever it was."""
        self._first_step_unix_s = self._last_step_unix_s = time.time()
        last_trained_s = time.monotonic()
        gave_up: str | None = None
        while self._step < self._steps and not self._around.is_stopped() and gave_up is None:
            outcome = self._one_step()
            if outcome.skipped is None:
                last_trained_s = time.monotonic()
            elif time.monotonic() - last_trained_s > GIVE_UP_AFTER_S:
                gave_up = f"no step succeeded for {GIVE_UP_AFTER_S:.0f} s; the last: {outcome.skipped}"
            else:
                self._around.wait_for_experts(_PAUSE_AFTER_SKIP_S)
        self._checkpoint()
        validation = self._validate() if self._step >= self._steps else None
        return self._sum_up(validation, gave_up)

    def _one_step(self) -> StepOutcome:
        started_s, before = time.monotonic(), self._loop.ledger.read()
        outcome = self._loop.step(self._step)
        self._step += 1
        self._tokens += outcome.tokens
        self._last_step_unix_s = time.time()
        if outcome.skipped is not None:
            self._num_skipped += 1
            log.warning("step.skipped", step=self._step, reason=outcome.skipped)
        elif outcome.bits_per_byte is not None:
            self._losses.append(outcome.bits_per_byte)
        report = self._report(outcome, before, time.monotonic() - started_s)
        self._progress.step(report)
        self._around.tell(report)
        if self._step % CHECKPOINT_EVERY_STEPS == 0:
            self._checkpoint()
        if self._step % VALIDATE_EVERY_STEPS == 0 and self._step < self._steps:
            self._validate()
        return outcome

    def _report(self, outcome: StepOutcome, before: Counts, step_s: float) -> StepReport:
        after = self._loop.ledger.read()
        sent = after.pairs["sent"] - before.pairs["sent"]
        lost = after.pairs["lost"] - before.pairs["lost"]
        return StepReport(
            step=self._step,
            train_bits_per_byte=outcome.bits_per_byte,
            tokens=self._tokens,
            tokens_per_s=outcome.tokens / step_s,
            answered_share=1 - lost / sent if sent else 1.0,
            pairs_lost=lost,
            experts_alive=self._around.experts_alive(),
            experts_total=self._manifest.num_experts,
            skipped=outcome.skipped,
            wall_s=time.time() - self._first_step_unix_s,
        )

    def _checkpoint(self) -> None:
        state = TrainerState(
            step=self._step,
            tokens=self._tokens,
            trainer_shard=self._shard,
            data_fingerprint=self._loop.data.fingerprint,
            trunk=self._loop.model.state_dict(),
            optimizer=self._loop.optimizer.state_tensors(),
            random=random_state(),
        )
        try:
            save(self._folder, state, run=self._manifest)
        except CheckpointNotSaved as error:
            self._progress.note(f"{error}; training goes on, the older checkpoints stand")

    def _validate(self) -> float:
        windows = self._loop.data.validation_windows(VALIDATION_WINDOWS)
        value = bits_per_byte(
            self._loop.model,
            windows,
            sequences=self._manifest.batch.sequences,
            eval_calls=lambda: evaluating(self._manifest.wire.step_timeout_s),
        )
        self._progress.validation(self._step, value)
        return value

    def _sum_up(self, validation: float | None, gave_up: str | None) -> TrainerSummary:
        counts = self._loop.ledger.read()
        first, last = edge_means(self._losses)
        return TrainerSummary(
            steps=self._step,
            steps_skipped=self._num_skipped,
            first_step_unix_s=self._first_step_unix_s,
            last_step_unix_s=self._last_step_unix_s,
            tokens=self._tokens,
            train_bits_per_byte_first=first,
            train_bits_per_byte_last=last,
            val_bits_per_byte=validation,
            calls=counts.calls,
            pairs=counts.pairs,
            lost_by_reason=counts.lost_by_reason,
            backwards=counts.backwards,
            bytes_up=counts.bytes_up,
            bytes_down=counts.bytes_down,
            gave_up=gave_up,
        )
