"""Expert kinds by name: built in, registered in your program, or found through an entry point.

Knows shapes and costs. Knows nothing of runs, devices or how experts learn.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

ENTRY_POINT_GROUP = "swarmoe.experts"
"""An installed package offers kind `name` with an entry point of that name, loaded when a run first asks for it."""

Schema = Literal["token"]
Module = TypeVar("Module", bound=nn.Module)


class Linear(Protocol):
    """`x @ weight.T`, for one expert or for a stack of them."""

    def __call__(self, x_NI: Tensor, weight_OI: Tensor, /) -> Tensor: ...


Formula = Callable[..., Tensor]
"""`formula(linear, x_ND, *weights)`: an expert's maths over its weights, in the order the module declares them.

Row by row apart from `linear`, so that the same function serves one expert and a stack.
"""


@dataclass(frozen=True)
class ExpertKind:
    """What one kind of expert computes and what that takes. `expert_kind` hands them out."""

    name: str
    schema: Schema
    module: Callable[[int, int], nn.Module]
    """Called as `module(dim, hidden)`."""
    formula: Formula | None
    """None: this kind runs one by one, through its module."""

    def build(self, dim: int, hidden: int) -> nn.Module:
        """A fresh module, initialised from whatever generator torch draws from."""
        return self.module(dim, hidden)

    def parameter_shapes(self, dim: int, hidden: int) -> Mapping[str, torch.Size]:
        """Shapes in the order of declaration. ValueError when the module cannot be hosted."""
        return {name: parameter.shape for name, parameter in _template(self, dim, hidden).named_parameters()}

    def num_parameters(self, dim: int, hidden: int) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes(dim, hidden).values())

    def flops_per_token(self, dim: int, hidden: int) -> int:
        """Forward, at a multiply and an add per parameter: exact for linear maps. Backward takes twice as many."""
        return 2 * self.num_parameters(dim, hidden)

    def saved_bytes_per_row(self, dim: int, hidden: int) -> int:
        """What autograd keeps of one row for the backward, in float32, weights aside. An upper bound."""
        return _saved_bytes_per_row(self, dim, hidden)

    def apply(self, x_ND: Tensor, weights: Mapping[str, Tensor], *, dim: int, hidden: int) -> Tensor:
        """One expert on its rows, with weights from outside the module. (N, D) to (N, D)."""
        if self.formula is not None:
            return self.formula(nn.functional.linear, x_ND, *weights.values())
        return functional_call(_template(self, dim, hidden), dict(weights), (x_ND,))


_kinds: dict[str, ExpertKind] = {}


def register_expert(
    name: str, *, schema: Schema = "token", formula: Formula | None = None
) -> Callable[[type[Module]], type[Module]]:
    """Make an `nn.Module` taking `(dim, hidden)` an expert kind that runs may name.

    Its forward maps rows (N, D) to (N, D), each by itself. It runs in eval mode and without buffers: its parameters
    are all that is learned, saved and sent. With a `formula` many experts run as one grouped GEMM; without, one by one.
    Raises ValueError when the name is malformed or taken by another class.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) is None:
        raise ValueError(f"{name!r} cannot name an expert kind; use lower-case letters, digits and _, at most 32")
    if schema != "token":
        raise ValueError(f"schema {schema!r} is not known; expert kinds are 'token' level: (N, D) to (N, D)")

    def register(module: type[Module]) -> type[Module]:
        taken = _kinds.get(name)
        if taken is not None and _origin(taken.module) != _origin(module):
            raise ValueError(f"expert kind {name!r} is already {_origin(taken.module)}; choose another name")
        _kinds[name] = ExpertKind(name, schema, module, formula)
        return module

    return register


def expert_kind(name: str) -> ExpertKind:
    """The kind of that name; loads its entry point on first use. ValueError lists the known ones if there is none."""
    _load_built_in()
    if name not in _kinds:
        for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            entry_point.load()  # importing it runs its @register_expert
    if name not in _kinds:
        raise ValueError(f"expert kind {name!r} is not known; known: {', '.join(expert_kinds())}")
    return _kinds[name]


def expert_kinds() -> list[str]:
    """Every name `expert_kind` answers to, sorted. Loads no entry point."""
    _load_built_in()
    return sorted(_kinds.keys() | entry_points(group=ENTRY_POINT_GROUP).names)


def _load_built_in() -> None:
    import_module("experts.kinds")  # here, because it registers itself with this module


def _origin(module: Callable[[int, int], nn.Module]) -> str:
    # By name: a notebook cell that runs again defines the same class anew.
    return f"{module.__module__}.{getattr(module, '__qualname__', '')}"


@lru_cache(maxsize=64)
def _template(kind: ExpertKind, dim: int, hidden: int) -> nn.Module:
    """The module without storage: its shapes, and its forward for `functional_call`."""
    with torch.device("meta"):
        module = kind.build(dim, hidden).eval()
    if next(module.buffers(), None) is not None:
        raise ValueError(f"expert kind {kind.name!r} has buffers, which are neither learned nor saved; use parameters")
    if next(module.parameters(), None) is None:
        raise ValueError(f"expert kind {kind.name!r} has no parameters, so there is nothing to host")
    return module


@lru_cache(maxsize=64)
def _saved_bytes_per_row(kind: ExpertKind, dim: int, hidden: int) -> int:
    # On the CPU: for this the meta device loads torch's compiler, which takes seconds.
    shapes = kind.parameter_shapes(dim, hidden)
    weights = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}

    def saved_bytes(num_rows: int) -> int:
        saved: list[int] = []
        with (
            saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes), lambda packed: packed),
            torch.enable_grad(),
        ):
            kind.apply(torch.zeros(num_rows, dim, requires_grad=True), weights, dim=dim, hidden=hidden)
        return sum(saved)

    return saved_bytes(3) - saved_bytes(2)  # the difference, since weights are saved as well
