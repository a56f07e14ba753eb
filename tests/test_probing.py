"""The probe: what it measures of a link of known speed, and what either end does with a partner that cheats."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from peer.errors import DeadlineExceeded, MalformedReply, PeerOverloaded, RequestRejected
from peer.framing import chunk_frame
from peer.memory_transport import MemoryNetwork
from peer.probing import MAX_PROBE_BYTES, MAX_PROBE_S, MAX_PROBES_AT_ONCE, ProbeAnswerer, measure_link
from peer.rates import MeasuredLink
from peer.transport import CHUNK_BYTES, CallContext, Frame, Method
from protos import swarm_pb2 as pb
from tests.transport_worlds import Answer, Member, World, ask, grpc_world, sending
from tests.virtual_clock import run_virtual

END = pb.ReplyFrame(end=pb.CallEnd()).SerializeToString()
CHUNK = chunk_frame([bytes(CHUNK_BYTES)])


def header(reply_bytes: int = 0) -> Frame:
    return pb.CallFrame(probe=pb.ProbeHeader(reply_bytes=reply_bytes)).SerializeToString()


def paced(answer: Answer, *, up_bits_per_s: float, down_bits_per_s: float, latency_s: float) -> Answer:
    """As if there were a link between."""

    async def act(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        async def come() -> AsyncIterator[Frame]:
            async for frame in frames:
                await asyncio.sleep(8 * len(frame) / up_bits_per_s)
                yield frame

        await asyncio.sleep(latency_s)
        async for reply in answer(come(), context):
            await asyncio.sleep(8 * len(reply) / down_bits_per_s)
            yield reply

    return act


def measured(answer: Answer) -> tuple[MeasuredLink, float]:
    """What the probe says of the way to this servicer, and how long it took, on a virtual clock."""

    async def measure() -> tuple[MeasuredLink, float]:
        world = World(MemoryNetwork().transport)
        peer, caller = await world.serving(answer), world.member()
        started_s = asyncio.get_running_loop().time()
        link = await measure_link(caller.transport, peer.endpoint)
        return link, asyncio.get_running_loop().time() - started_s

    return run_virtual(measure())


@pytest.mark.parametrize(
    ("up_bits_per_s", "down_bits_per_s", "latency_s"),
    [(1e5, 1e6, 0.01), (2e6, 2e7, 0.05), (1e8, 1e8, 0.02), (1e9, 1e8, 0.001), (1e10, 1e10, 0.0)],
)
def test_speed_each_way_and_latency_are_those_of_the_link(
    up_bits_per_s: float, down_bits_per_s: float, latency_s: float
) -> None:
    link, elapsed_s = measured(
        paced(
            ProbeAnswerer().answer,
            up_bits_per_s=up_bits_per_s,
            down_bits_per_s=down_bits_per_s,
            latency_s=latency_s,
        )
    )

    assert link.up_bits_per_s == pytest.approx(up_bits_per_s, rel=0.05)
    assert link.down_bits_per_s == pytest.approx(down_bits_per_s, rel=0.05)
    assert link.latency_ms == pytest.approx(latency_s * 1e3, abs=1)
    assert elapsed_s < 1.6


def test_a_process_that_is_busy_for_a_moment_does_not_make_the_link_slow() -> None:
    """Whatever it was measuring just then."""
    for busy_at in range(1, 14):
        num_probes = 0

        async def answer(
            frames: AsyncIterator[Frame], context: CallContext, *, busy_at: int = busy_at
        ) -> AsyncIterator[Frame]:
            nonlocal num_probes
            num_probes += 1
            if num_probes == busy_at:
                await asyncio.sleep(0.2)
            async for reply in ProbeAnswerer().answer(frames, context):
                yield reply

        link, _ = measured(paced(answer, up_bits_per_s=5e6, down_bits_per_s=5e6, latency_s=0.03))

        assert link.bits_per_s == pytest.approx(5e6, rel=0.25), busy_at


def test_a_far_link_is_measured_as_well_as_there_is_time() -> None:
    slow_start = paced(ProbeAnswerer().answer, up_bits_per_s=1e8, down_bits_per_s=1e8, latency_s=0.2)

    link, elapsed_s = measured(slow_start)

    assert link.latency_ms == pytest.approx(200, abs=1)
    assert 1e7 < link.up_bits_per_s < 2e8
    assert elapsed_s < 2.1


def test_a_link_too_slow_for_the_smallest_probe_is_not_measured() -> None:
    with pytest.raises(DeadlineExceeded):
        measured(paced(ProbeAnswerer().answer, up_bits_per_s=1e4, down_bits_per_s=1e4, latency_s=0.0))


async def test_a_probe_crosses_a_real_socket() -> None:
    world = grpc_world()
    try:
        peer, caller = await world.serving(ProbeAnswerer().answer), world.member()

        link = await measure_link(caller.transport, peer.endpoint, timeout_s=10)
    finally:
        await world.close()

    assert link.bits_per_s > 1e6
    assert link.latency_ms < 1000


@pytest.fixture
async def way() -> AsyncIterator[tuple[Member, Member]]:
    """A caller, and a peer that answers probes."""
    world = World(MemoryNetwork().transport)
    peer, caller = await world.serving(ProbeAnswerer().answer), world.member()
    yield caller, peer
    await world.close()


@pytest.mark.hostile
@pytest.mark.parametrize(
    "frames",
    [
        (),
        (b"",),
        (b"\xff",),
        (CHUNK,),
        (header(), header()),
        (header(), chunk_frame([b""])),
        (header(), b"\xff"),
        (pb.CallFrame(header=pb.CallHeader()).SerializeToString(),),
        (header(MAX_PROBE_BYTES + 1),),
        (header((1 << 32) - 1),),
        (header(), *[CHUNK] * (MAX_PROBE_BYTES // CHUNK_BYTES), chunk_frame([b"x"])),
    ],
    ids=lambda frames: f"{len(frames)} frames of {sum(map(len, frames))} bytes",
)
async def test_what_is_no_probe_or_too_large_a_one_is_refused(
    way: tuple[Member, Member], frames: tuple[Frame, ...]
) -> None:
    caller, peer = way

    with pytest.raises(RequestRejected):
        await ask(caller, peer.endpoint, sending(*frames), method=Method.PROBE)


@pytest.mark.hostile
async def test_chunks_without_end_are_refused_at_the_bound(way: tuple[Member, Member]) -> None:
    caller, peer = way
    num_sent = 0

    async def endless() -> AsyncIterator[Frame]:
        nonlocal num_sent
        yield header()
        while True:
            num_sent += 1
            yield CHUNK

    with pytest.raises(RequestRejected, match="at most"):
        await ask(caller, peer.endpoint, endless(), method=Method.PROBE)
    assert num_sent == MAX_PROBE_BYTES // CHUNK_BYTES + 1


@pytest.mark.hostile
def test_nobody_holds_a_place_for_long() -> None:
    """Neither by sending nothing nor by not reading."""

    async def silent() -> AsyncIterator[Frame]:
        yield header()
        await asyncio.Event().wait()

    async def hold_all() -> float:
        answerer = ProbeAnswerer()
        world = World(MemoryNetwork().transport)
        peer, caller = await world.serving(answerer.answer), world.member()
        clock = asyncio.get_running_loop().time
        context = CallContext(caller.identity.peer_id, deadline_s=clock() + 600)
        unread = [answerer.answer(sending(header(MAX_PROBE_BYTES)), context) for _ in range(MAX_PROBES_AT_ONCE - 1)]
        for replies in unread:
            await anext(replies)
        started_s = clock()
        unsent = asyncio.create_task(ask(caller, peer.endpoint, silent(), method=Method.PROBE, timeout_s=100))
        await asyncio.sleep(1)
        with pytest.raises(PeerOverloaded):
            await ask(caller, peer.endpoint, sending(header()), method=Method.PROBE)
        with pytest.raises(DeadlineExceeded):
            await unsent
        cut_off_after_s = clock() - started_s
        assert await ask(caller, peer.endpoint, sending(header()), method=Method.PROBE) == [END]
        return cut_off_after_s

    assert run_virtual(hold_all()) == pytest.approx(MAX_PROBE_S)


@pytest.mark.hostile
async def test_more_than_a_few_at_once_are_told_to_try_later_and_leave_their_places(way: tuple[Member, Member]) -> None:
    caller, peer = way
    let_go = asyncio.Event()
    holding = asyncio.Semaphore(0)

    async def held() -> AsyncIterator[Frame]:
        yield header()
        holding.release()
        await let_go.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(MAX_PROBES_AT_ONCE):
            tasks.create_task(ask(caller, peer.endpoint, held(), method=Method.PROBE))
            await holding.acquire()
        with pytest.raises(PeerOverloaded):
            await ask(caller, peer.endpoint, sending(header()), method=Method.PROBE)
        let_go.set()

    assert await ask(caller, peer.endpoint, sending(header()), method=Method.PROBE) == [END]


@pytest.mark.hostile
@pytest.mark.parametrize(
    "reply",
    [
        (),
        (END, END),
        (CHUNK, END),
        (CHUNK,) * 64,
        (b"\xff",),
        (pb.ReplyFrame(group=pb.GroupReply()).SerializeToString(),),
    ],
    ids=["nothing", "two ends", "too much", "endless", "nonsense", "another frame"],
)
async def test_an_answer_that_is_none_is_malformed(reply: tuple[Frame, ...]) -> None:
    async def cheat(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        async for _ in frames:
            pass
        for frame in reply:
            yield frame

    world = World(MemoryNetwork().transport)
    peer, caller = await world.serving(cheat), world.member()

    with pytest.raises(MalformedReply):
        await measure_link(caller.transport, peer.endpoint)


@pytest.mark.hostile
async def test_an_answer_with_fewer_bytes_than_asked_for_is_malformed() -> None:
    async def lazy(frames: AsyncIterator[Frame], context: CallContext) -> AsyncIterator[Frame]:
        async for _ in frames:
            pass
        yield END

    world = World(MemoryNetwork().transport)
    peer, caller = await world.serving(lazy), world.member()

    with pytest.raises(MalformedReply, match="ended after 0 of"):
        await measure_link(caller.transport, peer.endpoint)
