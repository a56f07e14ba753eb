"""A DHT node without a guard that joins ADDRESS and answers every question about KEY with poison.

Run as `python -m tests.hostile_dht_node SOCKET_FOLDER ADDRESS KEY POISON`; prints `ready` and serves until killed.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from peer import dht_node
from peer.bare_hivemind import P2PD_PATH
from peer.dht_guard import RecordGuard
from peer.p2pd import P2pDaemon


class NoGuard(RecordGuard):
    def __init__(self) -> None:
        """Believes everything."""

    def accepts(self, **_: object) -> bool:
        return True


def poison(kind: str) -> Any:
    """What the answer's dictionary holds instead of records: (maxsize, expiry, items)."""
    from peer.bare_hivemind import DictionaryDHTValue

    value = DictionaryDHTValue()
    if kind == "forged":
        value.store("a" * 52, b"\xc4\x03abc", time.time() + 30)
    elif kind == "sized":  # a size limit that cannot be compared
        value.maxsize = "large"  # type: ignore[assignment]
    return value


async def main(socket_dir: str, address: str, key: str, kind: str) -> None:
    await P2pDaemon.start(
        P2PD_PATH, Path(socket_dir), listen_maddr="/ip4/127.0.0.1/tcp/0", announce_maddr=None, timeout_s=15
    )
    node = await dht_node.Node.start(Path(socket_dir), NoGuard())
    joined, reasons = await node.join([address])
    assert joined, reasons
    protocol = node._node.protocol
    from hivemind.dht.routing import DHTID
    from hivemind.utils.timed_storage import ValueWithExpiration

    key_id = DHTID.generate(key.encode())
    protocol.storage.get = lambda asked: ValueWithExpiration(poison(kind), float("inf")) if asked == key_id else None
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
