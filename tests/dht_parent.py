"""A member reduced to its DHT process: starts one under SOCKET_ROOT, prints `ready`, waits to be killed."""

import asyncio
import sys

import peer.dht_child
from experts.uid import RunId
from peer.supervisor import DhtSettings, DhtSupervisor


async def main() -> None:
    supervisor = DhtSupervisor.spawn()
    await supervisor.start(DhtSettings(RunId("5" * 32)), timeout_s=30)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    peer.dht_child.SOCKET_ROOT = sys.argv[1]
    asyncio.run(main())
