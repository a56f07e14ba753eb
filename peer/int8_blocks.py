"""Rows in int8 with a bf16 scale for each block of a row: the layout, and the way there and back. Knows no network.

All scales, (N, J) bf16, then all values, (N, D) int8. A block is 256 values, or the whole row of a narrower one; the
last of a row may be short. A value is its int8 times its block's scale.

With A the largest magnitude in the block, A/127 <= scale <= A/126: no value exceeds 127. The scale is at least 2^-126,
so that its reciprocal is finite; a block of zeros is nothing special. A block with a NaN or an infinity gets such a
scale, and so does whatever is read from it.

Five passes over the values to write (maximum, minimum, scale, round, narrow), two to read (widen, scale). Maximum and
minimum of each block take together an eighth of the time of torch.aminmax and a fifteenth of the infinity norm's.

N rows, D width, J blocks in a row, W values in a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from peer.cached_pieces import pieces
from peer.dither import Dither

BLOCK = 256

_SCALE_OF_LARGEST = (1 + 2**-8 + 2**-19) / 127
"""Then bf16's nearest is not below A/127: it takes away at most 1/257. The 2^-19 are for float32's own rounding."""
_MIN_SCALE = 2.0**-126


def size_bytes(num_rows: int, dim: int) -> int:
    """Of the scales and the values."""
    return num_rows * (2 * _num_blocks(dim) + dim)


def quantize(x_ND: Tensor, dither: Dither | None) -> Tensor:
    """The bytes, uint8, on the rows' device. To the nearest; with `dither` up or down at random and right in the mean.

    |read - x| <= max(A/252, 2^-127) to the nearest; < max(A/126, 2^-126) at random.
    """
    data = torch.empty(size_bytes(*x_ND.shape), dtype=torch.uint8, device=x_ND.device)
    scales_NJ, q_ND = _layout(data, *x_ND.shape)
    for scales_NJ1, x_NJW, q_NJW in _blocks(scales_NJ, x_ND, q_ND):
        largest_NJ1 = torch.maximum(x_NJW.amax(2, keepdim=True), x_NJW.amin(2, keepdim=True).neg_())
        scales_NJ1.copy_(largest_NJ1.mul_(_SCALE_OF_LARGEST).clamp_(min=_MIN_SCALE))
        per_scale_NJ1 = scales_NJ1.float().reciprocal_()
        for values, per_scale, q in pieces(x_NJW, per_scale_NJ1, q_NJW):
            if dither is None:
                q.copy_(torch.mul(values, per_scale).round_())
            else:
                noise = dither.noise(values.numel()).view(values.shape)
                q.copy_(torch.addcmul(noise, values, per_scale).floor_())
    return data


def dequantize(data: Tensor, num_rows: int, dim: int) -> Tensor:
    """(N, D) float32 of these bytes, uint8, on their device. Reads any bytes: -128 too, and scales of either sign."""
    scales_NJ, q_ND = _layout(data, num_rows, dim)
    x_ND = torch.empty(num_rows, dim, device=data.device)
    for scales_NJ1, q_NJW, x_NJW in _blocks(scales_NJ.float(), q_ND, x_ND):
        for q, scales, values in pieces(q_NJW, scales_NJ1, x_NJW):
            values.copy_(q).mul_(scales)
    return x_ND


def _num_blocks(dim: int) -> int:
    return -(-dim // BLOCK)


def _layout(data: Tensor, num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Scales (N, J) and values (N, D), as views of the bytes."""
    scales, values = data.split([2 * num_rows * _num_blocks(dim), num_rows * dim])
    return scales.view(torch.bfloat16).view(num_rows, -1), values.view(torch.int8).view(num_rows, dim)


def _blocks(scales_NJ: Tensor, *rows_ND: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (N, J, 1) and (N, J, W): of the blocks of full width, then of the short ones at the rows' ends."""
    dim = rows_ND[0].shape[1]
    width = min(BLOCK, dim)
    full = dim // width
    yield scales_NJ[:, :full, None], *(rows[:, : full * width].unflatten(1, (full, width)) for rows in rows_ND)
    if full * width < dim:
        yield scales_NJ[:, full:, None], *(rows[:, None, full * width :] for rows in rows_ND)
