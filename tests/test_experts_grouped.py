"""One contract for both ways to run a stack of experts; the reference is the module, expert by expert."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from experts.grouped import can_group, prefers_grouped, run_grouped, run_one_by_one
from experts.registry import ExpertKind, expert_kind
from experts.settings import ExpertShape

SHAPE = ExpertShape(dim=8, hidden=12)
Run = Callable[[ExpertKind, Tensor, Mapping[str, Tensor], Sequence[int]], Tensor]


def one_by_one(kind: ExpertKind, x_ND: Tensor, stacked: Mapping[str, Tensor], counts: Sequence[int]) -> Tensor:
    return run_one_by_one(kind, SHAPE, x_ND, stacked, counts)


def reference(kind: ExpertKind, x_ND: Tensor, stacked: Mapping[str, Tensor], counts: Sequence[int]) -> Tensor:
    outs: list[Tensor] = []
    for expert, rows_ND in enumerate(x_ND.split(list(counts))):
        weights = {name: weight[expert] for name, weight in stacked.items()}
        outs.append(torch.func.functional_call(kind.build(SHAPE), weights, (rows_ND,)))
    return torch.cat(outs)


def stack(kind: ExpertKind, num_experts: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = kind.parameter_shapes(SHAPE)
    return {name: torch.randn(num_experts, *shape, dtype=dtype) * 0.3 for name, shape in shapes.items()}


def gradients_of(
    run: Run, kind: ExpertKind, x_ND: Tensor, stacked: Mapping[str, Tensor], counts: Sequence[int], grad_ND: Tensor
) -> tuple[Tensor, ...]:
    x_ND = x_ND.detach().requires_grad_()
    leaves = {name: weight.detach().requires_grad_() for name, weight in stacked.items()}
    return torch.autograd.grad(run(kind, x_ND, leaves, counts), (x_ND, *leaves.values()), grad_ND)


@pytest.mark.parametrize("run", [run_grouped, one_by_one])
@pytest.mark.parametrize("name", ["ffn", "swiglu"])
@pytest.mark.parametrize(
    "counts", [(5,), (3, 4), (0, 3, 0, 0, 2, 0), (1, 1, 1), (0, 0), (0,)], ids=lambda counts: "-".join(map(str, counts))
)
class TestContract:
    def test_the_outputs_are_those_of_the_modules(self, run: Run, name: str, counts: Sequence[int]) -> None:
        torch.manual_seed(0)
        kind, x_ND = expert_kind(name), torch.randn(sum(counts), SHAPE.dim)
        stacked = stack(kind, len(counts))

        out_ND = run(kind, x_ND, stacked, counts)

        torch.testing.assert_close(out_ND, reference(kind, x_ND, stacked, counts), rtol=1e-5, atol=1e-6)

    def test_the_gradients_are_those_of_the_modules(self, run: Run, name: str, counts: Sequence[int]) -> None:
        torch.manual_seed(0)
        kind, x_ND = expert_kind(name), torch.randn(sum(counts), SHAPE.dim)
        stacked, grad_ND = stack(kind, len(counts)), torch.randn(sum(counts), SHAPE.dim)

        ours = gradients_of(run, kind, x_ND, stacked, counts, grad_ND)

        theirs = gradients_of(reference, kind, x_ND, stacked, counts, grad_ND)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_an_expanded_gradient_and_rows_with_gaps_are_taken(
        self, run: Run, name: str, counts: Sequence[int]
    ) -> None:
        torch.manual_seed(0)
        kind, x_ND = expert_kind(name), torch.randn(SHAPE.dim, sum(counts)).t()
        stacked, grad_ND = stack(kind, len(counts)), torch.ones(()).expand(sum(counts), SHAPE.dim)

        ours = gradients_of(run, kind, x_ND, stacked, counts, grad_ND)

        theirs = gradients_of(reference, kind, x_ND, stacked, counts, grad_ND)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ffn", "swiglu"])
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    kind, counts = expert_kind(name), (2, 0, 1)
    stacked = stack(kind, 3, torch.float64)
    x_ND = torch.randn(3, SHAPE.dim, dtype=torch.float64, requires_grad=True)
    leaves = [weight.requires_grad_() for weight in stacked.values()]

    def run(x_ND: Tensor, *weights: Tensor) -> Tensor:
        return one_by_one(kind, x_ND, dict(zip(stacked, weights, strict=True)), counts)

    assert torch.autograd.gradcheck(run, (x_ND, *leaves), fast_mode=True)


def test_a_gpu_groups_in_bfloat16_always_and_a_cpu_few_rows_only() -> None:
    def prefers(device: str, dtype: torch.dtype, num_rows: int) -> bool:
        return prefers_grouped(torch.device(device), dtype, num_experts=4, num_rows=num_rows)

    assert [prefers("cuda", torch.bfloat16, num_rows) for num_rows in (4, 1 << 20)] == [True, True]
    assert [prefers("cuda", torch.float32, num_rows) for num_rows in (4, 1 << 20)] == [False, False]
    assert [prefers("cpu", torch.float32, num_rows) for num_rows in (4, 1 << 20)] == [True, False]


def test_only_aligned_rows_of_at_most_32_bits_and_kinds_with_a_formula_are_grouped() -> None:
    ffn, plain = expert_kind("ffn"), ExpertKind("plain", "token", nn.Linear, None)

    assert can_group(ffn, SHAPE, torch.float32)
    assert not can_group(ffn, ExpertShape(dim=6, hidden=12), torch.float32)
    assert not can_group(ffn, ExpertShape(dim=8, hidden=9), torch.float32)
    assert not can_group(ffn, SHAPE, torch.float64)
    assert not can_group(plain, SHAPE, torch.float32)
