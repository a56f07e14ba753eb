"""One call on the compute thread: what is computed, kept, applied once, refused."""

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
from peer.requests import Request
from peer.tensors import Role, decode, encode
from peer.transport import CallRefused, Method, PeerId, Refusal
from peer.wire_codecs import Codec

D = 8
ANNE, BETH = PeerId("anne"), PeerId("beth")
X_UD = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
ROW_INDEX_N = torch.tensor([0, 3, 1, 2, 3, 4, 0], dtype=torch.int32)
GRAD_ND = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
EXPERTS = (ExpertRows(2, 3), ExpertRows(0, 4))
"""Seven pairs of experts 0.2 and 0.0 over five rows."""
SHARED = {
    Role.ROWS: encode(X_UD, Role.ROWS, Codec.RAW),
    Role.ROW_INDEX: encode(ROW_INDEX_N, Role.ROW_INDEX, Codec.RAW),
}
_ids = count(1)


def compute(*, max_staleness: int = 8, kept_bytes: int = 1 << 20, hosted: int = 3) -> ExpertCompute:
    bank = ExpertBank(ExpertShape(dim=D, hidden=16), ExpertOptimizerSettings(), device=torch.device("cpu"), seed=4)
    for index in range(hosted):
        bank.add(ExpertUid(0, index))
    memory = Memory(kept_bytes=kept_bytes, kept_lifetime_s=20.0, reply_bytes=1 << 20)
    return ExpertCompute(
        bank, device=torch.device("cpu"), max_staleness=max_staleness, longest_sequence=64, memory=memory
    )


def forward(**changes: object) -> Call:
    fields = {
        "call_id": next(_ids).to_bytes(16, "big"),
        "run_id": RunId("run"),
        "mode": Mode.TRAIN,
        "layer": 0,
        "experts": EXPERTS,
        "reply_codec": Codec.RAW,
        "timeout_s": 1.0,
        "tensors": SHARED,
    }
    return Call(**(fields | changes))


def backward(of: Call, *, resends: bool = False, grad_ND: Tensor = GRAD_ND, **changes: object) -> Call:
    gradients = {Role.GRADIENTS: encode(grad_ND, Role.GRADIENTS, Codec.RAW)}
    tensors = gradients | dict(of.tensors) if resends else gradients
    return replace(of, **({"tensors": tensors, "loss_tokens": 10.0} | changes))


def ask(peer: ExpertCompute, method: Method, call: Call, *, caller: PeerId = ANNE, now_s: float = 0.0) -> GroupReply:
    (part,) = peer.answer([Request(method, caller, call)], now_s=now_s)
    if isinstance(part.result, Exception):
        raise part.result
    return part.result


def there_and_back(peer: ExpertCompute, call: Call | None = None, **changes: object) -> GroupReply:
    call = call or forward()
    ask(peer, Method.FORWARD, call)
    return ask(peer, Method.BACKWARD, backward(call, **changes))


def outcomes(reply: GroupReply) -> dict[int, Outcome]:
    return {expert.index: expert.outcome for expert in reply.experts}


def versions(peer: ExpertCompute) -> list[int]:
    return [peer.bank.version(uid) for uid in peer.bank.uids]


def values(reply: GroupReply) -> Tensor:
    assert reply.tensor is not None
    return decode(reply.tensor)


def weights(peer: ExpertCompute) -> Tensor:
    return torch.cat([tensor.flatten() for uid in peer.bank.uids for tensor in peer.bank.state(uid).weights.values()])


def make_infinite(peer: ExpertCompute, uid: ExpertUid) -> None:
    """Weights that are finite and give what is not."""
    state = peer.bank.state(uid)
    huge = {name: torch.full_like(tensor, 1e17) for name, tensor in state.weights.items()}
    peer.bank.load(uid, ExpertState(huge, state.moments, state.clock))


# ---- forward


