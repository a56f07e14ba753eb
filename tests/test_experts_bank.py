"""What a bank promises, whichever way it runs its experts, for built-in kinds and for a user's."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from experts.bank import ExpertBank, ExpertState, Pass
from experts.initial import initial_weights
from experts.registry import expert_kind, register_expert
from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.state import Clock
from experts.uid import ExpertUid, initial_seed

A, B, C, D = (ExpertUid(0, index) for index in range(4))
CPU = torch.device("cpu")
DIM = 8


@register_expert("residual_of_a_user")
class Residual(nn.Module):
    """Two biases that get one and the same gradient tensor, a residual, and an output that autograd saves."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.shift = nn.Parameter(torch.zeros(dim))
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.tanh(x_ND + self.outer(F.relu(self.inner(x_ND))) + (self.shift + self.offset))


@register_expert("scaled_by_a_sum")
class ScaledBySum(nn.Module):
    """Autograd gives its weight one number, expanded."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden) / hidden)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND * self.weight.sum()


WAYS = [("ffn", False), ("ffn", True), ("swiglu", False), ("swiglu", True), ("residual_of_a_user", False)]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{'grouped' if way[1] else 'one_by_one'}")
def way(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return request.param


def bank_of(way: tuple[str, bool], uids: Iterable[ExpertUid] = (A, B, C), **settings: object) -> ExpertBank:
    kind, grouped = way
    optimizer = ExpertOptimizerSettings.model_validate(settings)
    bank = ExpertBank(ExpertShape(kind=kind, dim=DIM, hidden=16), optimizer, device=CPU, seed=5, grouped=grouped)
    for uid in uids:
        bank.add(uid)
    return bank


def rows(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed))


def learn(bank: ExpertBank, uids: tuple[ExpertUid, ...], counts: tuple[int, ...], *, seed: int = 0) -> Pass:
    """One forward, backward and step."""
    pass_ = bank.forward(rows(sum(counts), seed), uids, counts, keep_graph=True)
    bank.backward(pass_, rows(sum(counts), seed + 1), loss_tokens=4.0)
    bank.step(uids)
    return pass_


def identical(first: ExpertState, second: ExpertState) -> bool:
    pairs = ((first.weights, second.weights), (first.moments, second.moments))
    same = all(one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) for one, two in pairs)
    return same and first.clock == second.clock


def module_with(state: ExpertState, kind: str) -> nn.Module:
    module = expert_kind(kind).build(ExpertShape(kind=kind, dim=DIM, hidden=16))
    module.load_state_dict(dict(state.weights))
    return module


def test_fresh_experts_are_the_same_on_every_bank_in_any_order(way: tuple[str, bool]) -> None:
    first, second = bank_of(way, (A, B, C)), bank_of(way, (C, A))

    expected = initial_weights(expert_kind(way[0]), ExpertShape(kind=way[0], dim=DIM, hidden=16), initial_seed(5, A))
    assert identical(first.state(A), second.state(A))
    assert identical(first.state(C), second.state(C))
    assert all(torch.equal(first.state(A).weights[name], expected[name]) for name in expected)
    assert first.uids == (A, B, C)
    assert [first.version(uid) for uid in first.uids] == [0, 0, 0]


@pytest.mark.parametrize("counts", [(3, 2, 4), (0, 5, 0), (1, 0, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("uids", [(A, B, C), (C, A, B)], ids=["in_order", "permuted"])
def test_a_pass_and_its_backward_equal_the_modules(
    way: tuple[str, bool], uids: tuple[ExpertUid, ...], counts: tuple[int, ...]
) -> None:
    bank = bank_of(way, name="sgd", learning_rate=1.0, clip_norm=None)
    modules = {uid: module_with(bank.state(uid), way[0]) for uid in uids}
    x_ND, grad_ND = rows(sum(counts), 1), rows(sum(counts), 2)
    leaf_ND = x_ND.clone().requires_grad_()
    expected_ND = torch.cat([modules[uid](part) for uid, part in zip(uids, leaf_ND.split(counts), strict=True)])
    expected_ND.backward(grad_ND / 7.0)
    torch.optim.SGD([p for module in modules.values() for p in module.parameters()], lr=1.0).step()

    pass_ = bank.forward(x_ND, uids, counts, keep_graph=True)
    grad_x_ND = bank.backward(pass_, grad_ND, loss_tokens=7.0)
    steps = bank.step(uids)

    assert leaf_ND.grad is not None
    torch.testing.assert_close(pass_.out_ND, expected_ND.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_x_ND, leaf_ND.grad * 7.0, rtol=1e-5, atol=1e-6)
    assert steps.versions == {uid: 1 for uid, num_rows in zip(uids, counts, strict=True) if num_rows}
    for uid, module in modules.items():
        torch.testing.assert_close(dict(bank.state(uid).weights), module.state_dict(), rtol=1e-5, atol=1e-6)


def test_an_expert_that_is_not_asked_or_has_no_rows_is_not_touched_at_all(way: tuple[str, bool]) -> None:
    bank = bank_of(way, weight_decay=0.5)
    for seed in range(3):
        learn(bank, (A, B, C), (2, 2, 2), seed=seed)
    before = {uid: bank.state(uid) for uid in bank.uids}

    learn(bank, (A, B), (3, 0), seed=9)

    assert not identical(bank.state(A), before[A])
    assert identical(bank.state(B), before[B])
    assert identical(bank.state(C), before[C])


def test_an_expert_waits_for_its_threshold_and_divides_by_all_loss_tokens_it_gathered(way: tuple[str, bool]) -> None:
    together, apart = (
        bank_of(way, (A, B), name="sgd", learning_rate=0.5, clip_norm=None, step_tokens=5) for _ in range(2)
    )
    x_ND, grad_ND = rows(6, 1), rows(6, 2)
    whole = together.forward(x_ND, (A,), (6,), keep_graph=True)
    together.backward(whole, grad_ND, loss_tokens=10.0)
    together.step((A,))

    first = apart.forward(x_ND[:2], (A,), (2,), keep_graph=True)
    apart.backward(first, grad_ND[:2], loss_tokens=4.0)
    early = apart.step((A, B))
    second = apart.forward(x_ND[2:], (A,), (4,), keep_graph=True)
    apart.backward(second, grad_ND[2:], loss_tokens=6.0)
    due = apart.step((A, B))

    assert early.versions == {}
    assert due.versions == {A: 1}
    assert apart.state(A).clock == Clock(version=1, rows_learned=6)
    torch.testing.assert_close(dict(apart.state(A).weights), dict(together.state(A).weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_one_number_expanded_is_gathered_and_stepped(dtype: torch.dtype) -> None:
    shape = ExpertShape(kind="scaled_by_a_sum", dim=DIM, hidden=16)
    bank = ExpertBank(shape, ExpertOptimizerSettings(step_tokens=4), device=CPU, seed=5, compute_dtype=dtype)
    bank.add(A)
    for _ in range(2):
        pass_ = bank.forward(torch.ones(2, DIM), (A,), (2,), keep_graph=True)
        bank.backward(pass_, torch.ones(2, DIM), loss_tokens=1.0)

    steps = bank.step((A,))

    assert steps.versions == {A: 1}
    assert bool((bank.state(A).weights["weight"] < 1 / 16).all())


def test_the_callers_gradient_is_not_written_to(way: tuple[str, bool]) -> None:
    bank = bank_of(way)
    grad_ND = rows(1, 3)
    before_ND = grad_ND.clone()

    pass_ = bank.forward(rows(1), (A,), (1,), keep_graph=True)
    bank.backward(pass_, grad_ND, loss_tokens=100.0)
    bank.step((A,))

    assert torch.equal(grad_ND, before_ND)


def test_a_graph_outlives_steps_of_other_experts_and_gives_the_gradient_of_a_fresh_pass(way: tuple[str, bool]) -> None:
    bank, oracle = bank_of(way), bank_of(way)
    x_ND, grad_ND = rows(5, 1), rows(5, 2)
    kept = bank.forward(x_ND, (A, B), (2, 3), keep_graph=True)
    learn(bank, (C,), (4,), seed=7)
    learn(oracle, (C,), (4,), seed=7)

    was_current = bank.is_current(kept)
    grad_x_ND = bank.backward(kept, grad_ND, loss_tokens=3.0)
    bank.step((A, B))

    fresh = oracle.forward(x_ND, (A, B), (2, 3), keep_graph=True)
    expected_ND = oracle.backward(fresh, grad_ND, loss_tokens=3.0)
    oracle.step((A, B))
    assert was_current
    torch.testing.assert_close(grad_x_ND, expected_ND, rtol=0, atol=0)
    assert all(identical(bank.state(uid), oracle.state(uid)) for uid in bank.uids)


def test_a_graph_whose_expert_stepped_is_not_used_and_the_present_experts_gradient_comes_back(
    way: tuple[str, bool],
) -> None:
    bank, oracle = bank_of(way, learning_rate=0.1), bank_of(way, learning_rate=0.1)
    x_ND, grad_ND = rows(5, 1), rows(5, 2)
    kept = bank.forward(x_ND, (A, B), (2, 3), keep_graph=True)
    learn(bank, (B,), (4,), seed=7)
    learn(oracle, (B,), (4,), seed=7)

    was_current = bank.is_current(kept)
    grad_x_ND = bank.backward(kept, grad_ND, loss_tokens=3.0)

    fresh = oracle.forward(x_ND, (A, B), (2, 3), keep_graph=True)
    assert not was_current
    assert kept.versions == (0, 0)
    assert fresh.versions == (0, 1)
    torch.testing.assert_close(grad_x_ND, oracle.backward(fresh, grad_ND, loss_tokens=3.0), rtol=1e-6, atol=1e-7)


def test_two_passes_in_flight_have_a_graph_each(way: tuple[str, bool]) -> None:
    bank, oracle = bank_of(way), bank_of(way)
    passes = [bank.forward(rows(4, seed), (A, B), (2, 2), keep_graph=True) for seed in (1, 2)]

    grads = [bank.backward(pass_, rows(4, 3), loss_tokens=1.0) for pass_ in passes]

    for seed, grad_x_ND in zip((1, 2), grads, strict=True):
        alone = oracle.forward(rows(4, seed), (A, B), (2, 2), keep_graph=True)
        torch.testing.assert_close(grad_x_ND, oracle.backward(alone, rows(4, 3), loss_tokens=1.0), rtol=0, atol=0)


def test_an_expert_that_left_and_came_back_with_its_old_version_does_not_revive_a_graph(way: tuple[str, bool]) -> None:
    bank = bank_of(way)
    kept = bank.forward(rows(2), (A,), (2,), keep_graph=True)

    bank.remove(A)
    while_gone = bank.is_current(kept)
    bank.add(A)
    after_return = bank.is_current(kept)

    assert kept.versions == (bank.version(A),)
    assert not while_gone
    assert not after_return


def test_without_a_graph_autograd_is_not_involved_and_a_backward_computes_again(way: tuple[str, bool]) -> None:
    bank = bank_of(way)
    with_graph = bank.forward(rows(4), (A, B), (2, 2), keep_graph=True)
    without = bank.forward(rows(4), (A, B), (2, 2), keep_graph=False)

    assert with_graph.graph_bytes > 0
    assert (without.graphs, without.graph_bytes) == (None, 0)
    assert not without.out_ND.requires_grad
    assert not bank.is_current(without)
    torch.testing.assert_close(
        bank.backward(without, rows(4, 1), loss_tokens=1.0),
        bank.backward(with_graph, rows(4, 1), loss_tokens=1.0),
        rtol=0,
        atol=0,
    )
    assert not bank.is_current(with_graph)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped_and_named_and_poisons_nothing(
    way: tuple[str, bool], poison: float
) -> None:
    bank, oracle = bank_of(way, step_tokens=4), bank_of(way, step_tokens=4)
    for one in (bank, oracle):
        before = one.forward(rows(4, 1), (A, B), (2, 2), keep_graph=True)
        one.backward(before, rows(4, 2), loss_tokens=1.0)
    grad_ND = rows(4, 3)
    bad_ND = grad_ND.clone()
    bad_ND[0, 0] = poison

    grad_x_ND = bank.backward(bank.forward(rows(4), (A, B), (2, 2), keep_graph=True), bad_ND, loss_tokens=1.0)
    steps, again = bank.step((A, B)), bank.step((A, B))
    expected_ND = oracle.backward(oracle.forward(rows(4), (B,), (4,), keep_graph=True), grad_ND, loss_tokens=1.0)

    assert steps.versions == {B: 1}
    assert steps.non_finite == {A}
    assert again.non_finite == frozenset()
    assert torch.equal(grad_x_ND[:2], torch.zeros(2, DIM))
    torch.testing.assert_close(grad_x_ND[2:], expected_ND[2:], rtol=1e-5, atol=1e-6)
    bank.backward(bank.forward(rows(2), (A,), (2,), keep_graph=True), rows(2), loss_tokens=1.0)
    assert bank.step((A,)).versions == {A: 1}  # what it had gathered before still counts


def test_a_state_loaded_elsewhere_goes_on_exactly_where_it_was(way: tuple[str, bool]) -> None:
    origin = bank_of(way)
    for seed in range(3):
        learn(origin, (A, B, C), (2, 2, 2), seed=seed)
    other = bank_of(way, (D, B))  # B is replaced, A is new there

    for uid in (A, B):
        other.load(uid, origin.state(uid))
    for bank in (origin, other):
        learn(bank, (A, B), (3, 3), seed=8)

    assert other.version(A) == 4
    assert identical(other.state(A), origin.state(A))
    assert identical(other.state(B), origin.state(B))


def test_a_copied_state_does_not_change_while_the_expert_learns(way: tuple[str, bool]) -> None:
    bank = bank_of(way)
    state = bank.state(A)

    learn(bank, (A,), (3,))

    assert identical(state, bank_of(way).state(A))


def test_adding_and_removing_disturbs_neither_other_experts_nor_their_graphs(way: tuple[str, bool]) -> None:
    bank, oracle = bank_of(way), bank_of(way)
    learn(bank, (A, B, C), (2, 2, 2))
    learn(oracle, (A, B, C), (2, 2, 2))
    kept = bank.forward(rows(4, 5), (A, C), (2, 2), keep_graph=True)

    bank.remove(B)
    for index in range(10, 20):
        bank.add(ExpertUid(1, index))
        learn(bank, (ExpertUid(1, index),), (2,), seed=index)
    was_current = bank.is_current(kept)
    bank.backward(kept, rows(4, 6), loss_tokens=1.0)
    bank.step((A, C))

    fresh = oracle.forward(rows(4, 5), (A, C), (2, 2), keep_graph=True)
    oracle.backward(fresh, rows(4, 6), loss_tokens=1.0)
    oracle.step((A, C))
    assert was_current
    assert B not in bank.uids
    assert all(identical(bank.state(uid), oracle.state(uid)) for uid in (A, C))


def test_a_bank_knows_whom_it_hosts(way: tuple[str, bool]) -> None:
    bank = bank_of(way, (A, B))
    bank.remove(B)

    assert A in bank
    assert B not in bank
    assert C not in bank


def test_a_slot_used_again_starts_with_a_fresh_expert(way: tuple[str, bool]) -> None:
    bank = bank_of(way)
    learn(bank, (B,), (3,))
    size_bytes = bank.size_bytes()

    bank.remove(B)
    bank.add(B)

    assert identical(bank.state(B), bank_of(way).state(B))
    assert bank.size_bytes() == size_bytes


def test_the_size_is_foretold(way: tuple[str, bool]) -> None:
    bank = bank_of(way, (A, B, C), step_tokens=100)
    bank.backward(bank.forward(rows(6), (A, B, C), (2, 2, 2), keep_graph=True), rows(6), loss_tokens=1.0)

    optimizer = ExpertOptimizerSettings()
    shape = ExpertShape(kind=way[0], dim=DIM, hidden=16)
    assert bank.size_bytes() == 3 * ExpertBank.bytes_per_expert(shape, optimizer)
    assert ExpertBank.bytes_per_expert(shape, optimizer) == 16 * expert_kind(way[0]).num_parameters(shape)


@pytest.mark.parametrize("uids", [(A, B), (A, C), (C, A)], ids=["neighbours", "apart", "backwards"])
def test_what_a_graph_holds_besides_rows_and_experts_is_no_more_than_it_says(
    way: tuple[str, bool], uids: tuple[ExpertUid, ...]
) -> None:
    bank = bank_of(way)
    saved: list[Tensor] = []
    alone = bank.forward(rows(1), (A,), (1,), keep_graph=True)  # on its weights as they lie in the bank
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        pass_ = bank.forward(rows(5), uids, (2, 3), keep_graph=True)

    held = storages([*saved, *kept_by_graphs(pass_)])
    for storage in storages([pass_.x_ND, *kept_by_graphs(alone)]):
        held.pop(storage, None)

    assert 0 < sum(held.values()) <= pass_.graph_bytes


def kept_by_graphs(pass_: Pass) -> list[Tensor]:
    assert pass_.graphs is not None
    return [tensor for graph in pass_.graphs.values() for tensor in (*graph.weights, graph.out_ND)]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, each once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_the_faster_way_is_taken_pass_by_pass() -> None:
    bank = bank_of(("swiglu", True))
    either = ExpertBank(ExpertShape(dim=DIM, hidden=16), ExpertOptimizerSettings(), device=CPU, seed=5)
    for uid in (A, B, C):
        either.add(uid)

    few = either.forward(rows(6), (A, B, C), (2, 2, 2), keep_graph=True)
    many = either.forward(rows(600), (A, B, C), (200, 200, 200), keep_graph=True)

    assert few.graphs is not None
    assert many.graphs is not None
    assert (len(few.graphs), len(many.graphs)) == (1, 3)
    expected = bank.forward(rows(600), (A, B, C), (200, 200, 200), keep_graph=False)
    torch.testing.assert_close(many.out_ND, expected.out_ND, rtol=1e-5, atol=1e-6)


def test_a_shape_that_cannot_be_grouped_runs_one_by_one_and_is_refused_when_asked_to_group() -> None:
    shape = ExpertShape(kind="ffn", dim=6, hidden=10)
    bank = ExpertBank(shape, ExpertOptimizerSettings(), device=CPU, seed=0)
    for uid in (A, B):
        bank.add(uid)

    pass_ = bank.forward(torch.ones(2, 6), (A, B), (1, 1), keep_graph=True)
    bank.backward(pass_, torch.ones(2, 6), loss_tokens=1.0)

    assert bank.step((A, B)).versions == {A: 1, B: 1}
    with pytest.raises(ValueError, match="cannot run as one grouped GEMM"):
        ExpertBank(shape, ExpertOptimizerSettings(), device=CPU, seed=0, grouped=True)


@pytest.mark.hostile
@pytest.mark.parametrize("counts", [(2, 1), (2, 3), (5, -1), (4,)], ids=str)
def test_counts_that_do_not_describe_the_rows_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit 4 rows"):
        bank_of(("ffn", False)).forward(rows(4), (A, B), counts, keep_graph=True)


@pytest.mark.hostile
def test_an_expert_named_twice_or_not_hosted_is_refused() -> None:
    bank = bank_of(("ffn", False))

    with pytest.raises(ValueError, match="do not fit"):
        bank.forward(rows(4), (A, A), (2, 2), keep_graph=True)
    with pytest.raises(KeyError):
        bank.forward(rows(4), (A, D), (2, 2), keep_graph=True)
    with pytest.raises(KeyError):
        bank.remove(D)
    with pytest.raises(ValueError, match="already hosted"):
        bank.add(A)


@pytest.mark.hostile
def test_a_backward_with_an_expert_that_is_gone_gathers_nothing_for_the_others(way: tuple[str, bool]) -> None:
    bank = bank_of(way)
    kept = bank.forward(rows(4), (A, B), (2, 2), keep_graph=True)
    bank.remove(B)

    with pytest.raises(KeyError):
        bank.backward(kept, rows(4), loss_tokens=1.0)

    assert bank.step((A,)).versions == {}


@pytest.mark.hostile
@pytest.mark.parametrize("loss_tokens", [0.0, -1.0, float("nan"), float("inf")])
def test_loss_tokens_that_cannot_divide_are_refused(loss_tokens: float) -> None:
    bank = bank_of(("ffn", False))
    pass_ = bank.forward(rows(2), (A,), (2,), keep_graph=True)

    with pytest.raises(ValueError, match="positive and finite"):
        bank.backward(pass_, rows(2), loss_tokens=loss_tokens)
    with pytest.raises(ValueError, match="do not belong to rows"):
        bank.backward(pass_, rows(3), loss_tokens=1.0)


@pytest.mark.hostile
def test_a_state_that_does_not_fit_is_refused_and_what_was_hosted_stands() -> None:
    bank = bank_of(("ffn", False))
    state = bank.state(A)
    weights, moments = dict(state.weights), dict(state.moments)
    missing = ExpertState(weights, {}, state.clock)
    misshapen = ExpertState({name: weight.t() for name, weight in weights.items()}, moments, state.clock)
    poisoned = ExpertState({**weights, "up_proj.weight": torch.full((16, DIM), torch.nan)}, moments, state.clock)

    for bad, reason in ((missing, "does not have"), (misshapen, "does not have"), (poisoned, "NaN or infinity")):
        with pytest.raises(ValueError, match=reason):
            bank.load(A, bad)

    assert identical(bank.state(A), state)
