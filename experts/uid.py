"""Names of experts: `layer.index` inside a run, a content id across runs, and the seed both give a fresh expert."""

import hashlib
import re
from dataclasses import dataclass
from typing import NewType, Self

RunId = NewType("RunId", str)
ContentId = NewType("ContentId", str)

UID_PATTERN = r"^(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})$"
"""What `ExpertUid.parse` reads, for validators that check thousands of them without making any."""
_UID = re.compile(UID_PATTERN)


@dataclass(frozen=True, order=True)
class ExpertUid:
    """One sub-network of a run: the `index`-th expert of MoE layer `layer`. Written `3.17`."""

    layer: int
    index: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `3.17`; ValueError on anything else, signs, spaces and leading zeros included."""
        match = _UID.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not an expert uid; write LAYER.INDEX, for example 3.17")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


def content_id(run_id: RunId, uid: ExpertUid) -> ContentId:
    """What this expert is called outside its run: SHA-256 of run id and uid, 64 hex digits."""
    return ContentId(hashlib.sha256(f"{run_id}/{uid}".encode()).hexdigest())


def initial_seed(run_seed: int, uid: ExpertUid) -> int:
    """The seed of a fresh expert's own CPU generator: any host that starts this expert starts the same one."""
    digest = hashlib.sha256(f"swarmoe expert {run_seed} {uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch generators take 63 bits
