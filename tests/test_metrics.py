"""What a peer measures of itself, as Prometheus reads it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from experts.uid import ExpertUid
from peer.expert_host import ExpertHost
from peer.messages import Call, ExpertRows, Mode
from peer.metrics import peer_registry
from peer.rates import Rates
from peer.tensors import Role, encode
from peer.transport import Method, PeerId
from peer.wire_codecs import Codec
from tests.swarm import CPU, DIM, seeded, tiny_run
from tests.swarm_scenes import rates

RUN = tiny_run()
X_ND = torch.randn(6, DIM, generator=seeded(0))
ANNE = PeerId("anne")


@pytest.fixture
async def host() -> AsyncIterator[ExpertHost]:
    host = ExpertHost(RUN, device=CPU, snapshots=None, max_experts=4)
    host.start()
    await host.host([ExpertUid(0, 0)], {})
    yield host
    assert await asyncio.to_thread(host.close, timeout_s=5.0)


def call_of(number: int, role: Role) -> Call:
    return Call(
        call_id=number.to_bytes(16, "big"),
        run_id=RUN.run_id,
        mode=Mode.TRAIN,
        layer=0,
        experts=(ExpertRows(0, len(X_ND)),),
        reply_codec=Codec.RAW,
        timeout_s=5.0,
        tensors={role: encode(X_ND, role, Codec.RAW)},
        loss_tokens=6.0 if role is Role.GRADIENTS else 0.0,
    )


async def answer(host: ExpertHost, method: Method, call: Call) -> None:
    async for _ in host.answer(method, ANNE, call):
        pass


async def test_kept_bytes_and_backwards_computed_again_are_told(host: ExpertHost) -> None:
    registry = peer_registry(host, Rates, RUN)
    told_kept_bytes: list[float | None] = []

    for number in (1, 2):
        await answer(host, Method.FORWARD, call_of(number, Role.ROWS))
        told_kept_bytes.append(registry.get_sample_value("swarmoe_kept_bytes"))
    for number in (1, 2):  # by the second, the first has changed the expert
        await answer(host, Method.BACKWARD, call_of(number, Role.GRADIENTS))
    await answer(host, Method.BACKWARD, call_of(3, Role.GRADIENTS))  # which had no forward

    assert host.trips_per_s is not None
    assert told_kept_bytes[0]
    assert told_kept_bytes[1] == 2 * told_kept_bytes[0]
    assert registry.get_sample_value("swarmoe_kept_bytes") == 0
    assert registry.get_sample_value("swarmoe_recomputed_backwards_total") == 1
    assert registry.get_sample_value("swarmoe_backward_rows_total", {"outputs": "graph"}) == 6
    assert registry.get_sample_value("swarmoe_backward_rows_total", {"outputs": "recomputed"}) == 6
    assert registry.get_sample_value("swarmoe_bytes_not_sent_twice_total") == 2 * X_ND.nbytes
    assert registry.get_sample_value("swarmoe_gradients_only_backwards_total", {"inputs": "kept"}) == 2
    assert registry.get_sample_value("swarmoe_gradients_only_backwards_total", {"inputs": "missing"}) == 1
    assert registry.get_sample_value("swarmoe_rows_served_total", {"uid": "0.0"}) == 12
    assert registry.get_sample_value("swarmoe_expert_steps_total", {"uid": "0.0"}) == 2


async def test_what_was_measured_at_the_start_is_told(host: ExpertHost) -> None:
    measured = rates(0.25, manifest=RUN)

    registry = peer_registry(host, lambda: measured, RUN)

    up, down = (registry.get_sample_value("swarmoe_link_bits_per_second", {"direction": way}) for way in ("up", "down"))
    assert measured.link is not None
    assert (up, down) == (measured.link.up_bits_per_s, measured.link.down_bits_per_s)
    assert registry.get_sample_value("swarmoe_link_latency_seconds") == 0.023
    assert registry.get_sample_value("swarmoe_device_flops_per_second") == 4e10
    assert registry.get_sample_value("swarmoe_chi") == pytest.approx(0.25)


async def test_what_could_not_be_measured_is_not_told(host: ExpertHost) -> None:
    registry = peer_registry(host, Rates, RUN)

    assert not [family.name for family in registry.collect() if "link" in family.name or "chi" in family.name]
