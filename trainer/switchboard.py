"""Whom to ask for which expert, asking several peers at once, and whom to blame. Moves calls; knows no autograd.

Called from training threads, which block until every call has ended; the event loop moves the bytes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import structlog

from peer.directory import Directory
from peer.event_loop import EventLoopThread, Talk
from peer.messages import Call, ReplyLimits
from peer.transport import Endpoint, Method, Transport
from trainer.absences import Absences
from trainer.caller import KEEPS_THE_PEER, Ending, Said, send_call
from trainer.ledger import LossReason
from trainer.routing.plan import Plan
from trainer.scope import StepScope

log = structlog.get_logger(__name__)

_Talk = Talk[tuple[int, Said]]  # here: an inner function's annotations are worked out anew at every call
_BRIDGE_SLACK_S = 0.5
"""Calls end by their own deadlines; the training thread waits this much longer for the loop to say so."""


@dataclass(frozen=True)
class Outgoing:
    """A call, where it goes and what may come back."""

    endpoint: Endpoint
    call: Call
    limits: ReplyLimits


class Switchboard:
    """This process's lines to the peers of a run. Any training thread may use it."""

    def __init__(
        self, transport: Transport, directory: Directory, loop: EventLoopThread, *, call_timeout_s: float
    ) -> None:
        self.absences = Absences()
        self._transport = transport
        self._directory = directory
        self._loop = loop
        self._call_timeout_s = call_timeout_s

    def assign(self, plan: Plan, layer: int, scope: StepScope) -> dict[int, Endpoint]:
        """The replica of each chosen expert: the first that is neither suspected in this step nor absent."""
        snapshot = self._directory.snapshot()
        avoided = scope.suspects() | self.absences.absent(snapshot)
        hosts = snapshot.layer(layer, plan.num_experts, without=avoided)
        chosen = ((slot, hosts.host(slot)) for slot, _ in plan.groups())
        return {slot: snapshot.endpoints[peer_id] for slot, peer_id in chosen if peer_id is not None}

    def ask(self, method: Method, calls: Iterable[Outgoing], scope: StepScope) -> Iterator[tuple[int, Said]]:
        """Send each call as soon as `calls` gives it; yield (its number, what is heard of it), as it comes.

        Of every call the last thing heard is its one `Ending`. Blocks the training thread, not the loop.
        """
        began_s = time.monotonic()
        timeout_s = min(self._call_timeout_s, scope.deadline_s - began_s)
        asked: list[Outgoing] = []

        def talks() -> Iterator[_Talk]:
            for number, outgoing in enumerate(calls):
                asked.append(outgoing)
                yield partial(self._talk, number, outgoing, method, began_s + timeout_s)

        ended: set[int] = set()
        try:
            for number, said in self._loop.listen(talks(), timeout_s=timeout_s + _BRIDGE_SLACK_S):
                if isinstance(said, Ending):
                    ended.add(number)
                    self._blame(asked[number], said, scope)
                yield number, said
        except TimeoutError:  # the calls have ended, and the loop was too busy to say how
            log.warning(
                "calls.lost", method=method, calls=len(asked), reason="this process is overloaded or was paused"
            )
            for number in set(range(len(asked))) - ended:
                yield number, Ending(LossReason.TIMEOUT, is_ours=True)

    def _blame(self, outgoing: Outgoing, ending: Ending, scope: StepScope) -> None:
        if ending.failure is None or ending.failure in KEEPS_THE_PEER or ending.is_ours:
            return
        scope.suspect(outgoing.endpoint.peer_id)
        self.absences.failed(outgoing.endpoint.peer_id, self._directory.snapshot())

    async def _talk(
        self,
        number: int,
        outgoing: Outgoing,
        method: Method,
        deadline_s: float,
        tell: Callable[[tuple[int, Said]], None],
    ) -> None:
        endpoint, began_s = outgoing.endpoint, time.monotonic()
        timeout_s = deadline_s - began_s
        call = replace(outgoing.call, timeout_s=timeout_s)
        ending = await send_call(
            self._transport,
            endpoint,
            method,
            call,
            outgoing.limits,
            lambda group: tell((number, group)),
            timeout_s=timeout_s,
        )
        if ending.failure is None:
            self._directory.observe_latency(endpoint.peer_id, time.monotonic() - began_s)
        tell((number, ending))
