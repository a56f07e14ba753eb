"""What goes wrong on a network, by script and by seed. Decides only; `memory_transport` acts.

Scripted faults are numbered per peer and method, from 0, counting every call that is made. Random ones come from an RNG
of their own, so that a test which adds a call elsewhere does not change them.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from peer.transport import Method, PeerId


@dataclass(frozen=True)
class Fault:
    """What happens to one call; the default is nothing."""

    is_unreachable: bool = False
    """The caller cannot connect; the peer hears nothing."""
    loses_request: bool = False
    """The peer hears nothing and the caller waits until its deadline."""
    loses_answer: bool = False
    """The peer does its work and the caller waits until its deadline."""
    delay_s: float = 0.0
    """Before the peer hears of it."""
    cut_after: int | None = None
    """The connection breaks when the caller has read so many frames."""

    NONE: ClassVar[Self]
    TIMEOUT: ClassVar[Self]
    UNREACHABLE: ClassVar[Self]
    ANSWER_LOST: ClassVar[Self]

    @classmethod
    def delay(cls, delay_s: float) -> Self:
        return cls(delay_s=delay_s)

    @classmethod
    def cut(cls, after_frames: int) -> Self:
        return cls(cut_after=after_frames)


Fault.NONE = Fault()
Fault.TIMEOUT = Fault(loses_request=True)
Fault.UNREACHABLE = Fault(is_unreachable=True)
Fault.ANSWER_LOST = Fault(loses_answer=True)


class Faults:
    """The plan of one network. Everything may be changed while calls are running; it counts for the next ones."""

    def __init__(self, *, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._scripted: dict[tuple[PeerId, Method, int], Fault] = {}
        self._num_calls: Counter[tuple[PeerId, Method]] = Counter()
        self._down: set[PeerId] = set()
        self._side_of: dict[PeerId, int] = {}
        self.answer_loss = 0.0
        """The chance that a call's answer never comes."""
        self.latency_s = 0.0
        self.jitter_s = 0.0
        """Added to the latency, uniformly from 0 to this."""

    def fail_at(self, peer_id: PeerId, method: Method, nth: int, fault: Fault) -> None:
        """The nth call (from 0) of this method to this peer, whoever makes it."""
        self._scripted[peer_id, method, nth] = fault

    def take_down(self, peer_id: PeerId) -> None:
        """Nobody reaches this peer until `bring_up`."""
        self._down.add(peer_id)

    def bring_up(self, peer_id: PeerId) -> None:
        self._down.discard(peer_id)

    def partition(self, *sides: set[PeerId]) -> None:
        """Members of different sides cannot reach each other; members of none reach everybody."""
        self._side_of = {peer_id: number for number, side in enumerate(sides) for peer_id in side}

    def heal(self) -> None:
        """End the partition."""
        self._side_of = {}

    def num_calls(self, peer_id: PeerId, method: Method) -> int:
        """Calls of this method made to this peer so far."""
        return self._num_calls[peer_id, method]

    def are_apart(self, caller: PeerId, peer_id: PeerId) -> bool:
        """Is this peer down, or on another side of a partition?"""
        sides = self._side_of.get(caller), self._side_of.get(peer_id)
        return peer_id in self._down or (None not in sides and sides[0] != sides[1])

    def draw(self, caller: PeerId, peer_id: PeerId, method: Method) -> Fault:
        """What happens to the call that is being made now. Draws the same number of random numbers for every call."""
        nth = self._num_calls[peer_id, method]
        self._num_calls[peer_id, method] += 1
        is_lost, jitter = self._rng.random() < self.answer_loss, self._rng.random()
        if self.are_apart(caller, peer_id):
            return Fault.UNREACHABLE
        scripted = self._scripted.get((peer_id, method, nth), Fault.NONE)
        return replace(
            scripted,
            delay_s=scripted.delay_s + self.latency_s + jitter * self.jitter_s,
            loses_answer=scripted.loses_answer or is_lost,
        )
