"""What does a remote layer cost against the same layer in process?

One `RemoteMoE` layer (D 256, H 1024, 16 experts, k 2, 2048 tokens), forward and backward, with one peer that has one
compute thread, against the same layer with the same experts in this process with one thread. Both step their experts
after every backward. Local and remote rounds take turns; the ratio is of their median times, 1 is the limit for one
call in flight. `--full` takes more rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

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


def one_round(layer: MoELayer, x_TD: Tensor) -> float:
    """Seconds for one forward and backward."""
    started_s = time.perf_counter()
    y_TD = layer(x_TD)
    (y_TD.square().mean() + layer.loss).backward()
    assert layer.metrics.pairs_answered == layer.metrics.pairs_sent, "a pair was lost: nothing was measured"
    return time.perf_counter() - started_s


def measure(layers: dict[str, MoELayer], *, rounds: int) -> dict[str, list[float]]:
    """Seconds per round and layer, in turns, after one warm-up each."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=generator, requires_grad=True)
    for layer in layers.values():
        one_round(layer, x_TD)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            seconds[name].append(one_round(layer, x_TD))
    return seconds


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


def compare(codec: str, *, rounds: int) -> dict[str, float]:
    """Median milliseconds of both, and their ratio."""
    run = manifest(codec)
    with swarm_of_one(run) as address, join(address) as swarm:
        if not swarm.wait_for_experts(timeout_s=60.0):
            raise RuntimeError("the peer did not come online")
        seconds = measure({"local": local_layer(run), "remote": RemoteMoE(swarm)}, rounds=rounds)
    local_s, remote_s = (statistics.median(seconds[name]) for name in ("local", "remote"))
    return {
        "ratio_compute": local_s / remote_s,
        "local_ms": 1e3 * local_s,
        "remote_ms": 1e3 * remote_s,
        "tokens_per_s": NUM_TOKENS / remote_s,
    }


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="more rounds, and fp32 on the wire too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = 60 if options.full else 20
    figures = compare("bf16", rounds=rounds)
    if options.full:
        figures |= {f"{name}_fp32": value for name, value in compare("fp32", rounds=rounds).items()}
    if options.json:
        say(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    else:
        say("\n".join(f"{name:<20} {value:10.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
