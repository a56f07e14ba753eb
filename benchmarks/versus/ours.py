"""Our contestant: a coordinator and one peer as processes, and a client that calls through `RemoteMoE`, as users do."""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Generator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.versus import kinds
from benchmarks.versus.contest import Round, answer_turns
from experts.bank import ExpertBank
from experts.settings import ExpertOptimizerSettings, ExpertShape
from peer.manifest import ModelSettings, RunManifest, WireSettings
from swarmoe import RemoteMoE, join
from swarmoe.run_presets import manifest_toml
from trainer.local_experts import LocalExperts
from trainer.moe import MoELayer
from trainer.routing.gate import softmax
from trainer.routing.plan import Plan
from trainer.routing.router import Router
from trainer.routing.score import LinearScore
from trainer.routing.selection import Pairs, Scores, TopK
from trainer.routing.view import View
from trainer.swarm import router_for

DIM = 256
LAYER_EXPERTS, LAYER_TOP_K = 16, 2
_START_WITHIN_S = 60.0
_DICE = torch.Generator()
_PRECISE = WireSettings(codecs=("fp32",), forward_codec="fp32", backward_codec="fp32", call_timeout_s=60.0)


def manifest(kind: str, *, num_experts: int, wire: WireSettings) -> RunManifest:
    """A run of one layer whose experts take a step after every backward: the cheapest we have, as theirs is."""
    return RunManifest(
        name="versus",
        moe_layers=1,
        experts_per_layer=num_experts,
        expert=ExpertShape(kind=kind, dim=DIM, hidden=kinds.EXPANSION * DIM),
        expert_optimizer=ExpertOptimizerSettings(name="sgd", learning_rate=1e-12, clip_norm=None),
        model=ModelSettings(dim=DIM, layers=1),
        wire=wire,
    )


RUNS = {
    "nop": manifest("hivemind_nop", num_experts=1, wire=_PRECISE),
    "ffn": manifest("hivemind_ffn", num_experts=1, wire=_PRECISE),
    "layer": manifest("hivemind_ffn", num_experts=LAYER_EXPERTS, wire=WireSettings(call_timeout_s=60.0)),
}


class _ToOne(Router):
    """Every row to the one expert of its layer, with weight 1: what a `RemoteExpert` of hivemind's does."""

    def __init__(self) -> None:
        super().__init__(LinearScore(1, 1, generator=_DICE), softmax, TopK(1), norm="none", generator=_DICE)

    def forward(self, x_TD: Tensor, view: View, *, seq_len: int | None = None) -> Plan:
        num_rows = len(x_TD)
        ones_T1, rows_T = x_TD.new_ones(num_rows, 1), torch.arange(num_rows)
        zeros_T = torch.zeros_like(rows_T)
        return Plan(
            num_tokens=num_rows,
            seq_len=num_rows,
            token_N=rows_T,
            expert_N=zeros_T,
            weights_N=ones_T1[:, 0],
            chosen=Pairs(rows_T, zeros_T, rank_M=zeros_T, fate_M=zeros_T),
            weights_M=ones_T1[:, 0],
            scores=Scores(
                ones_T1, ones_T1, view.prior_E, view.alive_E, view.share_E, view.num_live, True, self.draw_seed
            ),
            norm="none",
            scale=1.0,
        )  # fmt: skip


def router_of(run: RunManifest) -> Router:
    """The run's own, or none to speak of for a single expert."""
    return router_for(run, 0) if run.experts_per_layer > 1 else _ToOne()


def in_process(run: RunManifest) -> MoELayer:
    """The run's layer with its experts in this process: what no network can be faster than."""
    bank = ExpertBank(run.expert, run.expert_optimizer, device=torch.device("cpu"), seed=run.seed)
    for uid in run.uids():
        bank.add(uid)
    view = View.all_alive(0, run.experts_per_layer)
    return MoELayer(0, router_of(run), LocalExperts(bank), lambda _: view, timeout_s=60.0)


@contextlib.contextmanager
def rounds_of(moe: MoELayer, num_rows: int) -> Generator[Round]:
    """Forwards and backwards through the layer; RuntimeError when a pair or a backward of them was lost."""
    x_TD = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(0))

    def one_round() -> None:
        y_TD = moe(x_TD.clone().requires_grad_())
        (y_TD.sum() + moe.loss).backward()

    before = moe.ledger.read()
    yield one_round
    after = moe.ledger.read()
    if (before.pairs["lost"], before.backwards["lost"]) != (after.pairs["lost"], after.backwards["lost"]):
        raise RuntimeError(f"pairs or backwards were lost: {after}")


@contextlib.contextmanager
def swarm_of_one(run: RunManifest, folder: Path) -> Generator[str]:
    """A coordinator and one peer with every expert, as processes; gives the address to join."""
    run_file = folder / "run.toml"
    run_file.write_text(manifest_toml(run), encoding="utf-8")
    listen = ["--listen=127.0.0.1:0", "--http=127.0.0.1:0", "--log-level=warning"]
    with _command("coordinator", f"--run={run_file}", f"--state-dir={folder}/coordinator", *listen) as line:
        address = line.removeprefix("join:").strip()
        with _command("peer", f"--join={address}", f"--state-dir={folder}/peer", "--device=cpu", *listen):
            yield address


@contextlib.contextmanager
def _command(*arguments: str) -> Generator[str]:
    """A command of ours that knows hivemind's experts; gives its first line."""
    process = subprocess.Popen([sys.executable, "-m", kinds.__name__, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
    finally:
        process.terminate()
        process.wait(timeout=20)


def main() -> None:
    """Be the contestant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=RUNS)
    run = RUNS[parser.parse_args().run]
    with (
        tempfile.TemporaryDirectory(prefix="swarmoe-versus-") as folder,
        swarm_of_one(run, Path(folder)) as address,
        join(address, timeout_s=_START_WITHIN_S) as swarm,
    ):
        if not swarm.wait_for_experts(timeout_s=_START_WITHIN_S):
            raise RuntimeError("the peer did not come online")
        remote = RemoteMoE(swarm, router=router_of(run))
        answer_turns({"round": partial(rounds_of, remote), "in_process": partial(rounds_of, in_process(run))})


if __name__ == "__main__":
    main()
