"""Keeps this member's DHT process alive: started first, watched, restarted when it dies, gone when we are.

The rest of the process asks it to store and get, and is told RecordsUnavailable while there is nobody to ask. Knows no
record: values are bytes.
"""

import asyncio
import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import structlog

from experts.uid import RunId
from peer.dht_child import DhtChild
from peer.errors import CouldNotJoin, CouldNotListen, RecordsUnavailable
from peer.record_keys import RecordKeys
from peer.records import Kind

log = structlog.get_logger()

_REQUEST_TIMEOUT_S = 5.0
"""hivemind waits 3 s for a node that hangs; then it goes on without it."""
_LISTEN_TIMEOUT_S = 20.0
_JOIN_TIMEOUT_S = 15.0
_STATUS_EVERY_S = 10.0
_STOP_TIMEOUT_S = 1.0
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_REMEMBERED_ADDRESSES = 64

Entry = tuple[str, bytes, float]
"""Subkey, value, expiry on the wall clock."""


@dataclass(frozen=True)
class DhtSettings:
    """Where the node listens and whom it meets first."""

    run_id: RunId
    num_experts: int = 0
    """Of the whole run: how many keys share its peers' records follows from it, so it is every member's."""
    listen_host: str = "127.0.0.1"
    """An IP address; 0.0.0.0 announces every interface's."""
    listen_port: int = 0
    """0: any; then a restarted process has another one."""
    announce_host: str | None = None
    """The IP address others reach us at when a router forwards `listen_port`."""
    initial_peers: Sequence[str] = ()
    """Multiaddresses of members; one that answers is enough. None: the first member of the swarm."""

    def keys(self) -> RecordKeys:
        return RecordKeys(self.run_id, num_experts=self.num_experts)

    def listen_maddr(self) -> str:
        return _maddr(self.listen_host, self.listen_port)

    def announce_maddr(self) -> str | None:
        if self.announce_host is None:
            return None
        if self.listen_port == 0:
            raise ValueError("announcing another address takes a fixed DHT port to forward to")
        return _maddr(self.announce_host, self.listen_port)


