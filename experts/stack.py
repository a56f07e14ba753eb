"""The same tensors of many experts, stacked: one tensor per name, one slot per expert."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class TensorStack:
    """Stacked tensors by name, each (slots, *shape). Growing moves them; slots keep their content."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._stacked = {name: torch.zeros(0, *shape, device=device, dtype=dtype) for name, shape in shapes.items()}

    @property
    def size_bytes(self) -> int:
        return sum(stacked.nbytes for stacked in self._stacked.values())

    def grow(self, num_slots: int) -> None:
        for name, stacked in self._stacked.items():
            room = stacked.new_zeros(num_slots - stacked.shape[0], *stacked.shape[1:])
            self._stacked[name] = torch.cat([stacked, room])

    def at(self, slot: int) -> dict[str, Tensor]:
        """One expert's tensors: contiguous views, to be read and written in place."""
        return {name: stacked[slot] for name, stacked in self._stacked.items()}

    def write(self, slot: int, values: Mapping[str, Tensor]) -> None:
        """Set one expert's tensors, rounded to the stack's dtype."""
        for name, view in self.at(slot).items():
            view.copy_(values[name])

    def copies(self, slot: int) -> dict[str, Tensor]:
        """One expert's tensors on the CPU, safe to keep while the stack changes."""
        return {name: view.detach().to("cpu", copy=True) for name, view in self.at(slot).items()}

    def leaves(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Tensors (len(slots), *shape) to build a graph on; consecutive slots are not copied.

        A view shares its version counter with the whole stack, so that a step of any one expert would make autograd
        refuse the graphs of all the others. `.data` has a counter of its own: whoever keeps a graph must know by
        other means whether these experts have changed.
        """
        if _are_consecutive(slots):
            first = slots[0]
            return {name: stacked[first : first + len(slots)].data for name, stacked in self._stacked.items()}
        index = torch.tensor(slots, device=next(iter(self._stacked.values())).device)
        return {name: stacked.index_select(0, index) for name, stacked in self._stacked.items()}

    def copied_bytes(self, slots: Sequence[int]) -> int:
        """What `leaves` of these slots take besides the stack."""
        if _are_consecutive(slots):
            return 0
        return len(slots) * sum(stacked[0].nbytes for stacked in self._stacked.values())


def _are_consecutive(slots: Sequence[int]) -> bool:
    return list(slots) == list(range(slots[0], slots[0] + len(slots)))


def num_bytes(shapes: Mapping[str, torch.Size], dtype: torch.dtype = torch.float32) -> int:
    """What one slot takes."""
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
