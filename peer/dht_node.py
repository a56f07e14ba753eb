"""One node of hivemind's DHT as we use it: join, store, get. Runs in the DHT process.

Everything another node answers is distrusted: records by the guard, the rest of an answer here. hivemind's caches are
off: they would keep what a hostile node says about expiry.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self

from peer.bare_hivemind import (
    P2P,
    ControlFailure,
    DHTNode,
    DHTRecord,
    DictionaryDHTValue,
    Multiaddr,
    PeerID,
    RecordValidatorBase,
    ValidationError,
    ValueWithExpiration,
)
from peer.dht_guard import RecordGuard
from peer.p2pd import CONTROL_SOCKET

_DIAL_TIMEOUT_S = 5.0
_RPC_TIMEOUT_S = 3.0

Entry = tuple[str, bytes, float]
"""Subkey, value, expiry on the wall clock."""


class Node:
    """A joined or joinable node. Belongs to one event loop."""

    def __init__(self, p2p: "_Daemon", node: DHTNode) -> None:
        self._p2p = p2p
        self._node = node

    @classmethod
    async def start(cls, socket_dir: Path, guard: RecordGuard) -> Self:
        """Take up the daemon that listens in `socket_dir`."""

        class Daemon(_Daemon):
            _UNIX_SOCKET_PREFIX = f"/unix{socket_dir}/"

        p2p = await Daemon.replicate(Multiaddr(f"/unix{socket_dir / CONTROL_SOCKET}"))
        assert isinstance(p2p, _Daemon)
        node = await DHTNode.create(
            p2p=p2p,
            record_validator=_Validator(guard),
            wait_timeout=_RPC_TIMEOUT_S,
            cache_locally=False,
            cache_on_store=False,
            cache_nearest=0,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
        )
        _distrust(node)
        return cls(p2p, node)

    async def join(self, addresses: Iterable[str]) -> tuple[int, list[str]]:
        """Meet the nodes at these multiaddresses, all at once: how many let us in, and why the others did not."""
        try:
            dialled = _by_peer(addresses)
        except ValueError as error:
            return 0, [str(error)]
        others = [(peer, maddrs) for peer, maddrs in dialled.items() if peer != self._p2p.peer_id]
        failures = await asyncio.gather(*(self._meet(peer, maddrs) for peer, maddrs in others))
        reasons = [failure for failure in failures if failure is not None]
        num_joined = len(failures) - len(reasons)
        if num_joined:
            await self._node.find_nearest_nodes([self._node.node_id])
        return num_joined, reasons

    async def store(self, key: bytes, subkey: str, value: bytes, expires_at_unix_s: float) -> bool:
        """False when no node took it: refused by the guard, not later than what is held, or nobody answered."""
        return bool(await self._node.store(key, value, expires_at_unix_s, subkey=subkey))

    async def get(self, keys: Iterable[bytes]) -> list[Entry]:
        """What every node responsible for these keys holds under them, the latest per subkey.

        Asked for one by one, at once: of several keys together a node would give one answer, and that has a limit.
        """
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._node.get(key, latest=True)) for key in keys]
        found = [task.result() for task in asked]
        return [
            (subkey, value, expires)
            for dictionary in found
            if dictionary is not None
            for subkey, (value, expires) in dictionary.value.items()
        ]

    async def addresses(self) -> list[str]:
        return [str(maddr) for maddr in await self._p2p.get_visible_maddrs(latest=True)]

    async def neighbours(self) -> list[str]:
        """Multiaddresses of the nodes we are connected to, as seen from here."""
        return [
            f"{maddr}/p2p/{peer.peer_id.to_base58()}" for peer in await self._p2p.list_peers() for maddr in peer.addrs
        ]

    @property
    def num_known(self) -> int:
        """Nodes in the routing table."""
        return len(self._node.protocol.routing_table.uid_to_peer_id)

    async def stop(self) -> None:
        await self._node.shutdown()
        await self._p2p.shutdown()

    async def _meet(self, peer: PeerID, maddrs: list[Multiaddr]) -> str | None:
        where = f"{maddrs[0]}"
        try:
            async with asyncio.timeout(_DIAL_TIMEOUT_S):
                await self._p2p.dial(peer, maddrs)
            if await self._node.protocol.call_ping(peer, validate=True, strict=True) is None:
                return f"{where} does not answer as a DHT node"
        except TimeoutError:
            return f"{where} did not answer in {_DIAL_TIMEOUT_S:.0f} s"
        except ControlFailure:
            return f"{where} cannot be reached"
        except ValidationError as error:
            return f"{where} {_in_words(error)}"
        return None


class _Daemon(P2P):
    """hivemind's client of a p2pd that somebody else runs."""

    async def dial(self, peer: PeerID, maddrs: list[Multiaddr]) -> None:
        """Connect now. Raises ControlFailure."""
        client: Any = self._client
        await client.connect(peer, maddrs)


class _Validator(RecordValidatorBase):
    """The guard as hivemind asks it. Records are sealed before they come here, so nothing is signed or stripped."""

    def __init__(self, guard: RecordGuard) -> None:
        self._guard = guard

    def validate(self, record: DHTRecord) -> bool:
        return self._guard.accepts(
            key_sha1=record.key,
            subkey_msgpack=record.subkey,
            value_msgpack=record.value,
            expires_at_unix_s=record.expiration_time,
        )


def _in_words(error: ValidationError) -> str:
    """hivemind tells these two apart by their text alone."""
    if "local time" in str(error):
        return "has another time: the two clocks differ by more than 3 s; set both by NTP"
    return "cannot reach us back: open our DHT port to it"


def _by_peer(addresses: Iterable[str]) -> dict[PeerID, list[Multiaddr]]:
    """ValueError naming the address that is no multiaddress with a /p2p/ part."""
    grouped: dict[PeerID, list[Multiaddr]] = defaultdict(list)
    for address in addresses:
        transport, separator, name = address.rpartition("/p2p/")
        if not separator:
            raise ValueError(f"{address!r} is not a DHT address: it does not end in /p2p/ID")
        try:
            grouped[PeerID.from_base58(name)].append(Multiaddr(transport))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{address!r} is not a DHT address: {error}") from None
    return grouped


def _distrust(node: DHTNode) -> None:
    """Bound what an answer says beside its records: hivemind would end a search at once on an answer that claims to
    expire at infinity, and let one with a size limit that is no number kill the search."""
    call_find = node.protocol.call_find

    async def call_and_bound(peer: PeerID, keys: Collection[Any]) -> Any:
        answer = await call_find(peer, keys)
        if answer is None:
            return None
        return {key: (bounded(found), nearest) for key, (found, nearest) in answer.items()}

    node.protocol.call_find = call_and_bound


def bounded(found: ValueWithExpiration[Any] | None) -> ValueWithExpiration[Any] | None:
    """The same records with the limits and the expiry that follow from them; none when there are none."""
    if found is None or not isinstance(found.value, DictionaryDHTValue) or not found.value.data:
        return None
    found.value.maxsize = math.inf
    latest = max(item.expiration_time for item in found.value.data.values())
    found.value.latest_expiration_time = latest
    return ValueWithExpiration(found.value, latest)
