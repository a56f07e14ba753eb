"""What does a peer do when four times as much is asked of it as it can compute?

One peer process (two experts `ffn`, D 256, H 2048, one compute thread) and eight trainers on one event loop here. A
trainer sends training forwards of 512 rows in bf16, and for each that is answered the backward of it. First the peer's
best is measured: all trainers wait for their answers, with one to four calls of each in flight. Then calls are started
at four times the rate of that best, whatever becomes of them.

`throughput_ratio`: rows taught per second under overload, over the best below it (the mean of before and after: a
machine's mood changes). Bound by what the peer pays for declining, on the same two cores as its compute thread and all
trainers, and for forwards whose backward it declines. `late`: calls neither answered nor declined by their deadline,
two seconds; `trainers_lag_s` is the longest that the trainers' own loop stood still meanwhile. `rss_growth`: of the
peer's memory, the last fifth of the overload over its second fifth, less 1. `recomputed_share`: of the rows that went
back, those whose outputs were computed again. `--full` overloads for 60 s, else for 12.
"""

import argparse
import asyncio
import json
import multiprocessing
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import psutil
import structlog
import torch

from experts.settings import ExpertShape
from peer.device import limit_compute_threads
from peer.expert_host import ExpertHost
from peer.grpc_transport import GrpcTransport
from peer.identity import Identity
from peer.kept_inputs import KeptInputsCounts
from peer.manifest import ModelSettings, RunManifest
from peer.messages import CALL_ID_BYTES, Call, CallLimits, ExpertRows, GroupReply, Mode, Outcome, ReplyLimits
from peer.service import ExpertService
from peer.tensors import Role, encode
from peer.transport import Endpoint, Method
from peer.wire_codecs import Codec
from protos.swarm_pb2 import InfoReply, InfoRequest
from trainer.caller import send_call
from trainer.ledger import LossReason

DIM, HIDDEN, NUM_EXPERTS = 256, 2048, 2
NUM_TRAINERS, CALL_ROWS = 8, 512
TIMEOUT_S = 2.0
OVERLOAD = 4.0
ROOM_BYTES = 64 << 20
RUN = RunManifest(
    name="overload",
    moe_layers=1,
    experts_per_layer=NUM_EXPERTS,
    expert=ExpertShape(kind="ffn", dim=DIM, hidden=HIDDEN),
    model=ModelSettings(dim=DIM, layers=1, heads=4, kv_heads=2),
)


def serve(ready: Connection) -> None:
    """The peer's process: tells its endpoint, serves until it is told to end."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    limit_compute_threads()
    asyncio.run(_serve(ready))


async def _serve(ready: Connection) -> None:
    identity = Identity.generate()
    host = ExpertHost(RUN, device=torch.device("cpu"), snapshots=None, max_experts=NUM_EXPERTS)
    host.start()
    await host.host(RUN.uids(), {})
    transport = GrpcTransport(identity)
    service = ExpertService(host, CallLimits.of(RUN), _introduce, max_bytes_in_flight=ROOM_BYTES)
    server = await transport.serve(service, "127.0.0.1:0")
    ready.send(Endpoint(identity.peer_id, server.address, transport.certificate_der))
    with suppress(EOFError):  # whoever measured has failed
        await asyncio.to_thread(ready.recv)
        ready.send(host.kept_inputs)
    await transport.close()
    await asyncio.to_thread(host.close, timeout_s=5.0)


def _introduce(_: InfoRequest) -> InfoReply:
    return InfoReply()


@contextmanager
def peer_process() -> Generator[tuple[Endpoint, psutil.Process, Callable[[], KeptInputsCounts]]]:
    """Gives the peer's endpoint and its process, and a way to end it and hear what keeping inputs was good for."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()

    def end() -> KeptInputsCounts:
        ours.send("end")
        return ours.recv()

    try:
        yield ours.recv(), psutil.Process(process.pid), end
    finally:
        ours.close()  # which ends it too
        process.join(timeout=20)


