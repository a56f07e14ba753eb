"""What does a remote layer cost against the same layer in process?

One `RemoteMoE` layer (D 256, H 1024, 16 experts, k 2, 2048 tokens), forward and backward, with one peer that has one
compute thread, against the same layer with the same experts in this process with one thread. Both step their experts
after every backward. `ratio_compute` has two batches in flight, as the training loop does by default: the second of
two must recompute its graph, because the first has stepped its experts. `ratio_one_in_flight` waits for each answer.
Local and remote blocks take turns; ratios are of median times, and about 1 is the limit. `--full` takes more blocks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from experts.bank import ExpertBank
from experts.settings import ExpertShape
from peer.manifest import ModelSettings, RunManifest, WireSettings
from swarmoe import RemoteMoE, join
from swarmoe.run_presets import manifest_toml
from trainer.local_experts import LocalExperts
from trainer.moe import MoELayer
from trainer.routing.view import View
from trainer.swarm import router_for

DIM, HIDDEN, NUM_EXPERTS, NUM_TOKENS = 256, 1024, 16, 2048
ROUNDS_PER_BLOCK = 6


def manifest(codec: str) -> RunManifest:
    """One mixture layer of the question's size."""
    return RunManifest(
        name="benchmark",
        moe_layers=1,
        experts_per_layer=NUM_EXPERTS,
        expert=ExpertShape(kind="ffn", dim=DIM, hidden=HIDDEN),
        model=ModelSettings(dim=DIM, layers=1, heads=4, kv_heads=2),
        wire=WireSettings.model_validate({"forward_codec": codec, "backward_codec": codec}),
    )


def local_layer(run: RunManifest) -> MoELayer:
    """The same layer, its experts in this process."""
    bank = ExpertBank(run.expert, run.expert_optimizer, device=torch.device("cpu"), seed=run.seed)
    for uid in run.uids():
        bank.add(uid)
    view = View.all_alive(0, NUM_EXPERTS)
    return MoELayer(0, router_for(run, 0), LocalExperts(bank), lambda _: view, timeout_s=60.0)


def one_round(layer: MoELayer) -> None:
    """One forward and backward."""
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y_TD = layer(x_TD)
    (y_TD.square().mean() + layer.loss).backward()
    assert layer.metrics.pairs_answered == layer.metrics.pairs_sent, "a pair was lost: nothing was measured"


def block_seconds(layer: MoELayer, *, in_flight: int) -> float:
    """Seconds per round, over a block of rounds."""
    started_s = time.perf_counter()
    if in_flight == 1:
        for _ in range(ROUNDS_PER_BLOCK):
            one_round(layer)
    else:
        with ThreadPoolExecutor(in_flight, initializer=_prepare_thread) as threads:
            list(threads.map(one_round, [layer] * ROUNDS_PER_BLOCK))
    return (time.perf_counter() - started_s) / ROUNDS_PER_BLOCK


def _prepare_thread() -> None:
    torch.autograd.set_multithreading_enabled(False)  # thread-local; else backwards share one thread of the device


@contextmanager
def swarm_of_one(run: RunManifest) -> Generator[str]:
    """A coordinator and one peer with every expert, as processes; gives the address to join."""
    with tempfile.TemporaryDirectory(prefix="swarmoe-benchmark-") as folder:
        run_file = Path(folder) / "run.toml"
        run_file.write_text(manifest_toml(run), encoding="utf-8")
        listen = ["--listen=127.0.0.1:0", "--http=127.0.0.1:0", "--log-level=warning"]
        with _command("coordinator", f"--run={run_file}", f"--state-dir={folder}/coordinator", *listen) as join_line:
            address = join_line.removeprefix("join:").strip()
            with _command("peer", f"--join={address}", f"--state-dir={folder}/peer", "--device=cpu", *listen):
                yield address


@contextmanager
def _command(*arguments: str) -> Generator[str]:
    process = subprocess.Popen([sys.executable, "-m", "swarmoe", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
    finally:
        process.terminate()
        process.wait(timeout=20)


def compare(codec: str, *, blocks: int) -> dict[str, float]:
    """Median milliseconds of a round, and the ratios."""
    run = manifest(codec)
    with swarm_of_one(run) as address, join(address) as swarm:
        if not swarm.wait_for_experts(timeout_s=60.0):
            raise RuntimeError("the peer did not come online")
        local, remote = local_layer(run), RemoteMoE(swarm)
        ways = {"local": (local, 1), "one_in_flight": (remote, 1), "remote": (remote, 2)}
        for layer in (local, remote):
            one_round(layer)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(blocks):
            for name, (layer, in_flight) in ways.items():
                seconds[name].append(block_seconds(layer, in_flight=in_flight))
    median_s = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "ratio_compute": median_s["local"] / median_s["remote"],
        "ratio_one_in_flight": median_s["local"] / median_s["one_in_flight"],
        "tokens_per_s": NUM_TOKENS / median_s["remote"],
        **{f"{name}_ms": 1e3 * value for name, value in median_s.items()},
    }


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="more blocks, and fp32 on the wire too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    blocks = 12 if options.full else 4
    figures = compare("bf16", blocks=blocks)
    if options.full:
        figures |= {f"{name}_fp32": value for name, value in compare("fp32", blocks=blocks).items()}
    if options.json:
        say(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    else:
        say("\n".join(f"{name:<20} {value:10.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
