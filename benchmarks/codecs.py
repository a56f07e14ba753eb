"""What does rounding on the wire cost in bits per byte, and what does writing and reading a codec cost in time?

A byte LM of 4 layers, each a mixture of 4 experts (`swiglu`, D 128, H 128, k 2) and nothing else, trained on Austen for
1500 steps of 256 bytes, in this process: every row, output and gradient passes the wire's own encode and decode, in
training and when the held-out text is judged. Per seed the codecs share initial weights, data and its order; gradients
in int8 are rounded at random. The spread is over the seeds. Quick: one seed, 100 steps. `--full`: 1500 steps, 3 seeds.

Speeds are of one thread, (8192, 512) and (4096, 1024) float32, in bytes of float32, beside a plain copy of the same
tensor in turns; the best of the turns. A copy reads and writes 8 bytes a value: the bound for one pass.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from experts.bank import ExpertBank
from experts.settings import ExpertShape
from peer.manifest import BatchSettings, ModelSettings, RunManifest, TrunkOptimizerSettings, WireCodec, WireSettings
from peer.tensors import Role, WireTensor, decode, encode
from peer.wire_codecs import Codec
from trainer.assembly import build_model, build_optimizer
from trainer.data import ByteDataset, default_data_path
from trainer.evaluate import bits_per_byte
from trainer.local_experts import LocalExperts
from trainer.loop import TrainingLoop
from trainer.remote_experts import Experts
from trainer.routing.plan import Plan
from trainer.routing.view import View
from trainer.scope import MicroBatch, evaluating

CODECS: tuple[WireCodec, ...] = ("fp32", "bf16", "int8")
TIMED: tuple[WireCodec, ...] = ("fp32", "bf16", "fp16", "int8")
SHAPES = ((8192, 512), (4096, 1024))
DIM, CONTEXT, SEQUENCES = 128, 64, 4
HELD_OUT_WINDOWS = 1024


def manifest(codec: WireCodec, *, seed: int, steps: int) -> RunManifest:
    """The question's model, with this codec both ways."""
    return RunManifest(
        name="benchmark",
        seed=seed,
        moe_layers=4,
        experts_per_layer=4,
        expert=ExpertShape(kind="swiglu", dim=DIM, hidden=DIM),
        model=ModelSettings(dim=DIM, layers=4, heads=4, kv_heads=2, context=CONTEXT, shared_hidden=0),
        trunk_optimizer=TrunkOptimizerSettings(decay_steps=steps),
        batch=BatchSettings(sequences=SEQUENCES, micro_batches=1),
        wire=WireSettings(forward_codec=codec, backward_codec=codec),
        steps=steps,
    )


