"""What does a remote layer cost, where FLOPs bound it and where bytes do?

`ratio_compute`: one `RemoteMoE` layer (D 512, H 2048, 16 experts `ffn`, k 2, 4096 tokens a micro-batch, the run's
default codecs) on one peer with one compute thread, the trainer on the other core, against the same layer with the same
experts in this process with one thread. Driven as the training loop does it: two micro-batches in flight forward, then
both backward. An expert steps after as many rows as an average one gets in such a step (`step_tokens`), on both sides:
after every backward instead, the second of two would have to compute its forward again (`share_recomputed` says how
much was). Bound: the compute thread; what is above 1 is the trainer's own share, which overlaps with it.

`ratio_two_peers`: the same over two peers with half the experts each, in steps per second over those with one; both are
taken relative to the local layer in their own run. Bound here: two cores, for two peers and the trainer.

`ratio_bytes`: an expert that copies its rows, fp32, four micro-batches of 16 MB in flight, forward and backward: bytes
up and down per second, over those of a bare gRPC stream under the same TLS that echoes as many (`bare_echo`).

Ways take turns; ratios are of medians. `--full` takes more turns.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import copying_expert
from benchmarks.bare_echo import bare_echo
from experts.bank import ExpertBank
from experts.settings import ExpertOptimizerSettings, ExpertShape
from peer.manifest import ModelSettings, RunManifest, WireSettings
from peer.transport import CHUNK_BYTES
from swarmoe import RemoteMoE, join
from swarmoe.run_presets import manifest_toml
from trainer.local_experts import LocalExperts
from trainer.moe import MoELayer
from trainer.routing.gate import softmax
from trainer.routing.router import Router
from trainer.routing.selection import TopK
from trainer.routing.view import View
from trainer.swarm import Swarm, router_for

DIM, HIDDEN, NUM_EXPERTS, TOP_K, NUM_TOKENS = 512, 2048, 16, 2, 4096
COMPUTE_IN_FLIGHT = 2
BYTES_TOKENS, BYTES_IN_FLIGHT = 8192, 4
_START_WITHIN_S = 60.0


@dataclass(frozen=True)
class Started:
    """A swarm whose peers are processes, joined."""

    swarm: Swarm
    metrics_addresses: tuple[str, ...]

    def counted(self, metric: str) -> float:
        """The sum of a counter over the peers, at this moment."""
        lines: list[str] = []
        for address in self.metrics_addresses:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:  # our own peer
                lines += page.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(metric))


def compute_run() -> RunManifest:
    """One mixture layer of the question's size."""
    rows_per_step = COMPUTE_IN_FLIGHT * NUM_TOKENS * TOP_K // NUM_EXPERTS
    return RunManifest(
        name="benchmark",
        moe_layers=1,
        experts_per_layer=NUM_EXPERTS,
        expert=ExpertShape(kind="ffn", dim=DIM, hidden=HIDDEN),
        expert_optimizer=ExpertOptimizerSettings(step_tokens=rows_per_step),
        model=ModelSettings(dim=DIM, layers=1, heads=4, kv_heads=2),
        wire=WireSettings(call_timeout_s=60.0, step_timeout_s=120.0),
    )


def bytes_run() -> RunManifest:
    """One expert that copies its rows."""
    return RunManifest(
        name="benchmark",
        moe_layers=1,
        experts_per_layer=1,
        expert=ExpertShape(kind=copying_expert.KIND, dim=DIM, hidden=DIM),
        model=ModelSettings(dim=DIM, layers=1, heads=4, kv_heads=2),
        wire=WireSettings(forward_codec="fp32", backward_codec="fp32", call_timeout_s=60.0),
    )


class _NoScore(nn.Module):
    """Routing that costs next to nothing."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_zeros(x_TD.shape[0], 1)


def _everything_to_one() -> Router:
    return Router(_NoScore(), softmax, TopK(1), norm="none", generator=torch.Generator())


def local_layer(run: RunManifest) -> MoELayer:
    """The same layer, its experts in this process."""
    bank = ExpertBank(run.expert, run.expert_optimizer, device=torch.device("cpu"), seed=run.seed)
    for uid in run.uids():
        bank.add(uid)
    view = View.all_alive(0, NUM_EXPERTS)
    return MoELayer(0, router_for(run, 0), LocalExperts(bank), lambda _: view, timeout_s=60.0)


# ---- a step, as the training loop takes it --------------------------------------------------------------------------


def step_seconds(layer: MoELayer, *, num_tokens: int, micro_batches: int, in_flight: int) -> float:
    """All micro-batches forward, then all backward, so many at a time."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(num_tokens, DIM, generator=generator, requires_grad=True) for _ in range(micro_batches)]
    began_s = time.perf_counter()
    with ThreadPoolExecutor(in_flight, initializer=_prepare_thread) as threads:
        ys = list(threads.map(layer, xs))
        list(threads.map(Tensor.backward, ys, repeat(xs[0].detach())))
    seconds = time.perf_counter() - began_s
    counts = layer.ledger.read()
    if any(counts.pairs.get(name) or counts.backwards.get(name) for name in ("lost", "stale")):
        raise RuntimeError(f"pairs or backwards were lost, so nothing was measured: {counts}")
    return seconds


def _prepare_thread() -> None:
    torch.autograd.set_multithreading_enabled(False)  # thread-local; else backwards share one thread of the device