def test_a_forward_answers_every_pair_with_its_experts_output_of_the_row_it_reads() -> None:
    peer = compute()

    reply = ask(peer, Method.FORWARD, forward())

    x_ND = X_UD[ROW_INDEX_N.long()]
    expected_ND = peer.bank.forward(x_ND, [ExpertUid(0, 2), ExpertUid(0, 0)], [3, 4], keep_graph=False).out_ND
    assert torch.equal(values(reply), expected_ND)
    assert [(expert.index, expert.outcome, expert.version) for expert in reply.experts] == [
        (2, Outcome.OK, 0),
        (0, Outcome.OK, 0),
    ]


def test_rows_that_travel_once_and_rows_that_travel_per_pair_give_the_same() -> None:
    shared, spread = compute(), compute()
    x_ND = X_UD[ROW_INDEX_N.long()]
    per_pair = forward(tensors={Role.ROWS: encode(x_ND, Role.ROWS, Codec.RAW)})
    by_row = forward()
    out_shared, out_spread = ask(shared, Method.FORWARD, by_row), ask(spread, Method.FORWARD, per_pair)

    grad_UD = values(ask(shared, Method.BACKWARD, backward(by_row)))
    grad_ND = values(ask(spread, Method.BACKWARD, backward(per_pair)))

    assert torch.equal(values(out_shared), values(out_spread))
    torch.testing.assert_close(grad_UD, torch.zeros(5, D).index_add(0, ROW_INDEX_N, grad_ND))
    assert torch.equal(weights(shared), weights(spread))


def test_an_expert_that_is_not_here_is_said_so_and_the_others_answer() -> None:
    whole, half = compute(), compute(hosted=1)
    call = forward()

    reply = ask(half, Method.FORWARD, call)
    gradient = ask(half, Method.BACKWARD, backward(call, experts=(ExpertRows(0, 4),), grad_ND=GRAD_ND[3:]))

    assert outcomes(reply) == {2: Outcome.UNKNOWN_EXPERT, 0: Outcome.OK}
    torch.testing.assert_close(values(reply), values(ask(whole, Method.FORWARD, call))[3:])
    assert values(gradient).shape == X_UD.shape
    assert not values(gradient)[1].any()  # only the other expert's pair reads this row
    assert versions(half) == [1]


def test_a_call_for_strangers_only_has_no_tensor() -> None:
    peer = compute(hosted=0)

    reply = ask(peer, Method.FORWARD, forward())

    assert outcomes(reply) == {2: Outcome.UNKNOWN_EXPERT, 0: Outcome.UNKNOWN_EXPERT}
    assert reply.tensor is None


def test_an_expert_whose_output_is_not_finite_takes_no_other_with_it() -> None:
    peer, healthy = compute(), compute()
    make_infinite(peer, ExpertUid(0, 2))
    call = forward()

    reply = ask(peer, Method.FORWARD, call)
    gradient = ask(peer, Method.BACKWARD, backward(call, experts=(ExpertRows(0, 4),), grad_ND=GRAD_ND[3:]))

    assert outcomes(reply) == {2: Outcome.NON_FINITE, 0: Outcome.OK}
    torch.testing.assert_close(values(reply), values(ask(healthy, Method.FORWARD, call))[3:])
    assert outcomes(gradient) == {0: Outcome.OK}
    assert versions(peer) == [1, 0, 0]


