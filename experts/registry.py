"""Expert kinds by name: built in, registered in your program, or found through an entry point.

Knows shapes and costs. Knows nothing of runs, devices or how experts learn. L sequences, S tokens of the longest.
"""

import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from experts.settings import ExpertShape

ENTRY_POINT_GROUP = "swarmoe.experts"
"""An installed package offers kind `name` with an entry point of that name, loaded when a run first asks for it."""

Schema = Literal["token", "sequence"]
"""What an expert sees at once: one row of (N, D), or whole sequences, padded to (L, S, D)."""
Module = TypeVar("Module", bound=nn.Module)


class Linear(Protocol):
    """`x @ weight.T`, for one expert or for a stack of them."""

    def __call__(self, x_NI: Tensor, weight_OI: Tensor, /) -> Tensor: ...


Formula = Callable[..., Tensor]
"""`formula(linear, x_ND, *weights)`: an expert's maths over its weights, in the order the module declares them.

Row by row apart from `linear`, so that the same function serves one expert and a stack.
"""


MixingFlops = Callable[[ExpertShape, int], int]
"""`mixing_flops(shape, context)`: what a token of a sequence of `context` costs besides its parameters, forward."""


@dataclass(frozen=True)
class ExpertKind:
    """What one kind of expert computes and what that takes. `expert_kind` hands them out."""

    name: str
    schema: Schema
    module: Callable[..., nn.Module]
    """Called as `module(dim, hidden)`, with `blocks` after these when it has blocks."""
    formula: Formula | None = None
    """None: this kind runs one by one, through its module."""
    mixing_flops: MixingFlops | None = None
    has_blocks: bool = False

    @property
    def is_sequence_level(self) -> bool:
        return self.schema == "sequence"

    def build(self, shape: ExpertShape) -> nn.Module:
        """A fresh module, initialised from whatever generator torch draws from."""
        return self.module(shape.dim, shape.hidden, *((shape.blocks,) if self.has_blocks else ()))

    def parameter_shapes(self, shape: ExpertShape) -> Mapping[str, torch.Size]:
        """Shapes in the order of declaration. ValueError when the module cannot be hosted."""
        return {name: parameter.shape for name, parameter in _template(self, shape).named_parameters()}

    def num_parameters(self, shape: ExpertShape) -> int:
        return sum(math.prod(size) for size in self.parameter_shapes(shape).values())

    def flops_per_token(self, shape: ExpertShape, *, context: int) -> int:
        """Forward, of a token in a sequence of `context`. Backward takes twice as many.

        A multiply and an add per parameter, exact for linear maps, and what the kind says of mixing tokens.
        """
        mixing = self.mixing_flops(shape, context) if self.mixing_flops is not None else 0
        return 2 * self.num_parameters(shape) + mixing

    def saved_bytes_per_row(self, shape: ExpertShape, dtype: torch.dtype = torch.float32) -> int:
        """What autograd keeps of one row for the backward when it computes in `dtype`, weights aside. An upper bound.

        Measured on short sequences: a kind that keeps a table of all pairs of tokens takes more on long ones.
        """
        return _saved_bytes_per_row(self, shape, dtype)

    def apply(
        self, shape: ExpertShape, x: Tensor, weights: Mapping[str, Tensor], *, lengths_L: Tensor | None = None
    ) -> Tensor:
        """One expert with weights from outside the module: (N, D) to (N, D), or (L, S, D) with lengths to the same."""
        if self.formula is not None:
            return self.formula(nn.functional.linear, x, *weights.values())
        inputs = (x,) if lengths_L is None else (x, lengths_L)
        return functional_call(_module_of_thread(self, shape, threading.get_ident()), dict(weights), inputs)


_kinds: dict[str, ExpertKind] = {}


