"""Who is chosen. Never differentiated, and the only place that sees the prior; weights are the plan's business."""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor


class Fate(IntEnum):
    """What became of a chosen pair before anything was sent. All but SENT count as lost calls."""

    SENT = 0
    CAPACITY = 1
    """Its expert's places were taken by earlier tokens."""
    NOT_DRAWN = 2
    """The dice left a second choice out (`SampledSecond`)."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a selection may look at. Tensors on the device of the tokens; detached where that matters."""

    logits_TE: Tensor
    probs_TE: Tensor
    prior_E: Tensor
    alive_E: Tensor
    share_E: Tensor
    num_live: int
    training: bool
    draw_seed: Tensor
    """Scalar. The same until the router observes a step, so that a recomputed forward draws the same dice."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Token-expert pairs as COO lists, any number per token: by token, then by rank (0 is the first choice)."""

    token_M: Tensor
    expert_M: Tensor
    rank_M: Tensor
    fate_M: Tensor

    def at(self, index: Tensor) -> "Pairs":
        """These of the pairs, in this order."""
        return Pairs(self.token_M[index], self.expert_M[index], self.rank_M[index], self.fate_M[index])


class Select(Protocol):
    """Scores to pairs; `k` is the most experts a token gets."""

    @property
    def k(self) -> int: ...

    def __call__(self, scores: Scores) -> Pairs: ...


@dataclass(frozen=True)
class TopK:
    """The k best by probability plus prior. Fewer when fewer live.

    With groups (DeepSeek-V3 section 2.1.2) the slots fall into `groups` equal runs, a run scores the sum of its two
    best, and only the `groups_kept` best runs are looked into: a bound on how many a token reaches, also when many in
    them are dead.
    """

    k: int
    groups: int = 1
    groups_kept: int = 1

    def __post_init__(self) -> None:
        if self.k < 1 or not 1 <= self.groups_kept <= self.groups:
            raise ValueError(f"need k >= 1 and 1 <= groups_kept <= groups, got {self}")

    def __call__(self, scores: Scores) -> Pairs:
        choice_TE = scores.probs_TE.detach() + scores.prior_E.masked_fill(~scores.alive_E, -torch.inf)
        if self.groups > 1:
            choice_TE = self._best_groups_only(choice_TE)
        value_TK, expert_TK = best(choice_TE, min(self.k, scores.num_live))
        token_M, rank_M = (value_TK > -torch.inf).nonzero(as_tuple=True)
        expert_M = expert_TK[token_M, rank_M]
        return Pairs(token_M, expert_M, rank_M, torch.full_like(expert_M, Fate.SENT))

    def _best_groups_only(self, choice_TE: Tensor) -> Tensor:
        num_experts = choice_TE.shape[1]
        if num_experts % self.groups or num_experts // self.groups < 2:
            raise ValueError(f"{num_experts} experts do not make {self.groups} equal groups of at least two")
        choice_TGX = choice_TE.unflatten(1, (self.groups, num_experts // self.groups))
        best_two = choice_TGX.topk(2, dim=-1).values
        # A lone survivor is worth its own score, its dead neighbours add nothing; a dead group stays at -inf.
        score_TG = best_two[..., 0] + best_two[..., 1].nan_to_num(neginf=0.0)
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        kept_TG.scatter_(1, score_TG.topk(self.groups_kept, dim=-1).indices, True)
        return choice_TGX.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


@dataclass(frozen=True)
class SampledSecond:
    """GShard algorithm 1: in training a second choice is used with probability min(1, 2 g2), g2 its share of the two.

    A token that is sure of its first choice rarely bothers a second expert. In evaluation both are used.
    """

    inner: Select

    def __post_init__(self) -> None:
        if self.inner.k != 2:
            raise ValueError(f"sampling the second of two choices needs k = 2, not {self.inner.k}")

    @property
    def k(self) -> int:
        return self.inner.k

    def __call__(self, scores: Scores) -> Pairs:
        pairs = self.inner(scores)
        if not scores.training:
            return pairs
        probs_TE = scores.probs_TE.detach()
        num_tokens = len(probs_TE)
        prob_M = probs_TE[pairs.token_M, pairs.expert_M]
        total_T = prob_M.new_zeros(num_tokens).index_add(0, pairs.token_M, prob_M)
        dice = torch.Generator().manual_seed(int(scores.draw_seed))
        draw_T = torch.rand(num_tokens, generator=dice).to(prob_M.device)
        # g / total < draw / 2, without the division: total is 0 when every chosen probability underflows.
        left_out_M = (pairs.rank_M == 1) & (2 * prob_M <= draw_T[pairs.token_M] * total_T[pairs.token_M])
        return replace(pairs, fate_M=pairs.fate_M.masked_fill(left_out_M, Fate.NOT_DRAWN))


@dataclass(frozen=True)
class Capacity:
    """An expert takes at most ceil(factor * pairs * share) of the pairs, in order of position; the rest are dropped.

    Looks across the tokens of a batch, but only at earlier ones: whether a token keeps its place never depends on a
    later one, so it is safe in a causal model. (GShard seats all first choices before any second; that would let later
    tokens push out an earlier one's second choice.)
    """

    inner: Select
    factor: float
    eval_factor: float

    @property
    def k(self) -> int:
        return self.inner.k

    def __call__(self, scores: Scores) -> Pairs:
        pairs = self.inner(scores)
        factor = self.factor if scores.training else self.eval_factor
        # The nudge keeps a share such as float32's 1/6 from rounding a whole number of places up to one more.
        places_E = (scores.share_E * (factor * len(pairs.token_M) * (1 - 1e-6))).ceil()
        wanting = (pairs.fate_M == Fate.SENT).nonzero().squeeze(1)
        expert_W = pairs.expert_M[wanting]
        full_W = position_within(expert_W, len(places_E)) >= places_E[expert_W]
        fate_M = pairs.fate_M.clone()
        fate_M[wanting[full_W]] = int(Fate.CAPACITY)
        return replace(pairs, fate_M=fate_M)


def best(choice_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first, and which experts they are: `torch.topk`, faster over many experts.

    Laid out as a grid, the k best lie in the k columns with the largest maxima: only those are sorted.
    """
    columns, ragged = divmod(choice_TE.shape[1], _GRID_ROWS)
    if ragged or columns < _LEAST_COLUMNS or k > columns:
        top_TK = choice_TE.topk(k, dim=-1)
        return top_TK.values, top_TK.indices
    choice_TRC = choice_TE.unflatten(1, (_GRID_ROWS, columns))
    column_TK = choice_TRC.amax(dim=1).topk(k, dim=-1).indices
    candidates_TX = choice_TRC.gather(2, column_TK[:, None].expand(-1, _GRID_ROWS, -1)).flatten(1)
    top_TK = candidates_TX.topk(k, dim=-1)
    row_TK, nth_TK = top_TK.indices // k, top_TK.indices % k
    return top_TK.values, row_TK * columns + column_TK.gather(1, nth_TK)


_GRID_ROWS = 16
_LEAST_COLUMNS = 64
"""Fewer than a thousand experts are sorted as fast as they are laid out."""


def position_within(expert_W: Tensor, num_experts: int) -> Tensor:
    """How many earlier entries name the same expert."""
    order = expert_W.argsort(stable=True)
    count_E = expert_W.bincount(minlength=num_experts)
    start_E = count_E.cumsum(0) - count_E
    position_W = torch.empty_like(expert_W)
    position_W[order] = torch.arange(len(expert_W), device=expert_W.device) - start_E[expert_W[order]]
    return position_W