def test_when_no_output_is_finite_there_is_no_tensor_and_nothing_to_go_back_to() -> None:
    peer = compute()
    make_infinite(peer, ExpertUid(0, 2))
    make_infinite(peer, ExpertUid(0, 0))
    call = forward()

    reply = ask(peer, Method.FORWARD, call)

    assert set(outcomes(reply).values()) == {Outcome.NON_FINITE}
    assert reply.tensor is None
    assert outcomes(ask(peer, Method.BACKWARD, backward(call))) == {
        2: Outcome.MISSING_INPUTS,
        0: Outcome.MISSING_INPUTS,
    }


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(poison: float) -> None:
    x_UD = X_UD.clone()
    x_UD[2, 3] = poison
    rows = encode(x_UD, Role.ROWS, Codec.RAW)

    with pytest.raises(CallRefused, match="ROWS holds NaN or infinity") as refused:
        ask(compute(), Method.FORWARD, forward(tensors=SHARED | {Role.ROWS: rows}))

    assert refused.value.refusal is Refusal.INVALID


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_index_outside_the_rows_is_refused(wrong: int) -> None:
    row_index_N = ROW_INDEX_N.clone()
    row_index_N[4] = wrong
    index = encode(row_index_N, Role.ROW_INDEX, Codec.RAW)

    with pytest.raises(CallRefused, match=f"reads row {wrong} of 5") as refused:
        ask(compute(), Method.FORWARD, forward(tensors=SHARED | {Role.ROW_INDEX: index}))

    assert refused.value.refusal is Refusal.INVALID


def test_row_gradients_in_int8_are_rounded_at_random_by_the_calls_id() -> None:
    def row_gradients(call_id: bytes) -> bytes:
        reply = there_and_back(compute(), forward(call_id=call_id), reply_codec=Codec.INT8)
        assert reply.tensor is not None
        return bytes(reply.tensor.data)

    once, again, other = (row_gradients(call_id) for call_id in (b"1" * 16, b"1" * 16, b"2" * 16))

    assert once == again
    assert once != other


# ---- evaluation


def test_an_eval_call_keeps_nothing_changes_no_version_and_counts_nowhere() -> None:
    peer = compute()
    before = weights(peer)
    call = forward(mode=Mode.EVAL)

    reply = ask(peer, Method.FORWARD, call)

    assert torch.equal(values(reply), values(ask(compute(), Method.FORWARD, forward())))
    assert peer.kept_bytes == 0
    assert not peer.rows_served
    assert versions(peer) == [0, 0, 0]
    assert torch.equal(weights(peer), before)
    assert set(outcomes(ask(peer, Method.BACKWARD, backward(call))).values()) == {Outcome.MISSING_INPUTS}


def test_training_rows_are_counted_by_expert() -> None:
    peer = compute()

    ask(peer, Method.FORWARD, forward())
    ask(peer, Method.FORWARD, forward(experts=(ExpertRows(2, 7),)))

    assert peer.rows_served == {ExpertUid(0, 2): 10, ExpertUid(0, 0): 4}


# ---- exactly once


def test_a_backward_teaches_each_expert_it_names_one_step() -> None:
    peer = compute()

    reply = there_and_back(peer)

    assert [(expert.index, expert.outcome, expert.version) for expert in reply.experts] == [
        (2, Outcome.OK, 1),
        (0, Outcome.OK, 1),
    ]
    assert versions(peer) == [1, 0, 1]


def test_the_same_backward_sent_twice_applies_once_and_gets_the_same_reply() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call)
    first = ask(peer, Method.BACKWARD, backward(call), now_s=1.0)
    after_first = weights(peer)

    second = ask(peer, Method.BACKWARD, backward(call, resends=True), now_s=30.9)

    assert torch.equal(values(second), values(first))
    assert second.experts == first.experts
    assert torch.equal(weights(peer), after_first)


def test_when_the_reply_is_gone_a_repeated_backward_hears_that_it_was_applied() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call)
    ask(peer, Method.BACKWARD, backward(call), now_s=1.0)
    after_first = weights(peer)

    late = ask(peer, Method.BACKWARD, backward(call, resends=True), now_s=100.0)

    assert outcomes(late) == {2: Outcome.ALREADY_APPLIED, 0: Outcome.ALREADY_APPLIED}
    assert late.tensor is None
    assert torch.equal(weights(peer), after_first)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_inputs_that_are_gone_are_asked_for_and_sent_again_under_the_same_id_give_the_same(kept_bytes: int) -> None:
    remembers, forgets = compute(), compute(kept_bytes=kept_bytes)
    call = forward()
    expected = there_and_back(remembers, call)
    ask(forgets, Method.FORWARD, call)
    missed = ask(forgets, Method.BACKWARD, backward(call), now_s=20.0)
    assert outcomes(missed) == {2: Outcome.MISSING_INPUTS, 0: Outcome.MISSING_INPUTS}
    assert versions(forgets) == [0, 0, 0]

    reply = ask(forgets, Method.BACKWARD, backward(call, resends=True), now_s=20.0)

    assert torch.equal(values(reply), values(expected))
    assert torch.equal(weights(forgets), weights(remembers))


