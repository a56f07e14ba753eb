"""How many experts a peer takes."""

import pytest
import torch

from experts.bank import ExpertBank
from experts.registry import expert_kind
from peer.device import MAX_EXPERTS, Footprint, capacity, compute_dtype
from peer.envelope import seal
from peer.identity import Identity
from peer.records import HostedExpert, PeerRecord
from tests.swarm import tiny_run

MIB = 1 << 20
EACH_ONE_MIB = Footprint(MIB)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_unasked_a_peer_takes_what_fits_in_half_of_the_free_memory() -> None:
    assert capacity(asked=None, free_bytes=100 * MIB, footprint=EACH_ONE_MIB).max_experts == 50


def test_asked_for_a_number_a_peer_takes_it_as_long_as_it_fits() -> None:
    assert capacity(asked=90, free_bytes=100 * MIB, footprint=EACH_ONE_MIB).max_experts == 90
    with pytest.raises(ValueError, match="--max-experts 101 needs more memory than is free: 100 fit"):
        capacity(asked=101, free_bytes=100 * MIB, footprint=EACH_ONE_MIB)


def test_experts_that_leave_no_room_for_a_call_are_refused_with_the_numbers() -> None:
    footprint = Footprint(2 * MIB, activation_bytes=30 * MIB)

    assert capacity(asked=35, free_bytes=100 * MIB, footprint=footprint).max_experts == 35
    with pytest.raises(
        ValueError,
        match=r"--max-experts 36 .*: 35 fit \(2\.0 MiB each with optimiser state; "
        r"100\.0 MiB free, 30\.0 MiB of it for activations\)",
    ):
        capacity(asked=36, free_bytes=100 * MIB, footprint=footprint)


def test_a_device_on_which_not_one_expert_fits_is_refused_with_the_numbers() -> None:
    too_large = Footprint(80 * MIB, activation_bytes=30 * MIB)
    large = Footprint(60 * MIB, activation_bytes=30 * MIB)

    with pytest.raises(ValueError, match=r"no expert of this run fits on this device \(80\.0 MiB each"):
        capacity(asked=None, free_bytes=100 * MIB, footprint=too_large)
    with pytest.raises(ValueError, match=r"fits in half of the free memory .* --max-experts 1 takes all"):
        capacity(asked=None, free_bytes=100 * MIB, footprint=large)


def test_a_runs_footprint_counts_what_computes_and_a_micro_batch() -> None:
    run = tiny_run()
    kind, optimizer = expert_kind(run.expert.kind), run.expert_optimizer

    exact, rounded = (Footprint.of(run, dtype) for dtype in (torch.float32, torch.bfloat16))

    assert exact.bytes_per_expert == ExpertBank.bytes_per_expert(run.expert, optimizer)
    assert rounded.bytes_per_expert == exact.bytes_per_expert + 2 * kind.num_parameters(run.expert)
    tokens = run.batch.sequences * run.model.context
    assert exact.activation_bytes == tokens * (kind.saved_bytes_per_row(run.expert) + 16 * run.expert.dim)
    assert rounded.activation_bytes < exact.activation_bytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])])
def test_a_gpu_computes_in_bfloat16_where_it_has_it(device: str) -> None:
    expected = torch.bfloat16 if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else torch.float32

    assert compute_dtype(torch.device(device)) == expected


def test_with_memory_for_very_many_a_peer_takes_as_many_as_its_record_can_name() -> None:
    free_bytes = 10 * MAX_EXPERTS * MIB

    assert capacity(asked=None, free_bytes=free_bytes, footprint=EACH_ONE_MIB).max_experts == MAX_EXPERTS
    assert capacity(asked=MAX_EXPERTS, free_bytes=free_bytes, footprint=EACH_ONE_MIB).max_experts == MAX_EXPERTS
    with pytest.raises(ValueError, match=f"--max-experts {MAX_EXPERTS + 1} .* {MAX_EXPERTS}.* more peers"):
        capacity(asked=MAX_EXPERTS + 1, free_bytes=free_bytes, footprint=EACH_ONE_MIB)


def test_the_record_of_a_full_peer_with_long_numbers_fits() -> None:
    author = Identity.generate()
    experts = tuple(
        HostedExpert(uid=f"99.{index + 10**5}", version=10**9, claimed_at_unix_s=1e9 + 1 / 3, rows_served=10**12)
        for index in range(MAX_EXPERTS)
    )
    record = PeerRecord(
        peer_id=author.peer_id,
        state="online",
        address="192.0.2.7:4701",
        certificate_der_b64="A" * 1024,
        experts=experts,
    )

    assert seal(author, record, run_id=tiny_run().run_id, expires_at_unix_s=1e9)
