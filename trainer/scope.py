"""One training step's shared facts: its deadline, who failed in it, how much of each layer came back.

Knows no network and no model. A scope is shared by the step's micro-batches, each on its own thread; `activate`
makes it the calling thread's current one, where `RemoteMoE` finds it.
"""

import contextlib
import contextvars
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass

from peer.transport import PeerId
from trainer.ledger import Ledger

_CURRENT: "contextvars.ContextVar[MicroBatch | None]" = contextvars.ContextVar("swarmoe_micro_batch", default=None)


@dataclass(frozen=True)
class LayerAnswers:
    """How many of a layer's pairs came back, over the micro-batches so far."""

    sent: int = 0
    answered: int = 0

    @property
    def share(self) -> float:
        return self.answered / self.sent if self.sent else 0.0


class StepScope:
    """A step in progress. Every method may be called from any thread."""

    def __init__(self, *, deadline_s: float, ledger: Ledger, train: bool = True) -> None:
        self.deadline_s = deadline_s
        """On time.monotonic: no call of this step outlives it."""
        self.ledger = ledger
        self.train = train
        self._lock = threading.Lock()
        self._suspects: set[PeerId] = set()
        self._answers: defaultdict[int, LayerAnswers] = defaultdict(LayerAnswers)
        self._observations: dict[int, list[Callable[[], object]]] = {}

    def suspect(self, peer_id: PeerId) -> None:
        """After its first failure a peer gets no more calls in this step."""
        with self._lock:
            self._suspects.add(peer_id)

    def is_suspect(self, peer_id: PeerId) -> bool:
        with self._lock:
            return peer_id in self._suspects

    def suspects(self) -> frozenset[PeerId]:
        """Everybody who has failed in this step so far."""
        with self._lock:
            return frozenset(self._suspects)

    def answered(self, layer: int, *, sent: int, answered: int) -> None:
        with self._lock:
            before = self._answers[layer]
            self._answers[layer] = LayerAnswers(before.sent + sent, before.answered + answered)

    def worst_layer(self) -> tuple[int, LayerAnswers] | None:
        """The layer of which the smallest share came back; None before any was called."""
        with self._lock:
            return min(self._answers.items(), key=lambda item: item[1].share, default=None)

    def observe_later(self, micro_batch: int, observation: Callable[[], object]) -> None:
        """Keep a router's state change until the step is over; they then happen in micro-batch order."""
        with self._lock:
            self._observations.setdefault(micro_batch, []).append(observation)

    def apply_observations(self) -> None:
        """Let the routers learn from this step. Called once, by the thread that owns the step."""
        with self._lock:
            ordered = [observation for index in sorted(self._observations) for observation in self._observations[index]]
            self._observations.clear()
        for observation in ordered:
            observation()


@dataclass(frozen=True)
class MicroBatch:
    """What a remote layer needs to know of the micro-batch it is part of."""

    scope: StepScope
    index: int = 0
    loss_tokens: float = 1.0
    """Tokens whose losses the backward sums; 1 for a loss that is already a mean."""
    defer_observations: bool = True
    """Routers learn when the step is over, in micro-batch order; else at once."""

    def observe(self, observation: Callable[[], object]) -> None:
        """Let a router learn from what it saw: now, or when the step is over."""
        if self.defer_observations:
            self.scope.observe_later(self.index, observation)
        else:
            observation()

    @contextlib.contextmanager
    def activate(self) -> Generator[None]:
        """Make this the calling thread's micro-batch."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


def evaluating(timeout_s: float) -> contextlib.AbstractContextManager[None]:
    """Forwards of this thread ask experts without teaching them and are in no counter, for at most `timeout_s`."""
    return MicroBatch(StepScope(deadline_s=time.monotonic() + timeout_s, ledger=Ledger(), train=False)).activate()


def current_micro_batch() -> MicroBatch | None:
    return _CURRENT.get()
