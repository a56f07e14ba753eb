"""The experts of one device: they compute, gather gradients and step, each on its own clock.

Belongs to one thread, the device's compute thread. Knows nothing of calls, trainers or time.
Weights, moments and gathered gradients are float32. Where the device computes in bfloat16 it does so on a rounded
shadow of the weights, written anew whenever an expert's weights change.
N rows of a pass, consecutive per expert; D model width.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from experts.grouped import can_group, prefers_grouped, run_grouped, run_one_by_one
from experts.hosted import Hosted
from experts.initial import initial_weights
from experts.optimizer import Tensors, Update, gradient_norms, moment_names, take_steps
from experts.passes import Graph, Pass, gradients, load_autograd
from experts.registry import expert_kind
from experts.sequences import lengths_of_each, saved_bytes
from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.slots import Slots
from experts.stack import num_bytes
from experts.state import Clock, ExpertState
from experts.uid import ExpertUid, initial_seed

__all__ = ["ExpertBank", "ExpertState", "Pass", "Steps"]


@dataclass(frozen=True)
class Steps:
    """What `ExpertBank.step` did."""

    versions: Mapping[ExpertUid, int]
    """The new versions of those that stepped."""
    non_finite: frozenset[ExpertUid]
    """Those that threw a gradient away, since they were last asked, because it was not finite."""


class ExpertBank:
    """Experts of one shape, stacked.

    Methods that name an expert raise KeyError when it is not hosted.
    """

    def __init__(
        self,
        shape: ExpertShape,
        optimizer: ExpertOptimizerSettings,
        *,
        device: torch.device,
        seed: int,
        grouped: bool | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`seed` is the run's. `grouped`: None takes the faster way, pass by pass; True needs a shape that allows it.
        `compute_dtype`: float32 or bfloat16; rows come, and outputs and gradients go, in float32 either way.

        Raises ValueError for an unknown or unsuitable expert kind.
        """
        self._kind = expert_kind(shape.kind)
        self._shape = shape
        self._optimizer = optimizer
        self._device = device
        self._seed = seed
        self._dtype = compute_dtype
        groupable = can_group(self._kind, shape, compute_dtype)
        if grouped and not groupable:
            raise ValueError(f"experts of {shape} cannot run as one grouped GEMM")
        self._grouped = grouped if groupable else False
        shapes = self._kind.parameter_shapes(shape)
        self._slots = Slots(shapes, moment_names(optimizer), device=device, compute_dtype=compute_dtype)
        self._saved_bytes_per_row = self._kind.saved_bytes_per_row(shape, compute_dtype)
        self._hosted: dict[ExpertUid, Hosted] = {}
        self._revisions = count()
        load_autograd()

    @staticmethod
    def bytes_per_expert(
        shape: ExpertShape, optimizer: ExpertOptimizerSettings, compute_dtype: torch.dtype = torch.float32
    ) -> int:
        """Weights, what computes in their place, moments and one gradient."""
        shapes = expert_kind(shape.kind).parameter_shapes(shape)
        return Slots.bytes_each(shapes, len(moment_names(optimizer)), compute_dtype) + num_bytes(shapes)

    @property
    def uids(self) -> tuple[ExpertUid, ...]:
        """The hosted experts, in the order they came."""
        return tuple(self._hosted)

    def __contains__(self, uid: ExpertUid) -> bool:
        return uid in self._hosted

    def size_bytes(self) -> int:
        """Memory held now: stacks, free slots included, and gathered gradients."""
        gathered = [hosted.gathered.gradients for hosted in self._hosted.values() if hosted.gathered is not None]
        return self._slots.size_bytes + sum(gradient.nbytes for gradients in gathered for gradient in gradients)

    def version(self, uid: ExpertUid) -> int:
        """Optimiser steps this expert has taken."""
        return self._hosted[uid].clock.version

    def add(self, uid: ExpertUid) -> None:
        """Host a fresh expert, the same one on every host of the run. ValueError when it is hosted already."""
        if uid in self._hosted:
            raise ValueError(f"expert {uid} is already hosted")
        weights = initial_weights(self._kind, self._shape, initial_seed(self._seed, uid))
        slot = self._slots.take()
        self._hosted[uid] = Hosted(slot, Clock(), next(self._revisions))
        self._slots.start(slot, weights)

    def load(self, uid: ExpertUid, state: ExpertState) -> None:
        """Host this state, in place of what was hosted under that name. ValueError when it does not fit the bank."""
        try:
            self._slots.check(state)
        except ValueError as error:
            raise ValueError(f"the state of expert {uid} {error}") from None
        hosted = self._hosted.get(uid)
        slot = hosted.slot if hosted is not None else self._slots.take()
        self._hosted[uid] = Hosted(slot, state.clock, next(self._revisions))
        self._slots.load(slot, state)

    def remove(self, uid: ExpertUid) -> None:
        """Stop hosting it. Its slot is kept for the next one."""
        self._slots.give_back(self._hosted.pop(uid).slot)

    def state(self, uid: ExpertUid) -> ExpertState:
        """A copy on the CPU, safe to keep while the expert goes on learning."""
        hosted = self._hosted[uid]
        return self._slots.state(hosted.slot, hosted.clock)

    def forward(
        self,
        x_ND: Tensor,
        uids: Sequence[ExpertUid],
        counts: Sequence[int],
        *,
        keep_graph: bool,
        lengths: Sequence[int] | None = None,
    ) -> Pass:
        """`counts[i]` consecutive rows through expert `uids[i]`. Without `keep_graph` autograd stays out of it.

        `lengths` says how the rows, in order, fall into sequences: for sequence-level kinds, and for them always.
        ValueError when an expert is named twice, or counts or lengths do not fit the rows.
        """
        pass_, parts = self.forward_in_parts(x_ND, uids, counts, keep_graph=keep_graph, lengths=lengths)
        for _ in parts:
            pass
        return pass_

    def forward_in_parts(
        self,
        x_ND: Tensor,
        uids: Sequence[ExpertUid],
        counts: Sequence[int],
        *,
        keep_graph: bool,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Pass, Iterator[tuple[int, ...]]]:
        """As `forward`, at the caller's pace: each turn gives the positions of experts whose outputs are there.

        The pass has a graph once the last of them are.
        """
        if (lengths is not None) != self._kind.is_sequence_level:
            raise ValueError(f"lengths go with sequence-level experts and only with these; these are {self._kind.name}")
        if not len(set(uids)) == len(uids) == len(counts) or sum(counts) != x_ND.shape[0] or min(counts, default=0) < 0:
            raise ValueError(
                f"experts {list(map(str, uids))} with counts {list(counts)} do not fit {x_ND.shape[0]} rows"
            )
        hosted = [self._hosted[uid] for uid in uids]
        pass_ = Pass(
            x_ND=x_ND.detach(),
            out_ND=torch.empty_like(x_ND),
            uids=tuple(uids),
            counts=tuple(counts),
            lengths=lengths_of_each(counts, lengths) if lengths is not None else None,
            versions=tuple(expert.clock.version for expert in hosted),
            revisions=tuple(expert.revision for expert in hosted),
            graphs=None,
            graph_bytes=0,
        )
        return pass_, self._run(pass_, keep_graph=keep_graph)

    def is_current(self, pass_: Pass) -> bool:
        """Whether a backward of this pass can use its graph: kept, and no expert of it has changed or gone since."""
        return pass_.graphs is not None and self._unchanged(pass_, range(len(pass_.uids)))

    def backward(self, pass_: Pass, grad_out_ND: Tensor, *, loss_tokens: float | Sequence[float]) -> Tensor:
        """Gather the weight gradients and return the gradient of the rows. Steps nothing; uses the pass's graph up.

        `grad_out_ND` is the gradient of the losses of `loss_tokens` tokens, summed; of as many for each expert, or one
        number for each. Where an expert has changed since the forward its outputs are computed again: the gradient is
        that of the present expert. An expert whose gradient is not finite gathers nothing of it and its rows get zero;
        the pass, and the next `step`, name it.
        Raises before it gathers anything, or not at all.
        """
        if grad_out_ND.shape != pass_.x_ND.shape:
            raise ValueError(f"gradients {tuple(grad_out_ND.shape)} do not belong to rows {tuple(pass_.x_ND.shape)}")
        loss_tokens_each = [loss_tokens] * len(pass_.uids) if isinstance(loss_tokens, float | int) else loss_tokens
        if not all(tokens > 0 and math.isfinite(tokens) for tokens in loss_tokens_each):
            raise ValueError(f"loss_tokens must be positive and finite, not {loss_tokens}")
        graphs = pass_.graphs or {}
        pass_.release_graph()
        grad_x_ND = torch.zeros_like(pass_.x_ND)
        found: dict[int, Tensors] = {}
        for together in self._computed_together(pass_):
            graph = graphs.get(together)
            if graph is None or not self._unchanged(pass_, together):
                graph = self._compute(pass_, together, keep_graph=True)
            span = pass_.span(together)
            grad_x_ND[span], weight_gradients = gradients(graph, grad_out_ND[span].contiguous())
            found.update(zip(together, weight_gradients, strict=True))
        norms = gradient_norms([(*tensors, grad_x_ND[pass_.span((position,))]) for position, tensors in found.items()])
        for (position, tensors), norm in zip(found.items(), norms, strict=True):
            hosted = self._hosted[pass_.uids[position]]
            if math.isfinite(norm):
                hosted.gather(tensors, rows=pass_.counts[position], loss_tokens=loss_tokens_each[position])
            else:
                hosted.had_non_finite = True
                pass_.non_finite.add(pass_.uids[position])
                grad_x_ND[pass_.span((position,))] = 0
        return grad_x_ND

    def step(self, uids: Sequence[ExpertUid]) -> Steps:
        """An optimiser step for those of `uids` that have gathered enough rows; the others are not touched."""
        asked = {uid: self._hosted[uid] for uid in uids}
        due = {uid: hosted for uid, hosted in asked.items() if hosted.rows_gathered >= self._optimizer.step_tokens}
        clocks = take_steps([self._update(hosted) for hosted in due.values()], self._optimizer)
        stepped: dict[ExpertUid, int] = {}
        for (uid, hosted), clock in zip(due.items(), clocks, strict=True):
            hosted.gathered = None
            if clock is None:
                hosted.had_non_finite = True
            else:
                hosted.clock, hosted.revision = clock, next(self._revisions)
                self._slots.refresh(hosted.slot)
                stepped[uid] = clock.version
        non_finite = frozenset(uid for uid, hosted in asked.items() if hosted.had_non_finite)
        for uid in non_finite:
            asked[uid].had_non_finite = False
        return Steps(stepped, non_finite)

    def _run(self, pass_: Pass, *, keep_graph: bool) -> Iterator[tuple[int, ...]]:
        graphs: dict[tuple[int, ...], Graph] = {}
        for together in self._computed_together(pass_):
            graph = self._compute(pass_, together, keep_graph=keep_graph)
            pass_.out_ND[pass_.span(together)] = graph.out_ND.detach()
            graphs[together] = graph
            yield together
        if keep_graph:
            pass_.graphs = graphs
            copied_bytes = sum(
                self._slots.computing.copied_bytes(self._slots_of(pass_, together)) for together in graphs
            )
            pass_.graph_bytes = self._saved_bytes(pass_) + pass_.out_ND.nbytes + copied_bytes

    def _computed_together(self, pass_: Pass) -> list[tuple[int, ...]]:
        """Positions of the experts that have rows: all at once when grouped, else each by itself."""
        busy = tuple(position for position, num_rows in enumerate(pass_.counts) if num_rows)
        grouped = self._grouped
        if grouped is None:
            grouped = prefers_grouped(self._device, self._dtype, num_experts=len(busy), num_rows=pass_.x_ND.shape[0])
        if grouped and len(busy) > 1:
            return [busy]
        return [(position,) for position in busy]

    def _compute(self, pass_: Pass, together: tuple[int, ...], *, keep_graph: bool) -> Graph:
        leaves = self._slots.computing.leaves(self._slots_of(pass_, together))
        x_ND = pass_.x_ND[pass_.span(together)].detach()
        counts = [pass_.counts[position] for position in together]
        with torch.set_grad_enabled(keep_graph):
            for leaf in (x_ND, *leaves.values()):
                leaf.requires_grad_(keep_graph)
            rounded_ND = x_ND.to(self._dtype)
            if len(together) > 1:
                out_ND = run_grouped(self._kind, rounded_ND, leaves, counts)
            else:
                lengths = [pass_.lengths[position] for position in together] if pass_.lengths is not None else None
                out_ND = run_one_by_one(self._kind, self._shape, rounded_ND, leaves, counts, lengths)
            return Graph(x_ND, tuple(leaves.values()), out_ND.to(x_ND.dtype))

    def _saved_bytes(self, pass_: Pass) -> int:
        if pass_.lengths is None:
            return self._saved_bytes_per_row * pass_.x_ND.shape[0]
        return sum(saved_bytes(lengths, self._saved_bytes_per_row) for lengths in pass_.lengths)

    def _slots_of(self, pass_: Pass, positions: Iterable[int]) -> list[int]:
        return [self._hosted[pass_.uids[position]].slot for position in positions]

    def _unchanged(self, pass_: Pass, positions: Iterable[int]) -> bool:
        hosted = ((self._hosted.get(pass_.uids[position]), pass_.revisions[position]) for position in positions)
        return all(expert is not None and expert.revision == revision for expert, revision in hosted)

    def _update(self, hosted: Hosted) -> Update:
        assert hosted.gathered is not None
        return Update(
            weights=self._slots.weights(hosted.slot),
            moments=self._slots.moments(hosted.slot),
            gradients=hosted.gathered.gradients,
            loss_tokens=hosted.gathered.loss_tokens,
            rows=hosted.gathered.rows,
            clock=hosted.clock,
        )
