"""hivemind's contestant: a server process and a client, each used the way its documentation and its source allow best.

Three tasks: `expert`, one `RemoteExpert`; `layer`, top-2 over 16 experts with a router of ours and one `RemoteExpert`
call per expert, all at once, there and back; `documented`, `RemoteMixtureOfExperts`, which sends one call per row and
expert. `python -m benchmarks.versus.theirs client COMPRESSION` is the contestant.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import hivemind
import torch
from hivemind.moe import server as their_server
from hivemind.proto import runtime_pb2
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.versus.contest import Round, Task, answer_turns
from benchmarks.versus.ours import DIM, LAYER_EXPERTS, LAYER_TOP_K
from trainer.routing.presets import build_router
from trainer.routing.view import View

LOOPBACK: dict[str, Any] = {
    "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
    "nat_port_map": False,
    "auto_nat": False,
    "use_relay": False,
}
SERVED = {"nop": ("nop", 1), "ffn": ("ffn", 1), "layer": ("ffn", LAYER_EXPERTS)}
"""Which of its expert classes, and how many."""
_server: Any = their_server  # typed so that its own documented uses do not type-check
_runtime_pb2: Any = runtime_pb2
_HANDLERS = 2
"""Processes that take calls; by default 8 per expert. One per core is its best here."""
_FOUND_WITHIN_S = 60.0
_CALL_TIMEOUT_S = 60.0


def serve(scene: str, compression: str) -> None:
    """Host experts until stdin ends, printing first where."""
    expert_class, _ = SERVED[scene]
    server = _server.Server.create(
        expert_uids=_uids(scene),
        expert_cls=expert_class,
        hidden_dim=DIM,
        num_handlers=_HANDLERS,
        max_batch_size=16384,
        device="cpu",
        compression=_runtime_pb2.CompressionType.Value(compression),
        optim_cls=partial(torch.optim.SGD, lr=0.0),
        start=True,
        **LOOPBACK,
    )
    print(json.dumps([str(address) for address in server.dht.get_visible_maddrs()]), flush=True)
    sys.stdin.read()
    server.shutdown()


def _uids(scene: str) -> list[str]:
    return [f"{scene}.{index}" for index in range(SERVED[scene][1])]


class _Parallel(torch.autograd.Function):
    """Calls of several experts side by side in both directions; autograd alone would go back through them in turn."""

    @staticmethod
    def forward(ctx: Any, threads: ThreadPoolExecutor, calls: list[Callable[[Tensor], Tensor]], *inputs: Tensor) -> Any:
        ctx.threads, ctx.inputs = threads, [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            ctx.outputs = list(threads.map(_with_grad, calls, ctx.inputs))
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    @once_differentiable  # which types ctx as position-only
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *ctx.threads.map(_gradient, ctx.outputs, ctx.inputs, gradients)


def _with_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():  # thread-local
        return call(x)


def _gradient(output: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    return torch.autograd.grad(output, x, gradient)[0]


@contextlib.contextmanager
def rounds_of(module: Any, num_rows: int) -> Generator[Round]:
    """Forwards and backwards through a RemoteExpert or a RemoteMixtureOfExperts."""
    x = _rows(num_rows)

    def one_round() -> None:
        module(x.clone().requires_grad_()).sum().backward()

    yield one_round


@contextlib.contextmanager
def layer_rounds(experts: list[Any], num_rows: int) -> Generator[Round]:
    """The layer as hivemind does it best: every expert gets all its rows in one call, all calls at once."""
    x = _rows(num_rows)
    router = build_router("mixtral", dim=DIM, num_experts=len(experts), top_k=LAYER_TOP_K)
    view = View.all_alive(0, len(experts))

    def one_round() -> None:
        x_TD = x.clone().requires_grad_()
        plan = router(x_TD, view)
        groups = plan.groups()
        sent = plan.dispatch(x_TD).split([rows.stop - rows.start for _, rows in groups])
        outputs = _Parallel.apply(threads, [experts[slot] for slot, _ in groups], *sent)
        (plan.combine(torch.cat(outputs)).sum() + router.loss(plan)).backward()

    with ThreadPoolExecutor(len(experts)) as threads:
        yield one_round


def _rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _serving(scene: str, compression: str) -> Generator[list[str]]:
    """A server in a process of its own; gives its addresses."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.versus.theirs", "server", scene, compression],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(timeout=20)


def main() -> None:
    """Be the contestant, or its server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["client", "server"])
    parser.add_argument("scene", choices=SERVED)
    parser.add_argument("compression", nargs="?", default="NONE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "server":
        serve(options.scene, options.compression)
        return
    with _serving(options.scene, options.compression) as addresses:
        dht = hivemind.DHT(initial_peers=addresses, start=True, **LOOPBACK)
        try:
            experts = _find(dht, _uids(options.scene))
            tasks: dict[str, Task] = {"round": partial(rounds_of, experts[0])}
            if options.scene == "layer":
                mixture = hivemind.RemoteMixtureOfExperts(
                    in_features=DIM, grid_size=(LAYER_EXPERTS,), dht=dht, uid_prefix="layer.", k_best=LAYER_TOP_K,
                    k_min=1, forward_timeout=_CALL_TIMEOUT_S, backward_timeout=_CALL_TIMEOUT_S,
                )  # fmt: skip
                tasks = {"round": partial(layer_rounds, experts), "documented": partial(rounds_of, mixture)}
            answer_turns(tasks)
        finally:
            dht.shutdown()


def _find(dht: Any, uids: list[str]) -> list[Any]:
    """Blocks until all are announced."""
    deadline_s = time.monotonic() + _FOUND_WITHIN_S
    while None in (experts := _server.get_experts(dht, uids)):
        if time.monotonic() > deadline_s:
            raise RuntimeError("hivemind's experts were not announced in time")
        time.sleep(0.1)
    return list(experts)


if __name__ == "__main__":
    main()
