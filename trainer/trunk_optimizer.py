"""How the trunk learns: AdamW, warm-up and cosine by step, routers clipped on their own. Knows no experts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peer.manifest import TrunkOptimizerSettings

FINAL_RATE_SHARE = 0.1
ROUTER_CLIP_NORM = 1.0
"""Routers are clipped apart from the trunk: one burst of a lost expert's gradient must not shrink everybody's step."""


@dataclass(frozen=True)
class TrunkUpdate:
    """What one call of `TrunkOptimizer.update` did."""

    trunk_norm: float
    """Gradient norms before clipping."""
    router_norm: float
    learning_rate: float
    applied: bool
    """False when a gradient was not finite: nothing changed."""


class TrunkOptimizer:
    """AdamW over everything a trainer owns. One thread at a time, and only while no graph of the parameters is open."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        routers: Mapping[str, nn.Parameter],
        settings: TrunkOptimizerSettings,
    ) -> None:
        """`parameters` is all that learns, by name, routers included. Decay acts on matrices, never on routers."""
        self._settings = settings
        self._parameters = dict(parameters)
        trunk = {name: parameter for name, parameter in parameters.items() if name not in routers}
        matrices = [parameter for parameter in trunk.values() if parameter.ndim >= 2]
        vectors = [parameter for parameter in trunk.values() if parameter.ndim < 2]
        self._trunk, self._routers = list(trunk.values()), list(routers.values())
        grouped = [*matrices, *vectors, *self._routers]
        assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in parameters.values()}
        assert len(grouped) == len(parameters), "a parameter is in two groups"
        groups = [(matrices, settings.weight_decay), (vectors, 0.0), (self._routers, 0.0)]
        self._adamw = torch.optim.AdamW(
            [{"params": members, "weight_decay": decay} for members, decay in groups if members],
            betas=settings.betas,
            eps=settings.eps,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order in which `update` takes gradients; for `torch.autograd.grad`."""
        return list(self._parameters.values())

    def update(self, gradients: Sequence[Tensor | None], *, step: int) -> TrunkUpdate:
        """One step of the mean loss's gradients, which it may scale in place. `step` counts from 0 and sets the rate.

        A parameter without a gradient (None) is not touched.
        """
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        trunk_norm = _clip(self._trunk, self._settings.clip_norm)
        router_norm = _clip(self._routers, ROUTER_CLIP_NORM)
        rate = learning_rate(self._settings, step)
        is_finite = math.isfinite(trunk_norm) and math.isfinite(router_norm)
        if is_finite:
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return TrunkUpdate(trunk_norm, router_norm, rate, applied=is_finite)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments and step counts, as `PARAMETER/exp_avg` and so on. Not copied."""
        return {
            f"{name}/{kind}": value
            for name, parameter in self._parameters.items()
            for kind, value in self._adamw.state[parameter].items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state_tensors` gave. ValueError when it names a parameter or a shape that is not ours."""
        self._adamw.state.clear()
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            parameter = self._parameters.get(name)
            if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
                raise ValueError(
                    f"the optimizer's state has {key} of shape {list(value.shape)}, which fits no parameter"
                )
            device = parameter.device if value.ndim else value.device  # AdamW keeps its step counts on the CPU
            self._adamw.state[parameter][kind] = value.clone().to(device)


def learning_rate(settings: TrunkOptimizerSettings, step: int) -> float:
    """Linear from zero over `warmup_steps`, then a cosine down to a tenth at `decay_steps`, constant after that."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay_steps is None:
        return settings.learning_rate
    length = max(1, settings.decay_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / length)
    share = FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * share


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    return float(nn.utils.clip_grad_norm_(parameters, max_norm)) if parameters else 0.0
