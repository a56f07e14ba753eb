"""A tensor in fp16 with one scale: the layout, and the way there and back. Knows no network.

The scale, float32, then all values. The scale is a power of two that brings the tensor's largest magnitude A to at most
65504, fp16's largest, and to more than half of that: scaling itself loses nothing. It is at least 2^-126, so that its
reciprocal is finite. NaN and infinity stay what they are under whatever scale they lead to.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peer.cached_pieces import pieces

_LARGEST = 65504
_SCALE_BYTES = 4


def size_bytes(shape: Sequence[int]) -> int:
    """Of the scale and the values."""
    return _SCALE_BYTES + 2 * math.prod(shape)


def narrow(x: Tensor) -> Tensor:
    """The bytes, uint8, of a contiguous tensor, on its device. |read - x| <= max(2^-11 |x|, 2^-39 A, 2^-151)."""
    lowest, highest = (float(bound) for bound in torch.aminmax(x))
    exponent = max(-126, math.frexp(max(highest, -lowest) / _LARGEST)[1])
    data = torch.empty(size_bytes(x.shape), dtype=torch.uint8, device=x.device)
    scale, narrow_N = _layout(data)
    scale.fill_(2.0**exponent)
    for values, narrowed in pieces(x.view(-1), narrow_N):
        narrowed.copy_(values * 2.0**-exponent)
    return data


def widen(data: Tensor, shape: Sequence[int]) -> Tensor:
    """The float32 tensor of these bytes, uint8, on their device. Any scale is read."""
    scale, narrow_N = _layout(data)
    x_N = torch.empty(narrow_N.shape, device=data.device)
    for narrowed, values in pieces(narrow_N, x_N):
        values.copy_(narrowed).mul_(scale)
    return x_N.view(tuple(shape))


def _layout(data: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (1,) and the values, as views of the bytes."""
    return data[:_SCALE_BYTES].view(torch.float32), data[_SCALE_BYTES:].view(torch.float16)
