"""Fresh weights from a seed: the same on every host, in whatever order and on whatever device experts are added."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from experts.registry import ExpertKind
from experts.settings import ExpertShape

_DRAWS = frozenset({
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_normal_", "kaiming_uniform_",
    "log_normal_", "multinomial", "normal", "normal_", "rand", "randint", "randn", "random_", "randperm", "uniform_",
})  # fmt: skip


class _DrawFrom(TorchFunctionMode):
    """Every random number torch draws inside comes from one generator.

    Modules initialise themselves from the global generator; seeding that one instead would race with other threads.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ in _DRAWS:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def initial_weights(kind: ExpertKind, shape: ExpertShape, seed: int) -> dict[str, Tensor]:
    """The weights a fresh expert of this seed starts with: float32, on the CPU."""
    with _DrawFrom(torch.Generator().manual_seed(seed)), torch.device("cpu"):
        module = kind.build(shape)
    return {name: parameter.detach().float() for name, parameter in module.named_parameters()}
