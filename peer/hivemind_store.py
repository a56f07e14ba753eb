"""The record store on hivemind's DHT, through this member's DHT process."""

from experts.uid import RunId
from peer.identity import Identity
from peer.sealed_store import SealedStore
from peer.supervisor import DhtSupervisor


class HivemindStore(SealedStore):
    """A `RecordStore` over a started supervisor, which it closes. Belongs to the supervisor's event loop."""

    def __init__(self, identity: Identity, run_id: RunId, supervisor: DhtSupervisor) -> None:
        super().__init__(identity, run_id, supervisor)
        self._supervisor = supervisor

    def addresses(self) -> list[str]:
        return self._supervisor.addresses()

    async def close(self) -> None:
        await self._supervisor.close()
