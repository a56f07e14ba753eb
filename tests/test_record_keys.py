"""Where records lie in the DHT: together while a run is small, the peers' spread over keys when it is large."""

import hashlib
from collections import Counter

import msgpack
import pytest

from experts.uid import RunId
from peer.dht_guard import RecordGuard
from peer.envelope import seal
from peer.identity import Identity
from peer.record_keys import RecordKeys
from peer.records import Kind, PeerRecord

RUN = RunId("5" * 32)
NOW = 1000.0
SMALL, LARGE = RecordKeys(RUN, num_experts=64), RecordKeys(RUN, num_experts=16384)


@pytest.mark.parametrize(("num_experts", "num_keys"), [(0, 1), (1, 1), (2047, 1), (2048, 2), (16384, 16), (10**12, 16)])
def test_peers_have_a_key_for_every_thousand_experts_up_to_a_limit(num_experts: int, num_keys: int) -> None:
    assert len(RecordKeys(RUN, num_experts=num_experts).of_kind("peer")) == num_keys


def test_a_record_lies_under_one_of_its_kinds_keys_and_authors_spread() -> None:
    used = Counter(LARGE.of_record("peer", f"member{number}") for number in range(1600))

    assert set(used) == set(LARGE.of_kind("peer"))
    assert max(used.values()) < 150  # 100 each, were they perfectly even


def test_no_two_kinds_or_runs_share_a_key() -> None:
    other = RecordKeys(RunId("6" * 32), num_experts=16384)

    assert len(LARGE.kinds()) == 16 + 1 + 1
    assert not LARGE.kinds().keys() & other.kinds().keys()
    assert [LARGE.kinds()[key] for key in LARGE.of_kind("trainer")] == ["trainer"]


@pytest.mark.hostile
@pytest.mark.parametrize("keys", [SMALL, LARGE])
def test_the_guard_takes_a_record_under_its_own_key_only(keys: RecordKeys) -> None:
    author = Identity.generate()
    guard = RecordGuard(RUN, keys, lambda: NOW)
    record = PeerRecord(peer_id=author.peer_id, state="online", address="127.0.0.1:7", certificate_der_b64="")
    value = seal(author, record, run_id=RUN, expires_at_unix_s=NOW + 15)

    accepted = {
        key: guard.accepts(
            key_sha1=hashlib.sha1(key).digest(),
            subkey_msgpack=packed(author.peer_id),
            value_msgpack=packed(value),
            expires_at_unix_s=NOW + 15,
        )
        for key in (*keys.kinds(), b"swarmoe/elsewhere")
    }

    assert [key for key, is_accepted in accepted.items() if is_accepted] == [keys.of_record("peer", author.peer_id)]


@pytest.mark.parametrize("kind", ["trainer", "run"])
def test_what_does_not_grow_with_the_experts_keeps_one_key(kind: Kind) -> None:
    assert len(LARGE.of_kind(kind)) == 1


def packed(value: str | bytes) -> bytes:
    data = msgpack.packb(value)
    assert isinstance(data, bytes)
    return data
