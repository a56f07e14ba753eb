"""How much latency can micro-batches in flight hide?

A chain of 16 remote layers (`ffn`, D 128, H 512, one expert each, on one peer), so 32 calls a micro-batch: forward and
backward, over gRPC on loopback, the answer to each call held back by an exponential delay of mean 0 to 200 ms. J
micro-batches are in flight all the time, each on a thread that waits for its calls. The micro-batch is calibrated to
take 0.25 s of the machine, both processes at work, at no delay: C is 4 a second. (Sized to 0.25 s summed over two cores
that overlap, C would be up to 8, and 32 in flight cannot do more than 5 a second at 200 ms, whoever computes.) Printed:
throughput, its share of that at no delay, the CPU seconds of a micro-batch over both processes, and what the model
min(C, J B / (n (t + delay))) says, with C the throughput at no delay, n the calls and t the time of one that is alone.
`--full` takes every delay, with one micro-batch in flight too; quick takes 0 and 100 ms.

What bounds it: at short delays the CPU; once J B / (n (t + delay)) falls below C, the micro-batches in flight.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.one_peer import OnePeer, Stage, one_peer, parts_per_s
from experts.settings import ExpertOptimizerSettings, ExpertShape
from peer.links import Link, exponential
from peer.manifest import ModelSettings, RouterSettings, RunManifest, WireSettings

DIM, HIDDEN, NUM_LAYERS = 128, 512, 16
NUM_CALLS = 2 * NUM_LAYERS
IN_FLIGHT = 32
COST_S = 0.25
"""Between one micro-batch and the next, at no delay."""
FULL_DELAYS_MS, QUICK_DELAYS_MS = (0, 20, 50, 100, 200), (0, 100)


def manifest() -> RunManifest:
    """One expert a layer, which every token takes; it gathers gradients and does not step within a measurement."""
    return RunManifest(
        name="latency",
        moe_layers=NUM_LAYERS,
        experts_per_layer=1,
        expert=ExpertShape(kind="ffn", dim=DIM, hidden=HIDDEN),
        expert_optimizer=ExpertOptimizerSettings(step_tokens=1 << 30),
        model=ModelSettings(dim=DIM, layers=NUM_LAYERS, heads=2, kv_heads=2),
        router=RouterSettings(preset="switch", top_k=1),
        wire=WireSettings(call_timeout_s=60.0, step_timeout_s=600.0),
    )


class Chain:
    """The layers, one after the other, and J micro-batches on their way through them."""

    def __init__(self, peer: OnePeer) -> None:
        self._peer = peer
        self._layers = [peer.layer(layer) for layer in range(NUM_LAYERS)]
        self.num_tokens = 256

    def micro_batch(self, part_done: Callable[[], None]) -> None:
        """Forward and backward; a part is done with every call."""

        def gradient_known(_: Tensor) -> None:
            part_done()

        x_TD = torch.randn(self.num_tokens, DIM, requires_grad=True)
        for layer in self._layers:
            x_TD = layer(x_TD)
            assert layer.metrics.pairs_answered == layer.metrics.pairs_sent, "a pair was lost: nothing was measured"
            x_TD.register_hook(gradient_known)  # when the layer after this one, or the loss, has been backward
            part_done()
        x_TD.square().mean().backward()

    def calibrate(self) -> None:
        """Choose the tokens of a micro-batch by what a small and a large one take."""
        small, large = 128, 512
        cost_s = {}
        for self.num_tokens in (small, large):
            cost_s[self.num_tokens] = 1 / self.measure(in_flight=8, delay_ms=0, for_s=2.0).micro_batches_per_s
        per_token_s = (cost_s[large] - cost_s[small]) / (large - small)
        self.num_tokens = max(16, round(small + (COST_S - cost_s[small]) / per_token_s))

    def measure(self, *, in_flight: int, delay_ms: float, for_s: float) -> "Point":
        """In the steady state: every micro-batch has been through once, so that they are spread over the chain."""
        self._peer.links.down = Link(delay=exponential(delay_ms / 1e3))
        with Stage(self.micro_batch, in_flight=in_flight) as stage:
            stage.skip(in_flight * NUM_CALLS)
            cpu_s = self._peer.cpu_s()
            times_s = stage.observe(for_s=for_s, at_least=NUM_CALLS)
            cpu_s = self._peer.cpu_s() - cpu_s
        return Point(in_flight, delay_ms, parts_per_s(times_s) / NUM_CALLS, cpu_s / len(times_s) * NUM_CALLS)


@dataclass(frozen=True)
class Point:
    """What was measured of so many micro-batches in flight at one delay."""

    in_flight: int
    delay_ms: float
    """Mean, of a call's round trip."""
    micro_batches_per_s: float
    cpu_s: float
    """Of one micro-batch, in this process and the peer's."""


def model(alone: Point, fastest_per_s: float, point: Point) -> float:
    """Micro-batches a second: what the CPU can do, or what so many in flight can when each waits for its calls."""
    call_s = 1 / (alone.micro_batches_per_s * NUM_CALLS)
    return min(fastest_per_s, point.in_flight / (NUM_CALLS * (call_s + point.delay_ms / 1e3)))


def measure_all(delays_ms: Sequence[int], in_flights: Sequence[int], *, for_s: float) -> dict[str, float]:
    """Every point, as flat figures."""
    with one_peer(manifest()) as peer:
        chain = Chain(peer)
        chain.calibrate()
        alone = chain.measure(in_flight=1, delay_ms=0, for_s=for_s / 2)
        figures: dict[str, float] = {"tokens": chain.num_tokens}
        for in_flight in in_flights:
            points = [
                chain.measure(in_flight=in_flight, delay_ms=delay_ms, for_s=for_s) for delay_ms in (*delays_ms, 0)
            ]
            fastest_per_s = (points[0].micro_batches_per_s + points[-1].micro_batches_per_s) / 2  # the machine drifts
            for point in points[:-1]:
                name = f"j{in_flight}_{point.delay_ms:g}ms"
                figures[f"{name}_ratio"] = point.micro_batches_per_s / fastest_per_s
                figures[f"{name}_model"] = model(alone, fastest_per_s, point) / fastest_per_s
                figures[f"{name}_tokens_per_s"] = point.micro_batches_per_s * chain.num_tokens
                figures[f"{name}_cpu_s"] = point.cpu_s
    return figures


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="every delay, for longer, and one micro-batch in flight")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.full:
        figures = measure_all(FULL_DELAYS_MS, (IN_FLIGHT, 1), for_s=12.0)
    else:
        figures = measure_all(QUICK_DELAYS_MS, (IN_FLIGHT,), for_s=5.0)
    if options.json:
        say(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    else:
        say("\n".join(f"{name:<24} {value:12.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
