"""What one peer measures of itself, for Prometheus. Read from its host whenever somebody scrapes."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peer.chi import chi_of
from peer.expert_host import ExpertHost
from peer.manifest import RunManifest
from peer.rates import Rates


class PeerCollector(Collector):
    """Gauges and counters over a host."""

    def __init__(self, host: ExpertHost, rates: Callable[[], Rates], manifest: RunManifest) -> None:
        self._host = host
        self._rates = rates
        self._manifest = manifest

    def collect(self) -> Iterable[Metric]:
        statuses = self._host.statuses
        yield GaugeMetricFamily("swarmoe_hosted_experts", "Experts this peer hosts.", value=len(statuses))
        yield GaugeMetricFamily("swarmoe_queued_rows", "Rows waiting for the device.", value=self._host.queued_rows)
        yield GaugeMetricFamily("swarmoe_kept_bytes", "Memory waiting for backwards.", value=self._host.kept_bytes)
        yield from self._kept_inputs()
        served = CounterMetricFamily("swarmoe_rows_served", "Rows answered in training.", labels=["uid"])
        steps = CounterMetricFamily("swarmoe_expert_steps", "Optimiser steps taken.", labels=["uid"])
        for status in statuses:
            served.add_metric([str(status.uid)], status.rows_served)
            steps.add_metric([str(status.uid)], status.version)
        yield served
        yield steps
        yield from self._measured()

    def _kept_inputs(self) -> Iterable[Metric]:
        """What keeping inputs between a forward and its backward is good for."""
        counts = self._host.kept_inputs
        backwards = CounterMetricFamily(
            "swarmoe_gradients_only_backwards", "Backwards that sent no inputs.", labels=["inputs"]
        )
        backwards.add_metric(["kept"], counts.used)
        backwards.add_metric(["missing"], counts.missed)
        yield backwards
        text = "What these backwards did not have to send twice."
        yield CounterMetricFamily("swarmoe_bytes_not_sent_twice", text, value=counts.uplink_bytes_saved)
        rows = CounterMetricFamily(
            "swarmoe_backward_rows", "Rows that went back, by where outputs came from.", labels=["outputs"]
        )
        rows.add_metric(["graph"], counts.rows_from_graph)
        rows.add_metric(["recomputed"], counts.rows_recomputed)
        yield rows
        text = "Backward passes whose outputs were computed again."
        yield CounterMetricFamily("swarmoe_recomputed_backwards", text, value=counts.passes_recomputed)

    def _measured(self) -> Iterable[Metric]:
        """Nothing where measuring failed."""
        rates = self._rates()
        if (link := rates.link) is not None:
            speeds = GaugeMetricFamily(
                "swarmoe_link_bits_per_second", "The link's speed, measured at the start.", labels=["direction"]
            )
            speeds.add_metric(["up"], link.up_bits_per_s)
            speeds.add_metric(["down"], link.down_bits_per_s)
            yield speeds
            latency_s = link.latency_ms / 1e3
            yield GaugeMetricFamily("swarmoe_link_latency_seconds", "There and back, at the start.", value=latency_s)
        if (device := rates.device) is not None:
            text = "What the device achieves on the run's experts."
            yield GaugeMetricFamily("swarmoe_device_flops_per_second", text, value=device.flops_per_s)
        if (chi := chi_of(rates, self._manifest.wire, dim=self._manifest.expert.dim)) is not None:
            text = "The link's speed over what the device could use; below 1 the device waits."
            yield GaugeMetricFamily("swarmoe_chi", text, value=chi.value)


def peer_registry(host: ExpertHost, rates: Callable[[], Rates], manifest: RunManifest) -> CollectorRegistry:
    """A registry of its own: nothing a library registers globally gets in."""
    registry = CollectorRegistry()
    registry.register(PeerCollector(host, rates, manifest))
    return registry
