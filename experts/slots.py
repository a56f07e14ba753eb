"""The tensors of one device's experts, by slot: weights, moments, and what computes in the weights' place.

Weights and moments are float32. A device that computes in bfloat16 does so on a shadow: the weights, rounded. Whoever
changes weights refreshes it. Knows neither the experts' names nor when they change.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experts.optimizer import Tensors, gradient_norms
from experts.stack import TensorStack, num_bytes
from experts.state import Clock, ExpertState


class Slots:
    """Room for experts of one shape; grows as they come."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        moments: Sequence[str],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self._shapes = shapes
        self._weights = TensorStack(shapes, device)
        self._shadow = None if compute_dtype == torch.float32 else TensorStack(shapes, device, compute_dtype)
        self._moments = {moment: TensorStack(shapes, device) for moment in moments}
        self._num_slots = 0
        self._free: list[int] = []

    @staticmethod
    def bytes_each(shapes: Mapping[str, torch.Size], num_moments: int, compute_dtype: torch.dtype) -> int:
        """What one slot takes."""
        shadow_bytes = 0 if compute_dtype == torch.float32 else num_bytes(shapes, compute_dtype)
        return num_bytes(shapes) * (1 + num_moments) + shadow_bytes

    @property
    def size_bytes(self) -> int:
        """Free slots included."""
        return sum(stack.size_bytes for stack in self._stacks())

    def take(self) -> int:
        """A free slot. What lies there is of whoever had it before."""
        if not self._free:
            # By an eighth, so that a bank that grows one by one does not copy itself every time.
            grown = self._num_slots + max(1, self._num_slots // 8)
            for stack in self._stacks():
                stack.grow(grown)
            self._free = list(range(self._num_slots, grown))[::-1]
            self._num_slots = grown
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Keep it for the next one."""
        self._free.append(slot)

    def start(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """These weights, and no memory of any step."""
        self._weights.write(slot, weights)
        self.refresh(slot)
        for stack in self._moments.values():
            for tensor in stack.at(slot).values():
                tensor.zero_()

    def load(self, slot: int, state: ExpertState) -> None:
        """A state that `check` let pass."""
        self._weights.write(slot, state.weights)
        self.refresh(slot)
        for moment, stack in self._moments.items():
            stack.write(slot, {name: state.moments[f"{moment}.{name}"] for name in state.weights})

    def state(self, slot: int, clock: Clock) -> ExpertState:
        """A copy on the CPU."""
        moments = {
            f"{moment}.{name}": tensor
            for moment, stack in self._moments.items()
            for name, tensor in stack.copies(slot).items()
        }
        return ExpertState(self._weights.copies(slot), moments, clock)

    def check(self, state: ExpertState) -> None:
        """ValueError when it has other tensors than these slots, or values that are not finite."""
        expected = dict(self._shapes) | {
            f"{moment}.{name}": shape for moment in self._moments for name, shape in self._shapes.items()
        }
        given = {**state.weights, **state.moments}
        if {name: tensor.shape for name, tensor in given.items()} != expected:
            raise ValueError("does not have the tensors of this run's experts")
        if not all(math.isfinite(norm) for norm in gradient_norms([tuple(given.values())])):
            raise ValueError("contains NaN or infinity")

    def weights(self, slot: int) -> Tensors:
        """To be stepped in place, then refreshed."""
        return tuple(self._weights.at(slot).values())

    def moments(self, slot: int) -> tuple[Tensors, ...]:
        return tuple(tuple(stack.at(slot).values()) for stack in self._moments.values())

    def refresh(self, slot: int) -> None:
        """Compute with the weights as they are now."""
        if self._shadow is not None:
            self._shadow.write(slot, self._weights.at(slot))

    @property
    def computing(self) -> TensorStack:
        """The weights in the dtype that computes."""
        return self._weights if self._shadow is None else self._shadow

    def _stacks(self) -> list[TensorStack]:
        return [self._weights, *([] if self._shadow is None else [self._shadow]), *self._moments.values()]