def test_kept_inputs_count_all_that_is_kept() -> None:
    peer = compute()

    ask(peer, Method.FORWARD, forward())

    rows_and_outputs = 2 * GRAD_ND.nbytes
    assert peer.kept_bytes > rows_and_outputs


def test_another_caller_cannot_reach_kept_inputs() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call, caller=ANNE)

    reply = ask(peer, Method.BACKWARD, backward(call), caller=BETH)

    assert set(outcomes(reply).values()) == {Outcome.MISSING_INPUTS}
    assert set(outcomes(ask(peer, Method.BACKWARD, backward(call), caller=ANNE)).values()) == {Outcome.OK}


def test_another_callers_backward_of_the_same_id_does_not_count_as_applied() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call, caller=BETH)
    ask(peer, Method.FORWARD, call, caller=ANNE)
    ask(peer, Method.BACKWARD, backward(call), caller=BETH)

    reply = ask(peer, Method.BACKWARD, backward(call), caller=ANNE)

    assert set(outcomes(reply).values()) == {Outcome.OK}
    assert versions(peer) == [2, 0, 2]


@pytest.mark.parametrize(
    "experts",
    [
        (ExpertRows(0, 4), ExpertRows(2, 3)),
        (ExpertRows(2, 4), ExpertRows(0, 3)),
        (ExpertRows(1, 3), ExpertRows(0, 4)),
        (ExpertRows(2, 3), ExpertRows(1, 4)),
    ],
    ids=["another order", "other counts", "an expert it did not ask", "another expert it did not ask"],
)
def test_a_backward_that_is_not_its_forwards_is_refused_and_teaches_nothing(experts: tuple[ExpertRows, ...]) -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call)

    with pytest.raises(CallRefused, match="its forward did not have") as refused:
        ask(peer, Method.BACKWARD, backward(call, experts=experts))

    assert refused.value.refusal is Refusal.INVALID
    assert versions(peer) == [0, 0, 0]


def test_a_backward_of_many_experts_is_held_against_its_forward_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    num_experts, compared = 60, 0
    peer = compute(hosted=num_experts)
    experts = tuple(ExpertRows(index, 1) for index in range(num_experts))
    x_ND = torch.zeros(num_experts, D)
    call = forward(experts=experts, tensors={Role.ROWS: encode(x_ND, Role.ROWS, Codec.RAW)})
    ask(peer, Method.FORWARD, call)
    equal = ExpertUid.__eq__

    def counting(one: ExpertUid, other: object) -> bool:
        nonlocal compared
        compared += 1
        return equal(one, other)

    monkeypatch.setattr(ExpertUid, "__eq__", counting)
    reply = ask(peer, Method.BACKWARD, backward(call, grad_ND=x_ND))

    assert set(outcomes(reply).values()) == {Outcome.OK}
    assert compared < 20 * num_experts


def test_a_backward_of_another_layer_than_its_forward_is_refused() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call)

    with pytest.raises(CallRefused):
        ask(peer, Method.BACKWARD, backward(call, layer=1))


def test_after_a_refused_backward_the_right_one_is_applied() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call)
    with pytest.raises(CallRefused):
        ask(peer, Method.BACKWARD, backward(call, grad_ND=torch.full_like(GRAD_ND, torch.nan)))

    reply = ask(peer, Method.BACKWARD, backward(call, resends=True))

    assert set(outcomes(reply).values()) == {Outcome.OK}
    assert versions(peer) == [1, 0, 1]


