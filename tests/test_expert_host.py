"""The experts of one device behind awaitable methods: hosting, dropping, snapshots, failures, the end."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.bank import ExpertState
from experts.settings import ExpertShape
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid, RunId
from peer.compute_thread import ComputeThreadStopped
from peer.expert_host import ExpertHost
from peer.messages import Call, ExpertRows, GroupReply, Mode, Outcome
from peer.tensors import Role, decode, encode
from peer.transport import CallRefused, Method, PeerId
from peer.wire_codecs import Codec
from tests.swarm import CPU, DIM, tiny_run, uids

ANNE = PeerId("anne")
RUN = tiny_run()
HOSTED = uids("0.0 0.1 1.3")
X_ND = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))


def make_host(snapshots: SnapshotFolder | None = None) -> ExpertHost:
    host = ExpertHost(RUN, device=CPU, snapshots=snapshots, max_experts=10)
    host.start()
    return host


@pytest.fixture
async def host() -> AsyncIterator[ExpertHost]:
    host = make_host()
    await host.host(HOSTED, {})
    yield host
    assert await asyncio.to_thread(host.close, timeout_s=5.0)


def call_of(index: int = 0, *, number: int = 1, tensors: Mapping | None = None, **fields) -> Call:
    return Call(
        **{
            "call_id": number.to_bytes(16, "big"),
            "run_id": RUN.run_id,
            "mode": Mode.TRAIN,
            "layer": 0,
            "experts": (ExpertRows(index, len(X_ND)),),
            "reply_codec": Codec.RAW,
            "timeout_s": 5.0,
            "tensors": tensors or {Role.ROWS: encode(X_ND, Role.ROWS, Codec.RAW)},
            **fields,
        }
    )


def backward_of(call: Call) -> Call:
    gradients = {Role.GRADIENTS: encode(torch.ones_like(X_ND), Role.GRADIENTS, Codec.RAW)}
    return call_of(number=int.from_bytes(call.call_id, "big"), tensors=gradients, loss_tokens=6.0)


async def answer(host: ExpertHost, method: Method, caller: PeerId, call: Call) -> GroupReply:
    (group,) = [group async for group in host.answer(method, caller, call)]
    return group


async def teach(host: ExpertHost, *, number: int = 1) -> torch.Tensor:
    await answer(host, Method.FORWARD, ANNE, call_of(number=number))
    reply = await answer(host, Method.BACKWARD, ANNE, backward_of(call_of(number=number)))
    return decode(reply.tensor)


def state_of(host: ExpertHost, uid: ExpertUid) -> ExpertState:
    return host._compute.bank.state(uid)


def assert_same(ours: ExpertState, theirs: ExpertState) -> None:
    assert ours.clock == theirs.clock
    for mine, other in ((ours.weights, theirs.weights), (ours.moments, theirs.moments)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)


class _Blocked:
    """Holds a host's compute thread busy, so that what is asked meanwhile is one batch."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host
        self._entered, self._go_on = threading.Event(), threading.Event()

    def _block(self) -> None:
        self._entered.set()
        self._go_on.wait(10.0)

    async def __aenter__(self) -> None:
        self._blocking = asyncio.ensure_future(self._host._control(self._block))
        await asyncio.to_thread(self._entered.wait, 10.0)

    async def __aexit__(self, *_: object) -> None:
        self._go_on.set()
        await self._blocking


async def test_hosted_experts_are_in_the_statuses_as_of_the_last_call(host: ExpertHost) -> None:
    await teach(host)

    assert [(str(status.uid), status.version, status.rows_served) for status in host.statuses] == [
        ("0.0", 1, 6),
        ("0.1", 0, 0),
        ("1.3", 0, 0),
    ]


async def test_a_call_renews_the_statuses_of_its_own_experts_alone(host: ExpertHost) -> None:
    before = host.statuses

    await teach(host)
    await answer(host, Method.FORWARD, ANNE, call_of(4, number=2))  # which is not hosted

    assert host.statuses[0] != before[0]
    assert [now is then for now, then in zip(host.statuses, before, strict=True)] == [False, True, True]


async def test_a_fresh_expert_is_the_same_wherever_it_is_hosted(host: ExpertHost) -> None:
    other = make_host()
    await other.host([HOSTED[1]], {})

    assert_same(state_of(host, HOSTED[1]), state_of(other, HOSTED[1]))
    assert other.close(timeout_s=5.0)


