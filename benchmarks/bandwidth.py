"""Is the share of its time that a peer can work min(1, chi), chi = W / W*?

One expert on one peer behind an emulated link of W bits a second each way: `ffn`, one `block` or a `stack` of four, of
D 64 to 512 (H = 4 D; sequences of 16 tokens for the last two), forward and backward, twelve micro-batches in flight,
in three codecs. Utilisation is tokens a second through the link over tokens a second without a limit, measured in
turns; W* = 2 D b F / (FLOPs of a token) is what that unlimited rate needs, with F the FLOP/s it amounts to.
Printed besides: message bytes of a token against 4 D b (one expert a token), b the plain width of a value in bytes.

What bounds it: the emulated link below chi 1, above it whatever bounds the unlimited rate. On two cores that is not the
expert alone: for small experts it is the trainer's side and gRPC, and F is what is left of the device then. Quick: one
expert on both sides of the knee. `--full`: the grid, in under eight minutes.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.one_peer import OnePeer, Stage, one_peer, parts_per_s
from experts.registry import expert_kind
from experts.settings import ExpertOptimizerSettings, ExpertShape
from peer.chi import Chi, needed_bits_per_s
from peer.links import Link
from peer.manifest import ModelSettings, RouterSettings, RunManifest, WireSettings
from trainer.moe import MoELayer

CONTEXT = 16
ROUNDS, WINDOW_S = 2, 1.0
"""Of each point: so often, so long without the limit and so long with it."""
IN_FLIGHT = 12
"""As many take turns on the two directions: with few, one is idle while all wait for the other."""
MICRO_BATCH_S = 0.04
"""What a micro-batch aims to take of the link, or of the peer."""
MIN_VALUES, MAX_TOKENS = 8192, 4096
"""Of a micro-batch: enough that headers do not count, and that the pipeline fills in time."""
MBITS = (1, 3, 10, 30, 100, 300, 1000)
CODECS = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of a value, scales left out."""
KNEE = (0.7, 1.4)
FULL_SHAPES = [("ffn", 64), ("ffn", 256), ("ffn", 512), ("block", 64), ("block", 512), ("stack", 64), ("stack", 512)]


@dataclass(frozen=True)
class Point:
    """One measurement of one expert behind one link."""

    kind: str
    dim: int
    codec: str
    mbit: float
    gflops: float
    """F, of the unlimited rate."""
    chi: float
    utilisation: float
    bytes_ratio: float
    """Message bytes a token over 4 D b."""

    @property
    def error(self) -> float:
        """Of min(1, chi)."""
        return self.utilisation / min(1.0, self.chi) - 1

    @property
    def is_at_knee(self) -> bool:
        return KNEE[0] <= self.chi <= KNEE[1]


def manifest(kind: str, dim: int) -> RunManifest:
    """One layer of one expert, which every token takes; it gathers gradients and does not step meanwhile."""
    return RunManifest(
        name="bandwidth",
        moe_layers=1,
        experts_per_layer=1,
        expert=ExpertShape(kind=kind, dim=dim, hidden=4 * dim),
        expert_optimizer=ExpertOptimizerSettings(step_tokens=1 << 30),
        model=ModelSettings(dim=dim, layers=1, heads=2, kv_heads=2, context=CONTEXT),
        router=RouterSettings(preset="switch", top_k=1),
        wire=WireSettings(call_timeout_s=120.0, step_timeout_s=600.0),
    )


