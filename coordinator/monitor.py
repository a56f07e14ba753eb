"""What changed: successive swarm states in; events a person would want told, and the losses for a chart, out.

Pure and bounded. A peer is mentioned when it comes, goes or changes its state, an expert when it stops or starts being
served; all that happen between two looks are told together, since losing one peer may uncover hundreds of experts.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from peer.swarm_state import SwarmState, TrainerFacts

MAX_EVENTS = 200
MAX_POINTS = 600
"""Per trainer. Past it every other point goes, so a line always spans the whole run."""
MAX_LINES = 16
"""Trainers with a line; of those that left, the one gone longest loses its line first."""
NAMED_UIDS = 6

Tone = Literal["good", "bad", "plain"]


class SwarmEvent(BaseModel):
    """One line of the log."""

    model_config = ConfigDict(frozen=True)

    at_unix_s: float
    name: str
    """Constant, such as `peer.joined`."""
    subjects: tuple[str, ...]
    """Peer ids or expert uids."""
    text: str
    tone: Tone


class LossLine(BaseModel):
    """Losses of one trainer, by step."""

    model_config = ConfigDict(frozen=True)

    peer_id: str
    points: tuple[tuple[int, float], ...]


class SwarmChange(BaseModel):
    """What one look added."""

    model_config = ConfigDict(frozen=True)

    state: SwarmState
    events: tuple[SwarmEvent, ...]
    losses: tuple[LossLine, ...]
    """Only the new points."""


class Monitor:
    """Remembers the last state, the last events and every trainer's losses, each within its bound."""

    def __init__(self) -> None:
        self._state: SwarmState | None = None
        self._events: deque[SwarmEvent] = deque(maxlen=MAX_EVENTS)
        self._lines: dict[str, _Line] = {}

    def observe(self, state: SwarmState) -> SwarmChange:
        """Take the next state in; says what is new since the one before."""
        events = tuple(events_between(self._state, state))
        losses = tuple(self._new_point(trainer) for trainer in state.trainers if self._is_new(trainer))
        self._state = state
        self._events.extend(events)
        self._forget_lines(still_here={trainer.peer_id for trainer in state.trainers})
        return SwarmChange(state=state, events=events, losses=losses)

    def remembered(self) -> SwarmChange:
        """All of it, for somebody who comes now. Call after the first `observe`."""
        assert self._state is not None
        losses = tuple(LossLine(peer_id=peer_id, points=tuple(line.points)) for peer_id, line in self._lines.items())
        return SwarmChange(state=self._state, events=tuple(self._events), losses=losses)

    def _is_new(self, trainer: TrainerFacts) -> bool:
        line = self._lines.get(trainer.peer_id)
        return trainer.loss is not None and (line is None or line.points[-1][0] != trainer.step)

    def _new_point(self, trainer: TrainerFacts) -> LossLine:
        assert trainer.loss is not None
        line = self._lines.pop(trainer.peer_id, None) or _Line()
        self._lines[trainer.peer_id] = line  # the line heard from last comes last
        line.add(trainer.step, trainer.loss)
        return LossLine(peer_id=trainer.peer_id, points=((trainer.step, trainer.loss),))

    def _forget_lines(self, *, still_here: set[str]) -> None:
        for peer_id in [peer_id for peer_id in self._lines if peer_id not in still_here] + list(self._lines):
            if len(self._lines) <= MAX_LINES:
                return
            self._lines.pop(peer_id, None)


class _Line:
    """(step, loss) of one trainer, steps rising."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def add(self, step: int, loss: float) -> None:
        """A trainer that resumed from an earlier step takes its later points back."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        self.points.append((step, loss))
        if len(self.points) > MAX_POINTS:
            del self.points[1:-1:2]


def events_between(before: SwarmState | None, after: SwarmState) -> Iterable[SwarmEvent]:
    """What to tell about the way from one state to the next; `before` is None at the first look."""
    teller = _Teller(after.at_unix_s)
    yield from _peer_events(before, after, teller)
    yield from _trainer_events(before, after, teller)
    yield from _expert_events(before, after, teller)


class _Teller:
    def __init__(self, at_unix_s: float) -> None:
        self._at_unix_s = at_unix_s

    def tell(self, name: str, text: str, *subjects: str, tone: Tone = "plain") -> SwarmEvent:
        return SwarmEvent(at_unix_s=self._at_unix_s, name=name, subjects=subjects, text=text, tone=tone)


def _peer_events(before: SwarmState | None, after: SwarmState, teller: _Teller) -> Iterable[SwarmEvent]:
    known = {} if before is None else {peer.peer_id: peer for peer in before.peers}
    present = {peer.peer_id: peer for peer in after.peers}
    for peer_id, peer in present.items():
        who = f"Peer {_short(peer_id)}"
        if peer_id not in known:
            yield teller.tell("peer.joined", f"{who} joined ({peer.device}), {peer.state}", peer_id)
        elif peer.state != known[peer_id].state:
            yield teller.tell("peer.state", f"{who} is {peer.state}", peer_id)
        elif peer.flags != known[peer_id].flags:
            yield teller.tell("peer.flags", f"{who} is {' and '.join(peer.flags) or 'without flags'}", peer_id)
    for peer_id in sorted(known.keys() - present.keys()):
        how = "left" if known[peer_id].state == "draining" else "is gone"
        yield teller.tell("peer.left", f"Peer {_short(peer_id)} {how}", peer_id)


def _trainer_events(before: SwarmState | None, after: SwarmState, teller: _Teller) -> Iterable[SwarmEvent]:
    known = set() if before is None else {trainer.peer_id for trainer in before.trainers}
    present = {trainer.peer_id for trainer in after.trainers}
    for peer_id in sorted(present - known):
        yield teller.tell("trainer.joined", f"Trainer {_short(peer_id)} joined", peer_id)
    for peer_id in sorted(known - present):
        yield teller.tell("trainer.left", f"Trainer {_short(peer_id)} is gone", peer_id)


def _expert_events(before: SwarmState | None, after: SwarmState, teller: _Teller) -> Iterable[SwarmEvent]:
    if before is None:  # a fresh swarm serves nothing, which is no news
        return
    was_uncovered, is_uncovered = set(before.uncovered), set(after.uncovered)
    lost = [uid for uid in after.uncovered if uid not in was_uncovered]
    found = [uid for uid in before.uncovered if uid not in is_uncovered]
    if lost:
        yield teller.tell("experts.uncovered", f"Nobody serves {_named(lost)} any more", *lost, tone="bad")
    if found:
        verb = "is" if len(found) == 1 else "are"
        text = f"{_named(found).capitalize()} {verb} served" if after.uncovered else "All experts are served"
        yield teller.tell("experts.covered", text, *found, tone="good")


def _named(uids: Sequence[str]) -> str:
    first = ", ".join(uids[:NAMED_UIDS])
    more = f" and {len(uids) - NAMED_UIDS} more" if len(uids) > NAMED_UIDS else ""
    return f"expert{'s' if len(uids) > 1 else ''} {first}{more}"


def _short(peer_id: str) -> str:
    return peer_id[:8]
