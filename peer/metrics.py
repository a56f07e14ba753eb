"""What one peer measures of itself, for Prometheus. Read from its host whenever somebody scrapes."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peer.expert_host import ExpertHost


class PeerCollector(Collector):
    """Gauges and counters over a host."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host

    def collect(self) -> Iterable[Metric]:
        statuses = self._host.statuses
        yield GaugeMetricFamily("swarmoe_hosted_experts", "Experts this peer hosts.", value=len(statuses))
        yield GaugeMetricFamily("swarmoe_queued_rows", "Rows waiting for the device.", value=self._host.queued_rows)
        yield GaugeMetricFamily("swarmoe_kept_bytes", "Memory waiting for backwards.", value=self._host.kept_bytes)
        yield CounterMetricFamily(
            "swarmoe_recomputed_backwards",
            "Backwards whose outputs were computed again.",
            value=self._host.recomputed_backwards,
        )
        served = CounterMetricFamily("swarmoe_rows_served", "Rows answered in training.", labels=["uid"])
        steps = CounterMetricFamily("swarmoe_expert_steps", "Optimiser steps taken.", labels=["uid"])
        for status in statuses:
            served.add_metric([str(status.uid)], status.rows_served)
            steps.add_metric([str(status.uid)], status.version)
        yield served
        yield steps


def peer_registry(host: ExpertHost) -> CollectorRegistry:
    """A registry of its own: nothing a library registers globally gets in."""
    registry = CollectorRegistry()
    registry.register(PeerCollector(host))
    return registry
