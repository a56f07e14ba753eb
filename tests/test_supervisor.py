"""The DHT's supervisor and a process that is slow, on a virtual clock."""

import asyncio
from typing import Any, cast

from experts.uid import RunId
from peer.dht_child import DhtChild
from peer.errors import RecordsUnavailable
from peer.supervisor import DhtSettings, DhtSupervisor
from tests.virtual_clock import run_virtual


class SlowChild:
    """Answers as a process on a machine with too much to do: it takes its time to listen, and is no use before."""

    is_running = True
    is_listening = False

    def __init__(self, *, listens_after_s: float) -> None:
        self._listens_after_s = listens_after_s
        self._ended = asyncio.Event()

    async def attach(self) -> None: ...

    async def run(self) -> str:
        await self._ended.wait()
        self.is_running = False
        return "nothing"

    async def request(self, verb: str, **_: Any) -> dict[str, Any] | None:
        if verb == "listen":
            await asyncio.sleep(self._listens_after_s)
            self.is_listening = True
        if not self.is_running or not self.is_listening:
            raise RecordsUnavailable("listen comes first")
        return {"addresses": ["/here"], "neighbours": [], "known": 1}

    def kill(self) -> None:
        self._ended.set()

    hang_up = dispose = kill


def test_a_process_that_takes_its_time_to_listen_is_left_alone() -> None:
    async def start() -> list[str]:
        supervisor = DhtSupervisor(cast("DhtChild", SlowChild(listens_after_s=15.0)))
        await supervisor.start(DhtSettings(RunId("0" * 32)), timeout_s=30.0)
        addresses = supervisor.addresses()
        await supervisor.close()
        return addresses

    assert run_virtual(start()) == ["/here"]