class Series:
    """One expert in one codec behind links of any width."""

    def __init__(self, peer: OnePeer, codec: str) -> None:
        self._peer = peer
        self._run = peer.swarm.manifest
        self._wire = self._run.wire.model_copy(update={"forward_codec": codec, "backward_codec": codec})
        self._codec = codec
        self._layer: MoELayer = peer.layer(0, self._wire)
        self._dim = self._run.expert.dim
        self._is_sequence_level = expert_kind(self._run.expert.kind).is_sequence_level
        self._num_tokens = MAX_TOKENS
        self.unlimited_per_s = self._tokens_per_s(MAX_TOKENS, mbit=None)

    def needed_mbit(self) -> float:
        """W*, of the last unlimited rate."""
        return needed_bits_per_s(self.unlimited_per_s, self._wire, dim=self._dim) / 1e6

    def measure(self, mbit: float) -> Point:
        """Unlimited and limited rates in turns; their medians are held against each other."""
        unlimited_per_s: list[float] = []
        limited_per_s: list[float] = []
        for _ in range(ROUNDS):
            unlimited_per_s.append(self._tokens_per_s(self.unlimited_per_s, mbit=None))
            expected_per_s = unlimited_per_s[-1] * min(1.0, mbit / self.needed_mbit())
            limited_per_s.append(self._tokens_per_s(expected_per_s, mbit=mbit))
        self.unlimited_per_s = statistics.median(unlimited_per_s)
        kind = expert_kind(self._run.expert.kind)
        return Point(
            kind=kind.name,
            dim=self._dim,
            codec=self._codec,
            mbit=mbit,
            gflops=3 * kind.flops_per_token(self._run.expert, context=CONTEXT) * self.unlimited_per_s / 1e9,
            chi=Chi(mbit, self.needed_mbit()).value,
            utilisation=statistics.median(limited_per_s) / self.unlimited_per_s,
            bytes_ratio=self._bytes_per_token() / (4 * self._dim * CODECS[self._codec]),
        )

    def _tokens_per_s(self, expected_per_s: float, *, mbit: float | None) -> float:
        bits_per_s = None if mbit is None else mbit * 1e6
        self._peer.links.up, self._peer.links.down = Link(bits_per_s=bits_per_s), Link(bits_per_s=bits_per_s)
        wanted = min(MAX_TOKENS, max(MIN_VALUES / self._dim, MICRO_BATCH_S * expected_per_s))
        whole = CONTEXT if self._is_sequence_level else 1
        self._num_tokens = max(1, round(wanted / whole)) * whole
        with Stage(self._micro_batch, in_flight=IN_FLIGHT) as stage:
            stage.skip(2 * IN_FLIGHT)
            times_s = stage.observe(for_s=WINDOW_S, at_least=3 * IN_FLIGHT)
        return parts_per_s(times_s) / 2 * self._num_tokens

    def _micro_batch(self, part_done: Callable[[], None]) -> None:
        """Forward and backward; a part is done with each of the two calls."""
        x = torch.randn(*self._shape(), requires_grad=True)
        y = self._layer(x)
        assert self._layer.metrics.pairs_answered == self._num_tokens, "a token was lost: nothing was measured"
        part_done()
        torch.autograd.grad(y.square().sum(), x)
        part_done()

    def _shape(self) -> tuple[int, ...]:
        if self._is_sequence_level:
            return self._num_tokens // CONTEXT, CONTEXT, self._dim
        return self._num_tokens, self._dim

    def _bytes_per_token(self) -> float:
        before = self._layer.ledger.read()
        self._micro_batch(lambda: None)
        after = self._layer.ledger.read()
        up, down = after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down
        return (up + down) / self._num_tokens


def points(shapes: Sequence[tuple[str, int]], chis: Sequence[float]) -> Iterator[Point]:
    """For each expert and codec, the widths of the grid that come nearest to these chis."""
    for kind, dim in shapes:
        with one_peer(manifest(kind, dim)) as peer:
            for codec in CODECS:
                series = Series(peer, codec)
                for mbit in _widths(series.needed_mbit(), chis):
                    yield series.measure(mbit)


def _widths(needed_mbit: float, chis: Sequence[float]) -> list[int]:
    def distance(mbit: int, chi: float) -> float:
        ratio = mbit / (chi * needed_mbit)
        return max(ratio, 1 / ratio)

    return sorted({min(MBITS, key=lambda mbit: distance(mbit, chi)) for chi in chis})


def summary(measured: Sequence[Point]) -> dict[str, float]:
    """The worst of everything."""
    outside = [abs(point.error) for point in measured if not point.is_at_knee]
    worst = {codec: max((p.bytes_ratio for p in measured if p.codec == codec), default=0.0) for codec in CODECS}
    return {
        "points": len(measured),
        "points_outside_knee": len(outside),
        "within_15_percent": sum(error <= 0.15 for error in outside),
        "worst_error": max(outside, default=0.0),
        **{f"bytes_ratio_{codec}": ratio for codec, ratio in worst.items()},
    }


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="the grid")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    shapes = FULL_SHAPES if options.full else [("ffn", 512)]
    chis = (0.15, 0.5, 3.0) if options.full else (0.3, 3.0)
    if not options.json:
        say(
            f"{'kind':<6} {'D':>4} {'codec':<5} {'Mbit/s':>7} {'GFLOP/s':>8} {'chi':>7} {'busy':>6} {'error':>6}  bytes"
        )
    measured: list[Point] = []
    for point in points(shapes, chis):
        measured.append(point)
        if not options.json:
            say(_line(point))
    figures = {name: round(value, 4) for name, value in summary(measured).items()}
    if options.json:
        say(json.dumps({**figures, "measured": [asdict(point) | {"error": point.error} for point in measured]}))
    else:
        say("\n".join(f"{name:<24} {value:12.3f}" for name, value in figures.items()))


def _line(point: Point) -> str:
    knee = "  (knee)" if point.is_at_knee else ""
    return (
        f"{point.kind:<6} {point.dim:>4} {point.codec:<5} {point.mbit:>7g} {point.gflops:>8.2f} {point.chi:>7.3f}"
        f" {point.utilisation:>6.3f} {point.error:>+6.1%}  {point.bytes_ratio:.3f}{knee}"
    )


if __name__ == "__main__":
    main()