def register_expert(
    name: str,
    *,
    schema: Schema = "token",
    formula: Formula | None = None,
    mixing_flops: MixingFlops | None = None,
    has_blocks: bool = False,
) -> Callable[[type[Module]], type[Module]]:
    """Make an `nn.Module` taking `(dim, hidden)` an expert kind that runs may name.

    A token-level forward maps rows (N, D) to (N, D), each by itself. A sequence-level one maps (L, S, D) and the
    sequences' lengths (L,) to (L, S, D): what follows a sequence's length is padding of zeros, which none of its tokens
    may see, nor may a token see those after it; what comes out there is thrown away. Either runs in eval mode and
    without buffers: its parameters are all that is learned, saved and sent. With a `formula` many experts run as one
    grouped GEMM; without, one by one.
    Raises ValueError when the name is malformed or taken by another class.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) is None:
        raise ValueError(f"{name!r} cannot name an expert kind; use lower-case letters, digits and _, at most 32")
    if schema not in get_args(Schema):
        raise ValueError(f"schema {schema!r} is not known; there are {', '.join(get_args(Schema))}")
    if formula is not None and schema != "token":
        raise ValueError("a formula is row by row: a sequence-level kind runs through its module")

    def register(module: type[Module]) -> type[Module]:
        taken = _kinds.get(name)
        if taken is not None and _origin(taken.module) != _origin(module):
            raise ValueError(f"expert kind {name!r} is already {_origin(taken.module)}; choose another name")
        _kinds[name] = ExpertKind(name, schema, module, formula, mixing_flops, has_blocks)
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
    for built_in in ("experts.kinds", "experts.blocks"):
        import_module(built_in)  # here, because they register themselves with this module


def _origin(module: Callable[..., nn.Module]) -> str:
    # By name: a notebook cell that runs again defines the same class anew.
    return f"{module.__module__}.{getattr(module, '__qualname__', '')}"


_MEASURED_CONTEXT = 8


@lru_cache(maxsize=64)
def _template(kind: ExpertKind, shape: ExpertShape) -> nn.Module:
    """The module without storage: its shapes."""
    module = _without_storage(kind, shape)
    if next(module.buffers(), None) is not None:
        raise ValueError(f"expert kind {kind.name!r} has buffers, which are neither learned nor saved; use parameters")
    if next(module.parameters(), None) is None:
        raise ValueError(f"expert kind {kind.name!r} has no parameters, so there is nothing to host")
    return module


@lru_cache(maxsize=64)
def _module_of_thread(kind: ExpertKind, shape: ExpertShape, thread: int) -> nn.Module:
    """Its forward for `functional_call`, which puts the weights into the module while it runs: one for each thread."""
    return _without_storage(kind, shape)


def _without_storage(kind: ExpertKind, shape: ExpertShape) -> nn.Module:
    with torch.device("meta"):
        return kind.build(shape).eval()


@lru_cache(maxsize=64)
def _saved_bytes_per_row(kind: ExpertKind, shape: ExpertShape, dtype: torch.dtype) -> int:
    # On the CPU: for this the meta device loads torch's compiler, which takes seconds.
    sizes = kind.parameter_shapes(shape)
    weights = {name: torch.zeros(size, dtype=dtype, requires_grad=True) for name, size in sizes.items()}
    row_shape = (_MEASURED_CONTEXT, shape.dim) if kind.is_sequence_level else (shape.dim,)

    def saved_bytes(num: int) -> int:
        saved: list[int] = []
        lengths_L = torch.full((num,), _MEASURED_CONTEXT) if kind.is_sequence_level else None
        with (
            saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes), lambda packed: packed),
            torch.enable_grad(),
        ):
            kind.apply(
                shape, torch.zeros(num, *row_shape, dtype=dtype, requires_grad=True), weights, lengths_L=lengths_L
            )
        return sum(saved)

    # The difference, since weights are saved as well.
    return -(-(saved_bytes(3) - saved_bytes(2)) // math.prod(row_shape[:-1]))
