"""The swarm as Prometheus metrics, read from the latest state whenever somebody scrapes. Names nothing per expert.

A label per expert would be a time series per expert; what the fleet needs to alert on is how many are uncovered.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peer.chi import LOW_UTILISATION
from peer.swarm_state import SwarmState

PEER_STATES = ("joining", "syncing", "online", "draining", "offline")


class SwarmCollector(Collector):
    """Gauges over a state that somebody else keeps up to date."""

    def __init__(self, latest: Callable[[], SwarmState | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterable[Metric]:
        """Nothing before the first state."""
        state = self._latest()
        if state is None:
            return
        in_state = Counter(peer.state for peer in state.peers)
        peers = GaugeMetricFamily("swarmoe_peers", "Peers with a live record, by state.", labels=["state"])
        for name in PEER_STATES:
            peers.add_metric([name], in_state[name])
        yield peers
        yield GaugeMetricFamily("swarmoe_experts", "Experts of the run.", value=len(state.experts))
        yield GaugeMetricFamily("swarmoe_experts_uncovered", "Experts nobody serves.", value=len(state.uncovered))
        yield GaugeMetricFamily("swarmoe_trainers", "Trainers with a live record.", value=len(state.trainers))
        for kind in state.expert_kinds:
            if kind.median_chi is not None:
                text = "Links' speeds over what devices could use, the median of the peers."
                yield GaugeMetricFamily("swarmoe_chi_median", text, value=kind.median_chi)
            waiting = sum(peer.utilisation < LOW_UTILISATION for peer in kind.peers)
            text = "Peers whose link keeps the device idle most of the time."
            yield GaugeMetricFamily("swarmoe_peers_link_bound", text, value=waiting)
        tokens_per_s = sum(trainer.tokens_per_s for trainer in state.trainers)
        yield GaugeMetricFamily("swarmoe_tokens_per_second", "Tokens trained, all trainers.", value=tokens_per_s)
        yield GaugeMetricFamily("swarmoe_state_time_seconds", "When the state was read.", value=state.at_unix_s)
        steps = GaugeMetricFamily("swarmoe_trainer_step", "Last step.", labels=["peer_id"])
        losses = GaugeMetricFamily("swarmoe_trainer_bits_per_byte", "Loss of the last step.", labels=["peer_id"])
        for trainer in state.trainers:
            steps.add_metric([trainer.peer_id], trainer.step)
            if trainer.loss is not None:
                losses.add_metric([trainer.peer_id], trainer.loss)
        yield steps
        yield losses


def swarm_registry(latest: Callable[[], SwarmState | None]) -> CollectorRegistry:
    """A registry of its own: nothing a library registers globally gets in."""
    registry = CollectorRegistry()
    registry.register(SwarmCollector(latest))
    return registry
