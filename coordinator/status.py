"""`swarmoe status`: one look at a swarm from outside. Joins the DHT as a reader, prints, leaves; puts no record."""

from collections.abc import Iterable

from coordinator.settings import StatusSettings
from peer.bootstrap import JoinAddress, parse_join
from peer.chi import percent
from peer.errors import BadConfiguration
from peer.event_loop import EventLoopThread
from peer.identity import Identity
from peer.membership import membership
from peer.supervisor import DhtSupervisor
from peer.swarm_state import SwarmState, swarm_state

_FIRST_PEER_TIMEOUT_S = 3.0
"""How long an empty answer is doubted: the DHT was joined a moment ago."""
_SHORT = 8


def run_status(settings: StatusSettings, *, as_json: bool) -> int:
    """Print who is in the swarm; returns the exit code. Raises SwarmError when nobody lets us look."""
    try:
        joins = [parse_join(text) for text in settings.join]
    except ValueError as error:
        raise BadConfiguration(f"--join: {error}") from error
    supervisor = DhtSupervisor.spawn()
    with EventLoopThread() as loop:
        state = loop.run(_look(joins, supervisor, timeout_s=settings.timeout_s), timeout_s=None)
    print(state.model_dump_json() if as_json else "\n".join(in_words(state)))
    return 0


async def _look(joins: list[JoinAddress], supervisor: DhtSupervisor, *, timeout_s: float) -> SwarmState:
    reader = Identity.generate()
    # Nobody calls a reader, so its DHT node listens here alone; it still reaches everybody.
    async with membership(
        joins, identity=reader, supervisor=supervisor, dht_host="127.0.0.1", timeout_s=timeout_s
    ) as member:
        seen = await member.directory.wait_until(lambda view: bool(view.peers), timeout_s=_FIRST_PEER_TIMEOUT_S)
        return swarm_state(seen or member.directory.snapshot(), member.manifest)


def in_words(state: SwarmState) -> Iterable[str]:
    """Lines for a terminal. What members say of themselves is shown without its control characters."""
    served = len(state.experts) - len(state.uncovered)
    yield f"run {state.name} ({state.run}): {served} of {len(state.experts)} experts served"
    yield ""
    busy = {told.peer_id: percent(told.utilisation) for kind in state.expert_kinds for told in kind.peers}
    columns = f"{'experts':>7}  {'tokens/s':>9}  {'link allows':>11}  {'device':<8}"
    yield f"{'peer':<{_SHORT}}  {'state':<8}  {columns}  endpoint"
    for peer in state.peers:
        state_and_flags = " ".join([peer.state, *peer.flags])
        yield (
            f"{peer.peer_id[:_SHORT]}  {state_and_flags:<8}  {len(peer.experts):>7}  "
            f"{peer.throughput_tokens_per_s:>9.0f}  {busy.get(peer.peer_id, 'unknown'):>11}  "
            f"{_printable(peer.device):<8}  {_printable(peer.endpoint)}"
        )
    for trainer in state.trainers:
        loss = "no loss yet" if trainer.loss is None else f"{trainer.loss:.3f} bits per byte"
        yield f"trainer {trainer.peer_id[:_SHORT]}: step {trainer.step}, {loss}, {trainer.tokens_per_s:.0f} tokens/s"
    if state.uncovered:
        yield f"uncovered: {' '.join(state.uncovered)}"


def _printable(text: str) -> str:
    """Without escape sequences, which a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)
