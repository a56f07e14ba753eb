"""Noise to round with: uniform in [0, 1), fixed by a seed, as cheap as reading memory. Knows no codec.

floor(y + noise) is y in the mean. On the CPU the noise comes from one constant table, equally spaced numbers in random
order, read from a random place at every call: a value's noise is exactly uniform, two values' as good as independent.
Drawing each number (torch 1.0, numpy 1.3 GB/s) takes three times as long as all else in rounding. A GPU draws them.
"""

from functools import cache

import torch
from torch import Tensor

from peer.cached_pieces import PIECE_VALUES

TABLE_VALUES = PIECE_VALUES


class Dither:
    """A source of noise on one device. Belongs to one thread."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def noise(self, num_values: int) -> Tensor:
        """(num_values,) float32, to read only; on the CPU at most `TABLE_VALUES` at a time."""
        if self._generator.device.type != "cpu":
            return torch.rand(num_values, generator=self._generator, device=self._generator.device)
        assert num_values <= TABLE_VALUES
        start = int(torch.randint(TABLE_VALUES, (1,), generator=self._generator))
        return _table()[start : start + num_values]


@cache
def _table() -> Tensor:
    """The table twice over, so that every slice of it is in one piece."""
    shuffled = torch.randperm(TABLE_VALUES, generator=torch.Generator().manual_seed(0))
    return shuffled.add(0.5).div_(TABLE_VALUES).repeat(2)