class DhtSupervisor:
    """`spawn` before the event loop exists; `start` and everything after belong to the loop."""

    def __init__(self, child: DhtChild) -> None:
        self._child = child
        self._settings: DhtSettings | None = None
        self._life: asyncio.Task[None] | None = None
        self._addresses: list[str] = []
        self._met: list[str] = []
        self._is_up = asyncio.Event()
        self._closing = False

    @classmethod
    def spawn(cls) -> Self:
        """Start the process; it imports hivemind (half a second) while the caller goes on. Blocks for milliseconds."""
        return cls(DhtChild.spawn())

    @property
    def child_pid(self) -> int:
        return self._child.pid

    async def start(self, settings: DhtSettings, *, timeout_s: float) -> None:
        """Listen, and join unless we are the first. Raises CouldNotListen, CouldNotJoin; close it then as well."""
        self._settings = settings
        self._met = list(settings.initial_peers)
        await self._child.attach()
        self._life = asyncio.create_task(self._live(settings), name="dht-supervisor")  # ours until `close` awaits it
        try:
            async with asyncio.timeout(timeout_s):
                await self._listen(settings)
                await self._join(settings.initial_peers)
                await self._look()
            self._is_up.set()
        except TimeoutError:
            raise CouldNotJoin(f"the DHT did not come up in {timeout_s:g} s") from None
        except RecordsUnavailable as error:
            raise CouldNotJoin(f"the DHT did not come up: {error}") from None
        log.info("dht.joined", addresses=self._addresses, initial_peers=len(settings.initial_peers))

    async def store(self, kind: Kind, subkey: str, value: bytes, expires_at_unix_s: float) -> bool:
        """False when refused. Raises RecordsUnavailable."""
        return await self._child.request(
            "store",
            timeout_s=_REQUEST_TIMEOUT_S,
            key=self._keys.of_record(kind, subkey),
            subkey=subkey,
            value=value,
            expires_at_unix_s=expires_at_unix_s,
        )

    async def get(self, kind: Kind) -> list[Entry]:
        """Everything of this kind, checked by our own node's guard. Raises RecordsUnavailable."""
        return await self._child.request("get", timeout_s=_REQUEST_TIMEOUT_S, keys=self._keys.of_kind(kind))

    def addresses(self) -> list[str]:
        """Multiaddresses others can join through; they change when the process is restarted."""
        return list(self._addresses)

    async def close(self) -> None:
        """Leave within `_STOP_TIMEOUT_S`; nothing is left behind. Idempotent, also without `start`."""
        self._closing = True
        if self._life is not None:
            self._child.hang_up()
            if self._child.is_running:
                await asyncio.wait({self._life}, timeout=_STOP_TIMEOUT_S)
            self._life.cancel()
            with suppress(asyncio.CancelledError):
                await self._life
        self._child.dispose()

    @property
    def _keys(self) -> RecordKeys:
        assert self._settings is not None, "start comes first"
        return self._settings.keys()

    async def _live(self, settings: DhtSettings) -> None:
        """One child after the other, until `close`."""
        loop = asyncio.get_running_loop()
        backoff_s = _FIRST_BACKOFF_S
        is_restart = False
        while True:
            born_s = loop.time()
            said = await self._live_once(settings, is_restart=is_restart)
            if self._closing:
                return
            if loop.time() - born_s > _LONGEST_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            log.warning("dht.process_ended", said=said, restart_in_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            is_restart = True

    async def _live_once(self, settings: DhtSettings, *, is_restart: bool) -> str:
        """One child's whole life, and its last words. A machine without room for a child is waited out."""
        try:
            if is_restart:
                self._child = DhtChild.spawn()
                await self._child.attach()
        except OSError as error:
            return f"it could not be started: {error.strerror}"
        async with asyncio.TaskGroup() as tasks:
            tending = tasks.create_task(self._tend(settings, is_restart=is_restart))
            said = await self._child.run()
            tending.cancel()
        return said

    async def _tend(self, settings: DhtSettings, *, is_restart: bool) -> None:
        """Bring a restarted child up, then look after it. A child that does not answer is ended, which restarts it."""
        try:
            if is_restart:
                await self._listen(settings)
                await self._rejoin()
                log.info("dht.process_restarted", addresses=self._addresses)
            await self._is_up.wait()  # what `start` still waits for is slow, not useless
            while True:
                await asyncio.sleep(_STATUS_EVERY_S)
                if await self._look() == 0:
                    await self._rejoin()
        except (RecordsUnavailable, CouldNotListen) as error:
            if not self._closing:  # then it is leaving by itself
                log.warning("dht.process_useless", reason=str(error))
                self._child.kill()

    async def _listen(self, settings: DhtSettings) -> None:
        await self._child.request(
            "listen",
            timeout_s=_LISTEN_TIMEOUT_S,
            run_id=settings.run_id,
            num_experts=settings.num_experts,
            listen_maddr=settings.listen_maddr(),
            announce_maddr=settings.announce_maddr(),
        )
        await self._look()

    async def _join(self, addresses: Sequence[str]) -> None:
        if addresses:
            await self._child.request("join", timeout_s=_JOIN_TIMEOUT_S, addresses=list(addresses))

    async def _rejoin(self) -> None:
        """Nobody there is no reason to stop: we may be the first one back, and ask again at the next look."""
        try:
            await self._join(self._met)
        except CouldNotJoin as error:
            log.warning("dht.alone", reason=str(error))

    async def _look(self) -> int:
        """Note where we and the others can be reached; how many nodes we know."""
        status: dict[str, Any] = await self._child.request("status", timeout_s=_REQUEST_TIMEOUT_S)
        self._addresses = status["addresses"]
        self._met = list(dict.fromkeys([*status["neighbours"], *self._met]))[:_REMEMBERED_ADDRESSES]
        return status["known"]


def _maddr(host: str, port: int) -> str:
    """ValueError unless `host` is an IP address."""
    return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"