async def test_an_expert_goes_on_elsewhere_exactly_where_its_snapshot_left_it(tmp_path: Path) -> None:
    first = make_host(SnapshotFolder(tmp_path))
    await first.host(HOSTED, {})
    await teach(first, number=1)
    assert await first.save_snapshot({}) == 3

    saved = SnapshotFolder(tmp_path).load_newest(RUN.run_id).states
    second = make_host()
    await second.host(HOSTED, saved)

    for uid in HOSTED:
        assert_same(state_of(second, uid), state_of(first, uid))
    assert second.statuses[0].version == 1
    assert torch.equal(await teach(first, number=2), await teach(second, number=2))
    assert_same(state_of(second, HOSTED[0]), state_of(first, HOSTED[0]))
    assert state_of(second, HOSTED[0]).clock.version == 2
    for host in (first, second):
        assert host.close(timeout_s=5.0)


async def test_without_a_folder_and_without_experts_there_is_nothing_to_save(host: ExpertHost, tmp_path: Path) -> None:
    empty = make_host(SnapshotFolder(tmp_path))

    assert await host.save_snapshot({}) == 0
    assert await empty.save_snapshot({}) == 0

    assert not SnapshotFolder(tmp_path).load_newest(RUN.run_id).states
    assert empty.close(timeout_s=5.0)


async def test_a_dropped_expert_answers_no_more_and_the_others_do(host: ExpertHost) -> None:
    await host.drop(HOSTED[0])

    gone = await answer(host, Method.FORWARD, ANNE, call_of(0))
    here = await answer(host, Method.FORWARD, ANNE, call_of(1))

    assert gone.experts[0].outcome is Outcome.UNKNOWN_EXPERT
    assert here.experts[0].outcome is Outcome.OK
    assert [status.uid for status in host.statuses] == HOSTED[1:]


async def test_what_is_dropped_is_handed_over_as_it_was(host: ExpertHost) -> None:
    await teach(host)
    before = state_of(host, HOSTED[0])

    assert_same(await host.drop(HOSTED[0]), before)


async def test_a_refused_call_is_refused_and_the_host_goes_on(host: ExpertHost) -> None:
    poisoned = encode(torch.full_like(X_ND, torch.nan), Role.ROWS, Codec.RAW)

    with pytest.raises(CallRefused, match="ROWS holds NaN"):
        await answer(host, Method.FORWARD, ANNE, call_of(tensors={Role.ROWS: poisoned}))

    assert (await answer(host, Method.FORWARD, ANNE, call_of())).experts[0].outcome is Outcome.OK


async def test_what_fails_on_the_compute_thread_fails_its_caller_alone(host: ExpertHost) -> None:
    await answer(host, Method.FORWARD, ANNE, call_of())
    async with _Blocked(host):
        asked = [
            asyncio.ensure_future(answer(host, Method.BACKWARD, ANNE, backward_of(call_of()))),
            asyncio.ensure_future(host.host(HOSTED[:1], {})),
            asyncio.ensure_future(answer(host, Method.FORWARD, ANNE, call_of(1, number=2))),
        ]
        await asyncio.sleep(0)  # one turn of the loop: all have queued their work

    applied, failed, answered = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(failed, ValueError)
    assert "already hosted" in str(failed)
    for reply in (applied, answered):
        assert isinstance(reply, GroupReply)
        assert reply.experts[0].outcome is Outcome.OK
    assert host.statuses[0].version == 1


async def test_closing_finishes_what_runs_and_refuses_what_waits() -> None:
    host = make_host()
    await host.host(HOSTED, {})
    async with _Blocked(host):
        waiting = asyncio.ensure_future(answer(host, Method.FORWARD, ANNE, call_of()))
        await asyncio.sleep(0)  # one turn of the loop: it has queued its work
        assert host.queued_rows == len(X_ND)
        assert not host.close(timeout_s=0.0)

    assert await asyncio.to_thread(host.close, timeout_s=5.0)
    with pytest.raises(ComputeThreadStopped):
        await waiting
    with pytest.raises(ComputeThreadStopped):
        await answer(host, Method.FORWARD, ANNE, call_of())


