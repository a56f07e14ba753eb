"""Calls that run together: each gets what it would have got alone, and nobody pays for another's faults.

Also answers that leave expert by expert, and passes that do not fit into the device's memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from experts.bank import ExpertBank, ExpertState
from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.uid import ExpertUid, RunId
from peer.expert_compute import ExpertCompute, Memory
from peer.messages import Call, ExpertRows, GroupReply, Mode, Outcome
from peer.opened_calls import OpenedForward
from peer.requests import Request
from peer.tensors import Role, decode, encode
from peer.transport import CallRefused, Method, PeerId, Refusal
from peer.wire_codecs import Codec

D = 8
_ids = count(1)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
    ),
]


def compute(
    *, hosted: int = 4, step_tokens: int = 1, kind: str = "ffn", device: str = "cpu", kept_bytes: int = 1 << 24
) -> ExpertCompute:
    shape = ExpertShape(kind=kind, dim=D, hidden=16)
    # No moments: Adam would turn the last bit of a sum into a whole step where a gradient is all but zero.
    optimizer = ExpertOptimizerSettings(name="sgd", learning_rate=0.1, step_tokens=step_tokens)
    bank = ExpertBank(shape, optimizer, device=torch.device(device), seed=4)
    for index in range(hosted):
        bank.add(ExpertUid(0, index))
    memory = Memory(kept_bytes=kept_bytes, kept_lifetime_s=20.0, reply_bytes=1 << 20)
    return ExpertCompute(bank, device=torch.device(device), max_staleness=8, longest_sequence=64, memory=memory)


def forward(counts: dict[int, int], *, seed: int = 0, caller: str = "anne", **changes: object) -> Request:
    """Random rows for so many pairs of each expert."""
    num_pairs = sum(counts.values())
    x_ND = torch.randn(num_pairs, D, generator=torch.Generator().manual_seed(seed))
    call = Call(
        call_id=next(_ids).to_bytes(16, "big"),
        run_id=RunId("run"),
        mode=Mode.TRAIN,
        layer=0,
        experts=tuple(ExpertRows(index, num_rows) for index, num_rows in counts.items()),
        reply_codec=Codec.RAW,
        timeout_s=1.0,
        tensors={Role.ROWS: encode(x_ND, Role.ROWS, Codec.RAW)},
    )
    return Request(Method.FORWARD, PeerId(caller), replace(call, **changes))


def backward(of: Request, *, loss_tokens: float = 10.0, scale: float = 1.0, version: int = 0) -> Request:
    grad_ND = torch.randn(of.call.num_pairs, D, generator=torch.Generator().manual_seed(of.call.num_pairs)) * scale
    experts = tuple(replace(expert, version=version) for expert in of.call.experts)
    tensors = {Role.GRADIENTS: encode(grad_ND, Role.GRADIENTS, Codec.RAW)}
    call = replace(of.call, tensors=tensors, loss_tokens=loss_tokens, experts=experts)
    return Request(Method.BACKWARD, of.caller, call)


def ask(peer: ExpertCompute, *requests: Request, more: Sequence[bool] = (False,)) -> list[list[GroupReply | Exception]]:
    """The answers, in parts, of requests that came together."""
    said = iter([*more, *[False] * 10])
    answers: list[list[GroupReply | Exception]] = [[] for _ in requests]
    for part in peer.answer(requests, now_s=0.0, more_backwards=lambda: next(said)):
        answers[part.position].append(part.result)
    return answers


def values(answer: Sequence[GroupReply | Exception]) -> Tensor:
    return torch.cat([decode(group.tensor) for group in answer if isinstance(group, GroupReply) and group.tensor])


def outcomes(answer: Sequence[GroupReply | Exception]) -> dict[int, Outcome]:
    return {e.index: e.outcome for group in answer if isinstance(group, GroupReply) for e in group.experts}


def weights(peer: ExpertCompute, index: int = 0) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in peer.bank.state(ExpertUid(0, index)).weights.values()])


def versions(peer: ExpertCompute) -> list[int]:
    return [peer.bank.version(uid) for uid in peer.bank.uids]


def make_infinite(peer: ExpertCompute, index: int) -> None:
    state = peer.bank.state(ExpertUid(0, index))
    huge = {name: torch.full_like(tensor, 1e17) for name, tensor in state.weights.items()}
    peer.bank.load(ExpertUid(0, index), ExpertState(huge, state.moments, state.clock))


def three_calls() -> list[Request]:
    """Of other experts, in other orders, partly the same."""
    return [
        forward({2: 3, 0: 4}, seed=1, caller="anne"),
        forward({0: 5}, seed=2, caller="beth"),
        forward({1: 1, 3: 2, 2: 6}, seed=3, caller="carl"),
    ]


# ---- the same as alone


@pytest.mark.parametrize("device", DEVICES)
def test_forwards_together_get_what_each_would_get_alone(device: str) -> None:
    peer = compute(device=device)
    calls = three_calls()

    together = ask(peer, *calls)

    for call, answer in zip(calls, together, strict=True):
        torch.testing.assert_close(values(answer), values(ask(peer, call)[0]))
        assert set(outcomes(answer).values()) == {Outcome.OK}


@pytest.mark.parametrize("device", DEVICES)
def test_backwards_together_get_what_each_would_get_alone(device: str) -> None:
    calls = three_calls()
    peer = compute(device=device)
    ask(peer, *calls)

    together = ask(peer, *map(backward, calls))

    for call, answer in zip(calls, together, strict=True):
        alone = compute(device=device)
        ask(alone, call)
        torch.testing.assert_close(values(answer), values(ask(alone, backward(call))[0]))


def test_experts_learn_together_what_they_would_learn_before_one_step() -> None:
    calls = [forward({0: 4}, seed=1), forward({0: 6}, seed=2)]
    together, in_turn = compute(), compute(step_tokens=10)
    for peer in (together, in_turn):
        ask(peer, *calls)

    ask(together, *[backward(call, loss_tokens=tokens) for call, tokens in zip(calls, (3.0, 7.0), strict=True)])
    for call, tokens in zip(calls, (3.0, 7.0), strict=True):
        ask(in_turn, backward(call, loss_tokens=tokens))

    assert versions(together) == versions(in_turn) == [1, 0, 0, 0]
    torch.testing.assert_close(weights(together), weights(in_turn))


def test_each_expert_steps_on_its_own_clock_when_calls_run_together() -> None:
    peer = compute(step_tokens=8)
    calls = [forward({0: 4, 1: 4}, seed=1), forward({0: 5, 2: 5}, seed=2)]
    ask(peer, *calls)

    ask(peer, *map(backward, calls))

    assert versions(peer) == [1, 0, 0, 0]


def test_training_and_evaluation_run_together_and_only_training_is_kept_and_counted() -> None:
    peer = compute()
    train, evaluate = forward({0: 3}, seed=1), forward({0: 5}, seed=2, mode=Mode.EVAL)

    ask(peer, train, evaluate)

    assert peer.rows_served == {ExpertUid(0, 0): 3}
    kept, missing = ask(peer, backward(train))[0], ask(peer, backward(evaluate))[0]
    assert outcomes(kept) == {0: Outcome.OK}
    assert outcomes(missing) == {0: Outcome.MISSING_INPUTS}


@pytest.mark.parametrize("kind", ["ffn", "block"])
def test_sequences_stay_whole_when_calls_run_together(kind: str) -> None:
    def call(counts: dict[int, int], lengths: list[int], seed: int) -> Request:
        request = forward(counts, seed=seed)
        if kind == "ffn":
            return request
        sent = encode(torch.tensor(lengths, dtype=torch.int32), Role.LENGTHS, Codec.RAW)
        return replace(request, call=replace(request.call, tensors={**request.call.tensors, Role.LENGTHS: sent}))

    peer = compute(kind=kind)
    calls = [call({1: 5, 0: 4}, [2, 3, 4], 1), call({0: 6, 1: 2}, [6, 1, 1], 2)]

    together = ask(peer, *calls)
    gradients = ask(peer, *map(backward, calls))

    for sent, answer, gradient in zip(calls, together, gradients, strict=True):
        alone = compute(kind=kind)
        torch.testing.assert_close(values(answer), values(ask(alone, sent)[0]))
        torch.testing.assert_close(values(gradient), values(ask(alone, backward(sent))[0]))


# ---- nobody pays for another's faults


def test_rows_that_are_not_finite_spoil_their_own_call_alone() -> None:
    poisoned = encode(torch.full((3, D), torch.nan), Role.ROWS, Codec.RAW)
    good, bad = forward({0: 3}, seed=1), forward({0: 3}, tensors={Role.ROWS: poisoned})

    answered, refused = ask(compute(), good, bad)

    assert outcomes(answered) == {0: Outcome.OK}
    assert isinstance(refused[0], CallRefused)
    assert refused[0].refusal is Refusal.INVALID


def test_an_expert_that_is_not_finite_spoils_its_own_part_of_each_call_alone() -> None:
    peer = compute(kind="swiglu")
    make_infinite(peer, 1)
    calls = [forward({0: 3, 1: 2}, seed=1), forward({0: 4}, seed=2), forward({1: 4}, seed=3)]

    answers = ask(peer, *calls)

    assert [outcomes(answer) for answer in answers] == [
        {0: Outcome.OK, 1: Outcome.NON_FINITE},
        {0: Outcome.OK},
        {1: Outcome.NON_FINITE},
    ]
    assert values(answers[0]).shape == (3, D)


def test_a_gradient_the_experts_cannot_use_costs_only_its_sender_its_answer() -> None:
    peer, without = compute(), compute()
    calls = [forward({0: 4, 1: 2}, seed=1, caller="anne"), forward({0: 5}, seed=2, caller="liar")]
    ask(peer, *calls)
    ask(without, calls[0])

    answers = ask(peer, backward(calls[0]), backward(calls[1], scale=1e38))

    assert outcomes(answers[0]) == {0: Outcome.OK, 1: Outcome.OK}
    assert outcomes(answers[1]) == {0: Outcome.NON_FINITE}
    torch.testing.assert_close(values(answers[0]), values(ask(without, backward(calls[0]))[0]))
    assert versions(peer) == [1, 1, 0, 0]
    torch.testing.assert_close(weights(peer), weights(without))


def test_stale_missing_and_unknown_are_said_to_whom_they_concern() -> None:
    peer = compute(hosted=2)
    calls = [forward({0: 3}, seed=1), forward({0: 3, 3: 2}, seed=2), forward({1: 2}, seed=3)]
    ask(peer, calls[0], calls[1])

    answers = ask(peer, backward(calls[0]), backward(calls[0], version=0), backward(calls[2]))

    assert outcomes(answers[0]) == {0: Outcome.OK}
    assert outcomes(answers[2]) == {1: Outcome.MISSING_INPUTS}


def test_a_backward_that_came_twice_at_once_is_applied_once() -> None:
    peer = compute()
    call = forward({0: 4})
    ask(peer, call)

    first, second = ask(peer, backward(call), backward(call))

    assert torch.equal(values(first), values(second))
    assert versions(peer) == [1, 0, 0, 0]


def test_forwards_that_run_together_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counting(one: object, other: object) -> bool:
        nonlocal compared
        compared += 1
        return one is other

    monkeypatch.setattr(OpenedForward, "__eq__", counting)
    answers = ask(compute(), *(forward({index % 5: 1}) for index in range(10)))  # the bank has no fifth

    assert [outcomes(parts)[index % 5] for index, parts in enumerate(answers)] == (
        [*[Outcome.OK] * 4, Outcome.UNKNOWN_EXPERT] * 2
    )
    assert compared == 0


def test_however_often_a_backward_comes_at_once_all_are_told_the_same() -> None:
    peer = compute()
    call, other = forward({0: 1}), forward({1: 1})
    ask(peer, call)

    answers = ask(peer, *[backward(call)] * 2000, *[backward(other)] * 2)

    assert all(parts == answers[0] for parts in answers[:2000])
    assert outcomes(answers[0]) == {0: Outcome.OK}
    assert [outcomes(parts) for parts in answers[2000:]] == [{1: Outcome.MISSING_INPUTS}] * 2
    assert versions(peer) == [1, 0, 0, 0]


# ---- steps and graphs


def test_backwards_that_follow_each_other_at_once_use_their_graphs_and_step_once() -> None:
    peer = compute()
    calls = [forward({0: 100}, seed=1), forward({0: 100}, seed=2)]
    for call in calls:
        ask(peer, call)

    first = ask(peer, backward(calls[0]), more=[True])[0]
    second = ask(peer, backward(calls[1]))[0]

    assert [group.experts[0].version for group in (first[0], second[0]) if isinstance(group, GroupReply)] == [0, 1]
    assert peer.kept_counts.rows_from_graph == 200
    assert peer.kept_counts.passes_recomputed == 0


def test_a_step_that_was_put_off_is_taken_before_the_next_forward() -> None:
    peer = compute()
    call = forward({0: 4})
    ask(peer, call)
    ask(peer, backward(call), more=[True])
    assert versions(peer)[0] == 0

    ask(peer, forward({1: 2}))

    assert versions(peer)[0] == 1


# ---- expert by expert


def test_a_large_answer_leaves_expert_by_expert_and_each_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.answer_groups.WORTHWHILE_BYTES", 200 * D * 4)
    peer = compute()
    call = forward({3: 200, 0: 130, 1: 130, 2: 130, 9: 4})

    (answer,) = ask(peer, call)

    assert [[expert.index for expert in group.experts] for group in answer if isinstance(group, GroupReply)] == [
        [3],
        [0, 1],
        [2, 9],
    ]
    x_ND = decode(call.call.tensors[Role.ROWS])[:-4]
    uids = [ExpertUid(0, index) for index in (3, 0, 1, 2)]
    expected_ND = peer.bank.forward(x_ND, uids, [200, 130, 130, 130], keep_graph=False).out_ND
    torch.testing.assert_close(values(answer), expected_ND)


def test_a_small_answer_leaves_in_one_piece() -> None:
    (answer,) = ask(compute(), forward({0: 130, 1: 130, 2: 130}))

    assert len(answer) == 1


# ---- out of memory


def run_out_of_memory(
    peer: ExpertCompute, monkeypatch: pytest.MonkeyPatch, *, above_rows: int, passes: list[int] | None = None
) -> None:
    """As a device does whose memory ends at so many rows."""
    run: Callable[..., Tensor] = peer.bank._compute

    def compute(pass_, together, **kwargs):
        span = pass_.span(together)
        if passes is not None:
            passes.append(span.stop - span.start)
        if span.stop - span.start > above_rows:
            if peer.bank._device.type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return run(pass_, together, **kwargs)

    monkeypatch.setattr(peer.bank, "_compute", compute)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_computed_in_pieces_and_gives_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy, tight = compute(device=device), compute(device=device)
    run_out_of_memory(tight, monkeypatch, above_rows=60)
    call = forward({0: 150, 1: 170})

    there, back = ask(tight, call), ask(tight, backward(call))

    torch.testing.assert_close(values(there[0]), values(ask(roomy, call)[0]))
    torch.testing.assert_close(values(back[0]), values(ask(roomy, backward(call))[0]))
    torch.testing.assert_close(weights(tight), weights(roomy))
    assert versions(tight) == versions(roomy)


def test_calls_together_that_do_not_fit_are_answered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy, tight = compute(), compute()
    run_out_of_memory(tight, monkeypatch, above_rows=5)
    calls = three_calls()

    for ours, theirs in zip(ask(tight, *calls), ask(roomy, *calls), strict=True):
        torch.testing.assert_close(values(ours), values(theirs))
    for ours, theirs in zip(ask(tight, *map(backward, calls)), ask(roomy, *map(backward, calls)), strict=True):
        torch.testing.assert_close(values(ours), values(theirs))
    torch.testing.assert_close(weights(tight), weights(roomy))


def test_the_next_pass_is_not_tried_larger_than_what_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, passes = compute(), list[int]()
    run_out_of_memory(peer, monkeypatch, above_rows=60, passes=passes)
    ask(peer, forward({0: 100}))
    passes.clear()

    ask(peer, forward({0: 100}))

    assert passes == [50, 50]


def test_what_does_not_fit_in_any_piece_is_declined_and_the_next_call_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer, call = compute(), forward({0: 100})
    ask(peer, call, forward({1: 1}))  # together, and so without a graph
    with monkeypatch.context() as full:
        run_out_of_memory(peer, full, above_rows=0)
        for refused in (ask(peer, forward({0: 100}))[0][0], ask(peer, backward(call))[0][0]):
            assert isinstance(refused, CallRefused)
            assert refused.refusal is Refusal.OVERLOADED
            assert "no memory for 1 rows" in str(refused)

    assert outcomes(ask(peer, forward({0: 4}))[0]) == {0: Outcome.OK}
    assert versions(peer) == [0, 0, 0, 0]


def test_another_error_of_the_device_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = compute()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(peer.bank, "_compute", fail)

    with pytest.raises(RuntimeError, match="illegal"):
        ask(peer, forward({0: 4}))