class AcrossTheWire:
    """Experts of this process, reached as remote ones are: by their bytes. See `remote_experts.Experts`."""

    def __init__(self, experts: Experts, run: RunManifest) -> None:
        self._experts = experts
        self._wire = run.wire
        self._calls = count()

    def run(self, x_TD: Tensor, plan: Plan, layer: int, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        x_TD = self._cross(x_TD, Role.ROWS, Role.ROW_GRADIENTS)
        out_ND, ok_N = self._experts.run(x_TD, plan, layer, micro_batch)
        return self._cross(out_ND, Role.OUTPUTS, Role.GRADIENTS), ok_N

    def _cross(self, rows: Tensor, role: Role, way_back: Role) -> Tensor:
        crossed = _Crossing.apply(rows, self, role, way_back)
        assert isinstance(crossed, Tensor)
        return crossed

    def travel(self, tensor: Tensor, role: Role) -> Tensor:
        """What arrives of it."""
        codec = Codec.named(self._wire.backward_codec if role.is_gradient else self._wire.forward_codec)
        wire = encode(tensor, role, codec, dither_seed=next(self._calls).to_bytes(16, "big"))
        return decode(WireTensor(wire.spec, bytearray(wire.data)))


class _Crossing(torch.autograd.Function):
    """Values cross in one direction, their gradients in the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: AcrossTheWire, role: Role, way_back: Role) -> Tensor:
        ctx.way, ctx.way_back = way, way_back
        return way.travel(rows, role)

    @staticmethod
    @once_differentiable  # which types ctx as position-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return ctx.way.travel(grad_outputs[0], ctx.way_back), None, None, None


def held_out_bits_per_byte(run: RunManifest) -> float:
    """Train the run to its last step in this process, then judge it on text that it has not seen."""
    bank = ExpertBank(run.expert, run.expert_optimizer, device=torch.device("cpu"), seed=run.seed)
    for uid in run.uids():
        bank.add(uid)
    views = [View.all_alive(layer, run.experts_per_layer) for layer in range(run.moe_layers)]
    model = build_model(run, AcrossTheWire(LocalExperts(bank), run), views.__getitem__)
    data = ByteDataset.open(default_data_path(), context=CONTEXT)
    with TrainingLoop(model, build_optimizer(run, model), data, run, shard=0) as loop:
        for step in range(run.steps):
            skipped = loop.step(step).skipped
            assert skipped is None, skipped
    windows = data.validation_windows(HELD_OUT_WINDOWS)
    return bits_per_byte(model, windows, sequences=SEQUENCES, eval_calls=lambda: evaluating(timeout_s=60.0))


def learning(*, seeds: int, steps: int) -> dict[str, Any]:
    """Bits per byte of each codec and seed, and each codec's differences to fp32 in percent."""
    bits = {
        codec: [held_out_bits_per_byte(manifest(codec, seed=seed, steps=steps)) for seed in range(seeds)]
        for codec in CODECS
    }
    differences = {
        codec: [100 * (value / exact - 1) for value, exact in zip(bits[codec], bits["fp32"], strict=True)]
        for codec in CODECS
    }
    return {
        "steps": steps,
        "seeds": seeds,
        "bits_per_byte": {codec: [round(value, 4) for value in values] for codec, values in bits.items()},
        "difference_percent": {
            codec: {
                "mean": round(statistics.mean(values), 3),
                "lowest": round(min(values), 3),
                "highest": round(max(values), 3),
            }
            for codec, values in differences.items()
            if codec != "fp32"
        },
    }


def speeds(shape: tuple[int, int], *, turns: int) -> dict[str, float]:
    """GB/s of float32, of a copy and of each codec's ways there and back."""
    x_ND = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    copy_ND = torch.empty_like(x_ND)
    work: dict[str, Callable[[], object]] = {"copy": lambda: copy_ND.copy_(x_ND)}
    for name in TIMED:
        codec = Codec.named(name)
        sent = encode(x_ND, Role.ROWS, codec)
        received = WireTensor(sent.spec, bytearray(sent.data))
        work[f"{name} encode"] = lambda codec=codec: encode(x_ND, Role.ROWS, codec)
        work[f"{name} decode"] = lambda received=received: decode(received)
    work["int8 encode at random"] = lambda: encode(x_ND, Role.GRADIENTS, Codec.INT8, dither_seed=b"")
    best_s = dict.fromkeys(work, float("inf"))
    for _ in range(turns):
        for name, do in work.items():
            started_s = time.perf_counter()
            do()
            best_s[name] = min(best_s[name], time.perf_counter() - started_s)
    return {name: x_ND.nbytes / 1e9 / seconds for name, seconds in best_s.items()}


def figures(*, full: bool) -> dict[str, Any]:
    """Everything the benchmark says."""
    return {
        "gb_per_s": {
            f"{rows}x{dim}": {name: round(speed, 2) for name, speed in speeds((rows, dim), turns=40).items()}
            for rows, dim in SHAPES
        },
        **(learning(seeds=3, steps=1500) if full else learning(seeds=1, steps=100)),
    }


def table(found: dict[str, Any]) -> str:
    """The same for people."""
    lines: list[str] = []
    for shape, by_way in found["gb_per_s"].items():
        lines.append(f"{shape} float32, one thread" + " " * 12 + "GB/s   of a copy")
        lines += [f"  {way:<32}{speed:9.2f}{speed / by_way['copy']:11.2f}" for way, speed in by_way.items()]
    lines.append(f"{found['steps']} steps, {found['seeds']} seed(s)    bits per byte, held out")
    for codec, values in found["bits_per_byte"].items():
        lines.append(f"  {codec:<8}" + "".join(f"{value:9.4f}" for value in values))
    for codec, difference in found["difference_percent"].items():
        mean, lowest, highest = (difference[name] for name in ("mean", "lowest", "highest"))
        lines.append(f"  {codec} against fp32: {mean:+.3f} % on average, from {lowest:+.3f} to {highest:+.3f} %")
    return "\n".join(lines)


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="1500 steps and 3 seeds: the published figure")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = figures(full=options.full)
    say(json.dumps(found) if options.json else table(found))


if __name__ == "__main__":
    main()