async def test_a_caller_that_gave_up_before_its_turn_teaches_nothing(host: ExpertHost) -> None:
    await answer(host, Method.FORWARD, ANNE, call_of())
    async with _Blocked(host):
        backward = asyncio.ensure_future(answer(host, Method.BACKWARD, ANNE, backward_of(call_of())))
        await asyncio.sleep(0)  # one turn of the loop: it has queued its work
        backward.cancel()
        with pytest.raises(asyncio.CancelledError):
            await backward

    await answer(host, Method.FORWARD, ANNE, call_of(1, number=2))
    assert host.statuses[0].version == 0


async def test_throughput_is_what_was_answered_since_it_was_last_asked(host: ExpertHost) -> None:
    host.take_throughput()
    await answer(host, Method.FORWARD, ANNE, call_of())

    assert host.take_throughput() > 0
    assert host.take_throughput() == 0


async def test_inputs_that_no_backward_came_for_are_forgotten_when_it_is_time(host: ExpertHost) -> None:
    await answer(host, Method.FORWARD, ANNE, call_of())
    assert host.kept_bytes > 0

    await host.forget_expired(now_s=time.monotonic())
    assert host.kept_bytes > 0

    await host.forget_expired(now_s=time.monotonic() + 2 * RUN.wire.step_timeout_s)
    assert host.kept_bytes == 0


async def test_inputs_of_a_declined_call_are_forgotten_though_no_call_follows(host: ExpertHost) -> None:
    await answer(host, Method.FORWARD, ANNE, call_of())
    async with _Blocked(host):
        with pytest.raises(CallRefused):
            await answer(host, Method.BACKWARD, ANNE, replace(backward_of(call_of()), timeout_s=0.0))

    await host.forget_expired(now_s=time.monotonic())

    assert host.kept_bytes == 0


async def test_declined_calls_are_not_remembered_without_end_while_the_device_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peer.expert_host._MAX_DECLINED", 3)
    host = make_host()
    async with _Blocked(host):
        for number in range(1, 6):
            with pytest.raises(CallRefused):
                await answer(host, Method.FORWARD, ANNE, call_of(number=number, timeout_s=0.0))

        assert [int.from_bytes(call_id, "big") for _, call_id in host._declined] == [3, 4, 5]
    assert await asyncio.to_thread(host.close, timeout_s=5.0)


class _SlowFolder(SnapshotFolder):
    """Says when somebody saves, waits to be let go, and minds company."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.entered, self.go_on = threading.Event(), threading.Event()
        self._is_busy = False
        self.had_company = False

    def save(self, states: Mapping[ExpertUid, ExpertState], run_id: RunId) -> None:
        self.had_company = self.had_company or self._is_busy
        self._is_busy = True
        self.entered.set()
        self.go_on.wait(10.0)
        super().save(states, run_id)
        self._is_busy = False


async def test_a_save_that_was_given_up_is_over_before_the_next_begins(tmp_path: Path) -> None:
    folder = _SlowFolder(tmp_path)
    host = make_host(folder)
    await host.host(HOSTED, {})
    given_up = asyncio.ensure_future(host.save_snapshot({}))
    await asyncio.to_thread(folder.entered.wait, 10.0)
    given_up.cancel()

    last = asyncio.ensure_future(host.save_snapshot({}))
    await answer(host, Method.FORWARD, ANNE, call_of())  # by now the states have been copied
    await asyncio.to_thread(int)  # and their writer has begun
    folder.go_on.set()

    assert await last == 3
    assert not folder.had_company
    assert len(SnapshotFolder(tmp_path).load_newest(RUN.run_id).states) == 3
    assert host.close(timeout_s=5.0)


async def test_inputs_are_kept_in_what_the_experts_leave_of_the_memory() -> None:
    large = tiny_run(experts_per_layer=1 << 16, expert=ExpertShape(dim=DIM, hidden=1 << 14))
    host = ExpertHost(large, device=CPU, snapshots=None, max_experts=1 << 17)  # 1.6 TiB in all
    host.start()
    await host.host(uids("0.0"), {})

    reply = await answer(host, Method.FORWARD, ANNE, call_of())

    assert reply.experts[0].outcome is Outcome.OK
    assert host.kept_bytes == 0
    assert await asyncio.to_thread(host.close, timeout_s=5.0)
