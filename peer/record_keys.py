"""Under which DHT keys a run's records lie. Pure; knows neither what a record says nor who stores it.

All records under a key come back in one answer, of at most 4 MiB, and storing one fetches that answer on its way: the
peers' records, which grow with the experts they list, are spread over several keys. Who belongs where follows from the
run alone, so members need not agree on it.
"""

import zlib
from typing import get_args

from experts.uid import RunId
from peer.records import Kind

_EXPERTS_PER_SHARD = 1024
"""About 130 KiB of records, by peers with 16 experts each."""
_MOST_SHARDS = 16


class RecordKeys:
    """The keys of one run."""

    def __init__(self, run_id: RunId, *, num_experts: int) -> None:
        self._run_id = run_id
        self._num_peer_shards = min(max(1, num_experts // _EXPERTS_PER_SHARD), _MOST_SHARDS)

    def of_kind(self, kind: Kind) -> list[bytes]:
        """Every key under which records of this kind lie."""
        num_shards = self._num_peer_shards if kind == "peer" else 1
        return [f"swarmoe/{self._run_id}/{kind}/{shard}".encode() for shard in range(num_shards)]

    def of_record(self, kind: Kind, subkey: str) -> bytes:
        """The one key under which this author's record lies."""
        keys = self.of_kind(kind)
        return keys[zlib.crc32(subkey.encode()) % len(keys)]

    def kinds(self) -> dict[bytes, Kind]:
        """What every key holds."""
        kinds: tuple[Kind, ...] = get_args(Kind)
        return {key: kind for kind in kinds for key in self.of_kind(kind)}
