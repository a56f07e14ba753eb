"""What a coordinator answers to members: who it is, which run, where the DHT is, how fast the way to it is.

It hosts no experts.
"""

from collections.abc import AsyncIterator, Callable, Sequence

from peer.bootstrap import sign_info
from peer.identity import Identity
from peer.probing import ProbeAnswerer
from peer.transport import CallContext, CallRefused, Frame, Refusal
from protos.swarm_pb2 import InfoReply, InfoRequest


class Introducer:
    """A `Servicer` of Info and probes."""

    def __init__(
        self,
        identity: Identity,
        *,
        certificate_der: bytes,
        signed_manifest: bytes,
        dht_addresses: Callable[[], Sequence[str]],
        software_version: str,
    ) -> None:
        self._identity = identity
        self._certificate_der = certificate_der
        self._signed_manifest = signed_manifest
        self._dht_addresses = dht_addresses
        self._software_version = software_version
        self._prober = ProbeAnswerer()

    async def info(self, request: InfoRequest) -> InfoReply:
        return sign_info(
            self._identity,
            request,
            certificate_der=self._certificate_der,
            signed_manifest=self._signed_manifest,
            dht_addresses=self._dht_addresses(),
            software_version=self._software_version,
        )

    async def forward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        raise _HOSTS_NOTHING
        yield b""  # makes it a stream

    async def backward(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        raise _HOSTS_NOTHING
        yield b""

    def probe(self, frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        return self._prober.answer(frames, context)


_HOSTS_NOTHING = CallRefused(Refusal.INVALID, "a coordinator hosts no experts; ask the directory who does")