def test_gradients_that_are_not_finite_are_refused_and_teach_nothing() -> None:
    peer = compute()

    with pytest.raises(CallRefused, match="GRADIENTS holds NaN or infinity"):
        there_and_back(peer, grad_ND=torch.full_like(GRAD_ND, torch.nan))

    assert versions(peer) == [0, 0, 0]


def test_a_backward_may_leave_experts_out() -> None:
    peer, other = compute(), compute()
    there_and_back(
        other,
        forward(experts=(ExpertRows(2, 3),), tensors={**SHARED, Role.ROW_INDEX: head_of_index(3)}),
        grad_ND=GRAD_ND[:3],
    )

    reply = there_and_back(peer, experts=(ExpertRows(2, 3),), grad_ND=GRAD_ND[:3])

    assert outcomes(reply) == {2: Outcome.OK}
    assert versions(peer) == [0, 0, 1]
    assert torch.equal(weights(peer), weights(other))


def head_of_index(num_pairs: int):
    return encode(ROW_INDEX_N[:num_pairs], Role.ROW_INDEX, Codec.RAW)


# ---- staleness


def step_in_between(peer: ExpertCompute, index: int, *, times: int = 1) -> None:
    for _ in range(times):
        there_and_back(peer, forward(experts=(ExpertRows(index, 7),)))


def test_a_backward_whose_expert_has_moved_on_too_far_is_refused_as_stale_and_teaches_nothing() -> None:
    peer = compute(max_staleness=1)
    call = forward(experts=(ExpertRows(2, 7),))
    ask(peer, Method.FORWARD, call)
    step_in_between(peer, 2, times=2)
    before = weights(peer)

    reply = ask(peer, Method.BACKWARD, backward(call))

    assert [(expert.outcome, expert.version) for expert in reply.experts] == [(Outcome.STALE, 2)]
    assert reply.tensor is None
    assert torch.equal(weights(peer), before)


def test_staleness_up_to_the_bound_is_recomputed_with_the_present_expert() -> None:
    peer, fresh = compute(max_staleness=1), compute()
    call = forward(experts=(ExpertRows(2, 7),))
    ask(peer, Method.FORWARD, call)
    step_in_between(peer, 2)
    step_in_between(fresh, 2)
    recomputed = peer.kept_counts.passes_recomputed

    reply = ask(peer, Method.BACKWARD, backward(call))

    assert set(outcomes(reply).values()) == {Outcome.OK}
    assert peer.kept_counts.passes_recomputed == recomputed + 1
    assert torch.equal(values(reply), values(there_and_back(fresh, forward(experts=(ExpertRows(2, 7),)))))
    assert torch.equal(weights(peer), weights(fresh))


def test_one_stale_expert_takes_no_other_with_it() -> None:
    peer = compute(max_staleness=0)
    call = forward()
    ask(peer, Method.FORWARD, call)
    step_in_between(peer, 2)

    reply = ask(peer, Method.BACKWARD, backward(call))

    assert outcomes(reply) == {2: Outcome.STALE, 0: Outcome.OK}
    assert versions(peer) == [1, 0, 1]
    assert not values(reply)[1].any()  # only the stale expert's pair reads this row
    assert values(reply)[2].any()


def test_an_expert_that_has_left_since_the_forward_is_unknown() -> None:
    peer = compute()
    call = forward()
    ask(peer, Method.FORWARD, call)
    peer.bank.remove(ExpertUid(0, 2))

    reply = ask(peer, Method.BACKWARD, backward(call))

    assert outcomes(reply) == {2: Outcome.UNKNOWN_EXPERT, 0: Outcome.OK}


def test_a_gradient_the_expert_cannot_use_is_said_and_the_others_learn() -> None:
    peer = compute()
    huge_ND = GRAD_ND.clone()
    huge_ND[:3] = 3e38

    reply = there_and_back(peer, grad_ND=huge_ND)

    assert outcomes(reply) == {2: Outcome.NON_FINITE, 0: Outcome.OK}
    assert versions(peer) == [1, 0, 0]
    assert values(reply).isfinite().all()