@dataclass
class Tally:
    """What became of calls that ended while it was open."""

    rows_taught: int = 0
    ends: Counter[str] = field(default_factory=Counter[str])
    """Calls by how they ended: answered, declined, late, or another reason."""


class Trainer:
    """Sends the same rows again and again, as new calls."""

    def __init__(self, endpoint: Endpoint, number: int) -> None:
        self._endpoint = endpoint
        self._transport = GrpcTransport(Identity.generate())
        self.tally = Tally()
        generator = torch.Generator().manual_seed(number)
        x_ND = torch.randn(CALL_ROWS, DIM, generator=generator)
        self._rows = {Role.ROWS: encode(x_ND, Role.ROWS, Codec.BF16)}
        self._gradients = {Role.GRADIENTS: encode(1e-3 * x_ND, Role.GRADIENTS, Codec.BF16)}
        self._number = number

    async def there_and_back(self) -> None:
        """A forward, and the backward of it when it was answered."""
        call = Call(
            call_id=secrets.token_bytes(CALL_ID_BYTES),
            run_id=RUN.run_id,
            mode=Mode.TRAIN,
            layer=0,
            experts=(ExpertRows(0, CALL_ROWS // 2), ExpertRows(1, CALL_ROWS // 2)),
            reply_codec=Codec.BF16,
            timeout_s=TIMEOUT_S,
            tensors=self._rows,
            score=1.0 / (1 + self._number),
        )
        groups = await self._ask(Method.FORWARD, call)
        if groups is None:
            return
        seen = {expert.index: expert.version for group in groups for expert in group.experts}
        experts = tuple(replace(expert, version=seen[expert.index]) for expert in call.experts)
        back = replace(call, tensors=self._gradients, experts=experts, loss_tokens=float(CALL_ROWS))
        if await self._ask(Method.BACKWARD, back) is not None:
            self.tally.rows_taught += CALL_ROWS

    async def _ask(self, method: Method, call: Call) -> list[GroupReply] | None:
        groups: list[GroupReply] = []
        limits = ReplyLimits.of(call, method, num_rows=CALL_ROWS)
        started_s = time.monotonic()
        ending = await send_call(
            self._transport, self._endpoint, method, call, limits, groups.append, timeout_s=TIMEOUT_S
        )
        outcomes = {expert.outcome for group in groups for expert in group.experts}
        if time.monotonic() - started_s > TIMEOUT_S or ending.failure is LossReason.TIMEOUT:
            end = "late"
        elif ending.failure is not None:
            end = str(ending.failure)
        else:
            end = "answered" if outcomes == {Outcome.OK} else ",".join(sorted(outcome.name for outcome in outcomes))
        self.tally.ends[f"{method.value.lower()} {end}"] += 1
        return groups if end == "answered" else None

    async def close(self) -> None:
        await self._transport.close()


async def waiting_for_answers(trainers: list[Trainer], *, in_flight: int, duration_s: float) -> float:
    """Rows taught per second when nobody asks for more than it gets."""

    async def go_on(trainer: Trainer, until_s: float) -> None:
        while time.monotonic() < until_s:
            await trainer.there_and_back()

    return await _rows_per_s(
        trainers,
        lambda until_s: [go_on(trainer, until_s) for trainer in trainers for _ in range(in_flight)],
        duration_s,
    )


async def overloading(trainers: list[Trainer], *, calls_per_s: float, duration_s: float) -> float:
    """Rows taught per second when so many calls are started, whatever becomes of them."""

    async def start_calls(trainer: Trainer, until_s: float) -> None:
        interval_s = len(trainers) / calls_per_s
        next_s = time.monotonic()
        async with asyncio.TaskGroup() as calls:
            while (now_s := time.monotonic()) < until_s:
                if now_s >= next_s:
                    calls.create_task(trainer.there_and_back())
                    next_s += interval_s
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))

    return await _rows_per_s(trainers, lambda until_s: [start_calls(t, until_s) for t in trainers], duration_s)


