"""How many experts a peer takes."""

import pytest

from peer.device import MAX_EXPERTS, capacity
from peer.envelope import seal
from peer.identity import Identity
from peer.records import HostedExpert, PeerRecord
from tests.swarm import tiny_run

MIB = 1 << 20


def test_unasked_a_peer_takes_what_fits_in_half_of_the_free_memory() -> None:
    assert capacity(asked=None, free_bytes=100 * MIB, bytes_per_expert=MIB).max_experts == 50


def test_asked_for_a_number_a_peer_takes_it_as_long_as_it_fits() -> None:
    assert capacity(asked=90, free_bytes=100 * MIB, bytes_per_expert=MIB).max_experts == 90
    with pytest.raises(ValueError, match="--max-experts 101 needs more memory than is free: 100 fit"):
        capacity(asked=101, free_bytes=100 * MIB, bytes_per_expert=MIB)


def test_with_memory_for_very_many_a_peer_takes_as_many_as_its_record_can_name() -> None:
    free_bytes = 10 * MAX_EXPERTS * MIB

    assert capacity(asked=None, free_bytes=free_bytes, bytes_per_expert=MIB).max_experts == MAX_EXPERTS
    assert capacity(asked=MAX_EXPERTS, free_bytes=free_bytes, bytes_per_expert=MIB).max_experts == MAX_EXPERTS
    with pytest.raises(ValueError, match=f"--max-experts {MAX_EXPERTS + 1} .* {MAX_EXPERTS}.* more peers"):
        capacity(asked=MAX_EXPERTS + 1, free_bytes=free_bytes, bytes_per_expert=MIB)


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
