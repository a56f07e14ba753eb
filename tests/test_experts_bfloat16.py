"""Computing in bfloat16 on float32 weights: how far it may be off, and that nothing is forgotten."""

import pytest
import torch
from torch import Tensor

from experts.bank import ExpertBank
from experts.grouped import can_group
from experts.registry import expert_kind
from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.uid import ExpertUid

A, B = ExpertUid(0, 0), ExpertUid(0, 1)
COUNTS, NUM_ROWS = (24, 40), 64
LENGTHS = (8,) * 8

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def bank_of(kind: str, device: torch.device, dtype: torch.dtype, *, grouped: bool | None = None, **settings: object):
    bank = ExpertBank(
        ExpertShape(kind=kind, dim=32, hidden=64),
        ExpertOptimizerSettings.model_validate({"name": "sgd", "clip_norm": None, **settings}),
        device=device,
        seed=5,
        grouped=grouped,
        compute_dtype=dtype,
    )
    for uid in (A, B):
        bank.add(uid)
    return bank


def rows(device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(NUM_ROWS, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def there_and_back(bank: ExpertBank, device: torch.device, kind: str) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of the rows; the weights' gradients are taken in a step."""
    lengths = LENGTHS if expert_kind(kind).is_sequence_level else None
    pass_ = bank.forward(rows(device), (A, B), COUNTS, keep_graph=True, lengths=lengths)
    grad_ND = bank.backward(pass_, rows(device, 1), loss_tokens=float(NUM_ROWS))
    bank.step((A, B))
    return pass_.out_ND, grad_ND


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("kind", "grouped"),
    [("ffn", True), ("ffn", False), ("swiglu", True), ("swiglu", False), ("block", False), ("stack", False)],
)
def test_outputs_and_gradients_are_within_one_percent_of_float32(
    kind: str, grouped: bool, device: torch.device
) -> None:
    exact = bank_of(kind, device, torch.float32, grouped=False, learning_rate=1.0)
    rounded = bank_of(kind, device, torch.bfloat16, grouped=grouped, learning_rate=1.0)
    before = {uid: exact.state(uid) for uid in (A, B)}

    expected_out, expected_grad = there_and_back(exact, device, kind)
    out, grad = there_and_back(rounded, device, kind)

    assert out.dtype == grad.dtype == torch.float32
    assert 0 < relative(out, expected_out) < 0.01
    assert 0 < relative(grad, expected_grad) < 0.01
    for uid in (A, B):
        ours, theirs, start = rounded.state(uid).weights, exact.state(uid).weights, before[uid].weights
        moved = torch.cat([(theirs[name] - start[name]).flatten() for name in start])
        apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in start])
        assert apart.norm() < 0.01 * moved.norm()


def test_steps_too_small_for_bfloat16_add_up(device: torch.device) -> None:
    bank = bank_of("swiglu", device, torch.bfloat16, learning_rate=1e-5)
    start = bank.state(A)
    first = bank.forward(rows(device), (A,), (NUM_ROWS,), keep_graph=False).out_ND

    for _ in range(50):
        pass_ = bank.forward(rows(device), (A,), (NUM_ROWS,), keep_graph=True)
        bank.backward(pass_, rows(device, 1), loss_tokens=1.0)
        bank.step((A,))

    moved = {name: (weight - start.weights[name]).abs() for name, weight in bank.state(A).weights.items()}
    steps = torch.cat([tensor.flatten() for tensor in moved.values()]) / 50
    sizes = torch.cat([weight.flatten().abs() for weight in start.weights.values()])
    assert bool((steps < sizes * 2**-9).float().mean() > 0.5)  # one alone would be rounded away
    assert relative(bank.forward(rows(device), (A,), (NUM_ROWS,), keep_graph=False).out_ND, first) > 0.005


def test_a_state_from_elsewhere_and_a_new_expert_in_an_old_slot_compute_at_once(device: torch.device) -> None:
    bank, other = (bank_of("ffn", device, torch.bfloat16, learning_rate=0.5) for _ in range(2))
    there_and_back(other, device, "ffn")

    bank.load(A, other.state(A))
    bank.remove(B)
    bank.add(B)

    one = bank.forward(rows(device), (A, B), COUNTS, keep_graph=False).out_ND
    fresh = bank_of("ffn", device, torch.bfloat16)
    assert torch.equal(one[:24], other.forward(rows(device), (A, B), COUNTS, keep_graph=False).out_ND[:24])
    assert torch.equal(one[24:], fresh.forward(rows(device), (A, B), COUNTS, keep_graph=False).out_ND[24:])


def test_an_expert_that_does_not_step_is_not_touched(device: torch.device) -> None:
    bank = bank_of("ffn", device, torch.bfloat16, learning_rate=0.5)
    before = bank.forward(rows(device), (A, B), COUNTS, keep_graph=False).out_ND

    pass_ = bank.forward(rows(device), (A,), (NUM_ROWS,), keep_graph=True)
    bank.backward(pass_, rows(device, 1), loss_tokens=1.0)
    bank.step((A,))

    after = bank.forward(rows(device), (A, B), COUNTS, keep_graph=False).out_ND
    assert not torch.equal(before[:24], after[:24])
    assert torch.equal(before[24:], after[24:])


def test_the_shadow_is_counted(device: torch.device) -> None:
    shape, optimizer = ExpertShape(dim=32, hidden=64), ExpertOptimizerSettings()
    bank = ExpertBank(shape, optimizer, device=device, seed=0, compute_dtype=torch.bfloat16)
    bank.add(A)
    pass_ = bank.forward(rows(device), (A,), (NUM_ROWS,), keep_graph=True)
    bank.backward(pass_, rows(device), loss_tokens=1.0)

    parameters = expert_kind("swiglu").num_parameters(shape)
    assert ExpertBank.bytes_per_expert(shape, optimizer, torch.bfloat16) == (16 + 2) * parameters
    assert bank.size_bytes() == (16 + 2) * parameters


def test_rows_of_a_grouped_gemm_are_16_bytes_in_either_dtype() -> None:
    twelve, eight = ExpertShape(dim=12, hidden=16), ExpertShape(dim=8, hidden=16)

    assert can_group(expert_kind("ffn"), twelve, torch.float32)
    assert not can_group(expert_kind("ffn"), twelve, torch.bfloat16)
    assert can_group(expert_kind("ffn"), eight, torch.bfloat16)