async def _rows_per_s(
    trainers: list[Trainer], begin: Callable[[float], list[Coroutine[None, None, None]]], duration_s: float
) -> float:
    """Of what is taught while it lasts; calls that run on are waited for, and count among the ends only."""
    for trainer in trainers:
        trainer.tally = Tally()
    started_s = time.monotonic()
    running = [asyncio.ensure_future(loop) for loop in begin(started_s + duration_s)]
    await asyncio.sleep(duration_s)
    rows = sum(trainer.tally.rows_taught for trainer in trainers)
    elapsed_s = time.monotonic() - started_s
    await asyncio.gather(*running)
    return rows / elapsed_s


@dataclass
class Watch:
    """The peer's memory, and how long this loop stood still."""

    rss_bytes: list[int] = field(default_factory=list[int])
    lag_s: float = 0.0

    async def look(self, process: psutil.Process) -> None:
        """Until cancelled, twenty times a second."""
        while True:
            self.rss_bytes.append(process.memory_info().rss)
            began_s = time.monotonic()
            await asyncio.sleep(0.05)
            self.lag_s = max(self.lag_s, time.monotonic() - began_s - 0.05)


async def best_of(trainers: list[Trainer], *, duration_s: float) -> tuple[int, float]:
    """The number of calls in flight with which most is taught, and how much."""
    rows_per_s = {
        in_flight: await waiting_for_answers(trainers, in_flight=in_flight, duration_s=duration_s)
        for in_flight in (1, 2, 4)
    }
    return max(rows_per_s.items(), key=lambda item: item[1])


async def measure(endpoint: Endpoint, process: psutil.Process, *, best_s: float, overload_s: float) -> dict[str, float]:
    """Both, one after the other."""
    trainers = [Trainer(endpoint, number) for number in range(NUM_TRAINERS)]
    await waiting_for_answers(trainers, in_flight=1, duration_s=1.0)
    in_flight, before = await best_of(trainers, duration_s=best_s)
    watch = Watch()
    watching = asyncio.ensure_future(watch.look(process))
    overloaded = await overloading(trainers, calls_per_s=OVERLOAD * before / CALL_ROWS, duration_s=overload_s)
    watching.cancel()
    ends = sum((trainer.tally.ends for trainer in trainers), Counter[str]())
    taught = [trainer.tally.rows_taught for trainer in trainers]
    best = (before + await waiting_for_answers(trainers, in_flight=in_flight, duration_s=best_s)) / 2
    fifth = len(watch.rss_bytes) // 5
    early, late = (statistics.median(part) for part in (watch.rss_bytes[fifth : 2 * fifth], watch.rss_bytes[-fifth:]))
    for trainer in trainers:
        await trainer.close()
    return {
        "throughput_ratio": overloaded / best,
        "best_rows_per_s": best,
        "overload_rows_per_s": overloaded,
        "rss_growth": late / early - 1,
        "rss_mb": late / 2**20,
        "answered": sum(number for end, number in ends.items() if end.endswith("answered")),
        "declined": sum(number for end, number in ends.items() if end.endswith("declined")),
        "late": sum(number for end, number in ends.items() if end.endswith("late")),
        "trainers_lag_s": watch.lag_s,
        "least_over_most_taught": min(taught) / max(taught),
        **{end.replace(" ", "_"): float(number) for end, number in sorted(ends.items())},
    }


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--full", action="store_true", help="overload for 60 s")
    options = parser.parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    best_s, overload_s = (5.0, 60.0) if options.full else (2.5, 12.0)
    with peer_process() as (endpoint, process, end):
        figures = asyncio.run(measure(endpoint, process, best_s=best_s, overload_s=overload_s))
        kept = end()
    figures |= {
        "recomputed_share": kept.rows_recomputed / (kept.rows_recomputed + kept.rows_from_graph),
        "mb_not_sent_twice": kept.uplink_bytes_saved / 2**20,
        "inputs_missed": kept.missed,
    }
    if options.json:
        say(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    else:
        say("\n".join(f"{name:<24} {value:12.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
