"""What a peer finds out about itself at its start, and what it says of it."""

import asyncio
import base64
import random
import time
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from peer.bootstrap import Introduction
from peer.directory import Directory
from peer.identity import Identity
from peer.membership import Membership
from peer.memory_store import MemoryBoard, MemoryStore
from peer.memory_transport import MemoryNetwork
from peer.probing import ProbeAnswerer
from peer.rates import Rates
from peer.records import RECORD_LIFETIME_S, PeerState
from peer.self_measurement import measured_link, tell_chi
from peer.transport import Method
from tests.swarm_scenes import SIX_EXPERTS, peer, rates
from tests.transport_worlds import Member, TestServicer
from tests.virtual_clock import run_virtual


@dataclass
class Swarm:
    """Members that answer probes, and who joins them."""

    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    board: MemoryBoard = field(default_factory=MemoryBoard)

    async def member(self) -> Member:
        identity = Identity.generate()
        member = Member(identity, self.network.transport(identity))
        member.server = await member.transport.serve(TestServicer(ProbeAnswerer().answer), "127.0.0.1:0")
        return member

    async def announced(self, state: PeerState = "online") -> Member:
        member = await self.member()
        record = peer("", state=state).model_copy(
            update={
                "peer_id": member.identity.peer_id,
                "address": member.endpoint.address,
                "certificate_der_b64": base64.b64encode(member.endpoint.certificate_der).decode(),
            }
        )
        store = MemoryStore(member.identity, SIX_EXPERTS.run_id, self.board)
        assert await store.put(record, lifetime_s=RECORD_LIFETIME_S, now_unix_s=time.time())
        return member

    async def joiner(self, introducer: Member) -> Membership:
        identity = Identity.generate()
        store = MemoryStore(identity, SIX_EXPERTS.run_id, self.board)
        directory = Directory(store)
        await directory.refresh_once(time.time())
        told = Introduction(
            peer_id=introducer.endpoint.peer_id,
            address=introducer.endpoint.address,
            certificate_der=introducer.endpoint.certificate_der,
            manifest=SIX_EXPERTS,
            signed_manifest=b"",
            dht_addresses=(),
            software_version="test",
        )
        return Membership(identity, told, self.network.transport(identity), store, directory)

    def num_probes(self, member: Member) -> int:
        return self.network.faults.num_calls(member.identity.peer_id, Method.PROBE)


async def test_an_online_peer_is_measured_rather_than_whoever_introduced_us() -> None:
    swarm = Swarm()
    introducer, online = await swarm.member(), await swarm.announced()
    leaving = await swarm.announced("draining")

    link = await measured_link(await swarm.joiner(introducer), random.Random(0))

    assert link is not None
    assert swarm.num_probes(online) > 0
    assert swarm.num_probes(introducer) == swarm.num_probes(leaving) == 0


async def test_without_a_peer_that_answers_the_introducer_is_measured() -> None:
    swarm = Swarm()
    introducer, dead = await swarm.member(), await swarm.announced()
    swarm.network.faults.take_down(dead.identity.peer_id)

    link = await measured_link(await swarm.joiner(introducer), random.Random(0))

    assert link is not None
    assert swarm.num_probes(introducer) > 0


def test_when_nobody_answers_a_peer_starts_all_the_same_and_soon() -> None:
    async def measure() -> tuple[bool, float]:
        swarm = Swarm()
        introducer, silent = await swarm.member(), await swarm.announced()
        swarm.network.faults.answer_loss = 1.0
        joiner = await swarm.joiner(introducer)
        started_s = asyncio.get_running_loop().time()
        with capture_logs() as said:
            link = await measured_link(joiner, random.Random(0))
        assert [line["event"] for line in said if line["log_level"] == "warning"] == ["link.not_measured"]
        assert swarm.num_probes(silent) == 1
        return link is None, asyncio.get_running_loop().time() - started_s

    is_none, took_s = run_virtual(measure())

    assert is_none
    assert took_s < 2.6


def test_a_narrow_link_is_a_warning_with_what_would_help() -> None:
    with capture_logs() as said:
        tell_chi(SIX_EXPERTS, rates(0.04))

    (line,) = said
    assert (line["log_level"], line["chi"]) == ("warning", 0.04)
    assert line["verdict"].endswith("the device can be busy 4 % of the time")
    assert "transformer blocks" in line["what_would_help"]


@pytest.mark.parametrize("chi", [0.3, 5.0])
def test_any_other_is_one_line(chi: float) -> None:
    with capture_logs() as said:
        tell_chi(SIX_EXPERTS, rates(chi))

    assert [(line["log_level"], line["chi"]) for line in said] == [("info", chi)]


def test_what_was_not_measured_is_not_judged() -> None:
    with capture_logs() as said:
        tell_chi(SIX_EXPERTS, Rates())

    assert said == []