# ---- a swarm of processes -------------------------------------------------------------------------------------------


@contextmanager
def started(run: RunManifest, hosted: Sequence[str]) -> Generator[Started]:
    """A coordinator and one peer per range of experts, as processes; this one has joined them."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="swarmoe-benchmark-"))
        run_file = Path(folder) / "run.toml"
        run_file.write_text(manifest_toml(run), encoding="utf-8")
        listen = ["--listen=127.0.0.1:0", "--log-level=error"]
        coordinator = ["coordinator", f"--run={run_file}", f"--state-dir={folder}/coordinator", "--http=127.0.0.1:0"]
        address = stack.enter_context(_command(*coordinator, *listen)).removeprefix("join:").strip()
        metrics = [f"127.0.0.1:{_free_port()}" for _ in hosted]
        for number, (experts, http) in enumerate(zip(hosted, metrics, strict=True)):
            where = [f"--join={address}", f"--state-dir={folder}/peer{number}", f"--http={http}", "--device=cpu"]
            stack.enter_context(_command("peer", f"--experts={experts}", *where, *listen))
        swarm = stack.enter_context(join(address, timeout_s=_START_WITHIN_S))
        if not swarm.wait_for_experts(timeout_s=_START_WITHIN_S):
            raise RuntimeError("the peers did not come online")
        yield Started(swarm, tuple(metrics))


@contextmanager
def _command(*arguments: str) -> Generator[str]:
    """A `swarmoe` command that also knows the expert that copies; gives its first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", copying_expert.__name__, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
    finally:
        process.terminate()
        process.wait(timeout=20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- the questions --------------------------------------------------------------------------------------------------


def against_local(hosted: Sequence[str], *, turns: int) -> dict[str, float]:
    """Median seconds of a step, local and remote, and what keeping inputs was worth."""
    run = compute_run()
    local = local_layer(run)
    with started(run, hosted) as peers:
        remote = RemoteMoE(peers.swarm)
        ways: dict[str, tuple[MoELayer, int]] = {"local": (local, 1), "remote": (remote, COMPUTE_IN_FLIGHT)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for layer, in_flight in ways.values():
            step_seconds(layer, num_tokens=NUM_TOKENS // 8, micro_batches=COMPUTE_IN_FLIGHT, in_flight=in_flight)
        for _ in range(turns):
            for name, (layer, in_flight) in ways.items():
                took_s = step_seconds(
                    layer, num_tokens=NUM_TOKENS, micro_batches=COMPUTE_IN_FLIGHT, in_flight=in_flight
                )
                seconds[name].append(took_s)
        saved_bytes = peers.counted("swarmoe_bytes_not_sent_twice_total")
        recomputed = peers.counted('swarmoe_backward_rows_total{outputs="recomputed"}')
        from_graph = peers.counted('swarmoe_backward_rows_total{outputs="graph"}')
        sent_bytes = remote.ledger.read().bytes_up
    return {name: statistics.median(times) for name, times in seconds.items()} | {
        "share_recomputed": recomputed / max(1.0, recomputed + from_graph),
        "uplink_saved": saved_bytes / (saved_bytes + sent_bytes),
    }


def against_bare_stream(*, turns: int) -> dict[str, float]:
    """Median megabytes per second, up and down together."""
    rates: dict[str, list[float]] = {"whole_path": [], "bare_tls": [], "bare_plaintext": []}
    with bare_echo() as echo, started(bytes_run(), ["0.0-0.0"]) as peers:
        layer = RemoteMoE(peers.swarm, router=_everything_to_one())
        for _ in range(1 + turns):
            before = layer.ledger.read()
            took_s = step_seconds(
                layer,
                num_tokens=BYTES_TOKENS,
                micro_batches=BYTES_IN_FLIGHT,
                in_flight=BYTES_IN_FLIGHT,
            )
            after = layer.ledger.read()
            up_bytes, down_bytes = after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down
            rates["whole_path"].append((up_bytes + down_bytes) / took_s / 1e6)
            num_chunks = (up_bytes + down_bytes) // 2 // CHUNK_BYTES
            rates["bare_tls"].append(echo.megabytes_per_s(num_chunks, tls=True))
            rates["bare_plaintext"].append(echo.megabytes_per_s(num_chunks, tls=False))
    return {f"{name}_mb_per_s": statistics.median(found[1:]) for name, found in rates.items()}  # the first warms up


def figures(*, full: bool) -> dict[str, float]:
    """Every figure, by name."""
    one = against_local(["0.0-0.15"], turns=8 if full else 2)
    two = against_local(["0.0-0.7", "0.8-0.15"], turns=8 if full else 1)
    carried = against_bare_stream(turns=9 if full else 3)
    return {
        "ratio_compute": one["local"] / one["remote"],
        "ratio_bytes": carried["whole_path_mb_per_s"] / carried["bare_tls_mb_per_s"],
        "ratio_two_peers": (two["local"] / two["remote"]) / (one["local"] / one["remote"]),
        "local_s": one["local"],
        "remote_s": one["remote"],
        "two_peers_s": two["remote"],
        "share_recomputed": one["share_recomputed"],
        "uplink_saved": one["uplink_saved"],
        **carried,
    }


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="more turns")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = figures(full=options.full)
    if options.json:
        say(json.dumps({name: round(value, 4) for name, value in found.items()}))
    else:
        say("\n".join(f"{name:<24} {value:10.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
