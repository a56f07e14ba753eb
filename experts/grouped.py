"""Running a stack of same-shape experts: as one grouped GEMM, or one by one. Both compute the same.

N rows, consecutive per expert; E experts in the stack; D model width. Weights are stacked: (E, out, in). Rows and
weights are of one dtype.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from experts.registry import ExpertKind
from experts.sequences import Lengths, run_padded
from experts.settings import ExpertShape

_GEMM_ALIGNMENT_BYTES = 16
"""`grouped_mm` refuses rows of any other length."""
_ONE_BY_ONE_FROM_ROWS = 128
"""Rows per expert from which a CPU runs experts one by one."""


def can_group(kind: ExpertKind, shape: ExpertShape, dtype: torch.dtype) -> bool:
    """Whether `run_grouped` takes experts of this kind, shape and dtype."""
    aligned = all(width * dtype.itemsize % _GEMM_ALIGNMENT_BYTES == 0 for width in (shape.dim, shape.hidden))
    return kind.formula is not None and aligned and dtype != torch.float64


def prefers_grouped(device: torch.device, dtype: torch.dtype, *, num_experts: int, num_rows: int) -> bool:
    """Whether one grouped GEMM is the faster way.

    On CUDA always, in bfloat16. In float32 torch would loop over the experts there and wait for the device, and a GPU
    without bfloat16 (compute capability below 8.0) refuses.
    Measured on one CPU core with 16 experts, forward and backward: at 32 to 64 rows an expert it takes 0.8 of the time
    (one by one pays Python per expert), from 256 rows on 1.03 to 1.2 of it (the GEMMs are equally fast, but one
    expert's activations stay in the cache and the stack's do not).
    """
    if device.type == "cuda":
        return dtype == torch.bfloat16
    return num_rows < _ONE_BY_ONE_FROM_ROWS * num_experts


def run_grouped(kind: ExpertKind, x_ND: Tensor, stacked: Mapping[str, Tensor], counts: Sequence[int]) -> Tensor:
    """`counts[e]` rows through expert e, all experts at once. Differentiable in the rows and the stacked weights."""
    assert kind.formula is not None
    offsets_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x_ND.device)

    def linear(x_NI: Tensor, weight_EOI: Tensor) -> Tensor:
        out_NO = F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=offsets_E)
        if out_NO.requires_grad:
            out_NO.register_hook(_packed)  # its backward fails on an expanded gradient
        return out_NO

    return kind.formula(linear, _packed(x_ND), *stacked.values())


def run_one_by_one(
    kind: ExpertKind,
    shape: ExpertShape,
    x_ND: Tensor,
    stacked: Mapping[str, Tensor],
    counts: Sequence[int],
    lengths: Sequence[Lengths] | None = None,
) -> Tensor:
    """As `run_grouped`, for any kind, shape and dtype.

    `lengths`: of each expert's sequences, where the kind sees sequences.
    """
    if len(counts) == 1:  # squeezed, not indexed: the gradient of an index is a copy
        experts = [{name: weight.squeeze(0) for name, weight in stacked.items()}]
    else:
        experts = [{name: weight[expert] for name, weight in stacked.items()} for expert in range(len(counts))]
    outs = [
        _run_one(kind, shape, rows_ND, weights, lengths[expert] if lengths is not None else None)
        for expert, (rows_ND, weights) in enumerate(zip(x_ND.split(list(counts)), experts, strict=True))
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _run_one(
    kind: ExpertKind, shape: ExpertShape, x_ND: Tensor, weights: Mapping[str, Tensor], lengths: Lengths | None
) -> Tensor:
    if lengths is None:
        return kind.apply(shape, x_ND, weights)
    if not lengths:
        return x_ND
    return run_padded(lambda x_LSD, lengths_L: kind.apply(shape, x_LSD, weights, lengths_L=lengths_L), x_ND, lengths)


def _packed(x_ND: Tensor) -> Tensor:
    # `contiguous` leaves a tensor without elements whatever strides it has, and grouped_mm looks at these.
    return x_ND.contiguous() if x_ND.numel() else x_ND.clone(memory_format=torch.contiguous_format)
