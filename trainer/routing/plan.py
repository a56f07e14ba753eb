"""The plan of one layer call: which pairs go out, with which weights, and what comes back adds up to.

Between `dispatch` and `combine` lies the network, which may lose any subset of the pairs. The plan knows none of it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from trainer.routing.selection import Fate, Pairs, Scores
from trainer.routing.weighted_sum import weighted_sum

Norm = Literal["none", "planned", "responded"]
"""What weights are divided by, per token: nothing, the sum over the chosen, or over those who answered.

`responded` turns a lone survivor's weight into 1 and so the router's gradient into 0. It learns worse when calls are
lost (tests/test_routing_learning.py measures it) and is here for the methods that were published with it.
"""

MIN_DENOMINATOR = 1e-30
"""Below this weights are left as they are. Adding an epsilon instead is fine forward, and 0 * inf = NaN backward."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Pairs sorted by expert, by token within an expert; dropped ones after all that are sent.

    Losses and counts see all M that were chosen; the first N of them are sent.
    """

    num_tokens: int
    seq_len: int
    """Tokens in a sequence; sequences follow each other in T."""
    token_N: Tensor
    expert_N: Tensor
    weights_N: Tensor
    """Differentiable."""
    chosen: Pairs
    weights_M: Tensor
    """As planned; under `responded`, `combine` divides once more, by what the weights of those who answered sum to."""
    scores: Scores
    norm: Norm
    scale: float
    whole_sequences: bool = False
    """An expert's pairs, in order, are runs of `seq_len` tokens: sequences that it sees as such."""

    @classmethod
    def of(cls, pairs: Pairs, scores: Scores, *, norm: Norm, scale: float, seq_len: int) -> "Plan":
        """Sort the pairs and weigh them. Waits for the device."""
        num_tokens, num_experts = scores.probs_TE.shape
        is_sent_M = pairs.fate_M == Fate.SENT
        ordered = pairs.at(torch.where(is_sent_M, pairs.expert_M, num_experts).argsort(stable=True))
        probs_M = scores.probs_TE[ordered.token_M, ordered.expert_M]
        if norm != "none":
            probs_M = _normalised(probs_M, ordered.token_M, num_tokens)
        num_pairs = int(is_sent_M.sum())
        weights_M = probs_M * scale
        return cls(
            num_tokens=num_tokens,
            seq_len=seq_len,
            token_N=ordered.token_M[:num_pairs],
            expert_N=ordered.expert_M[:num_pairs],
            weights_N=weights_M[:num_pairs],
            chosen=ordered,
            weights_M=weights_M,
            scores=scores,
            norm=norm,
            scale=scale,
        )

    def spread(self, seq_len: int) -> "Plan":
        """This plan, made for one row a sequence, for all their tokens: they go where it goes, with its weights.

        Scores stay those of the sequences.
        """
        places_S = torch.arange(seq_len, device=self.token_N.device)

        def tokens(sequences: Tensor) -> Tensor:
            return (sequences[:, None] * seq_len + places_S).flatten()

        def each(values: Tensor) -> Tensor:
            return values.repeat_interleave(seq_len)

        chosen = self.chosen
        return replace(
            self,
            num_tokens=self.num_tokens * seq_len,
            seq_len=seq_len,
            token_N=tokens(self.token_N),
            expert_N=each(self.expert_N),
            weights_N=each(self.weights_N),
            chosen=Pairs(tokens(chosen.token_M), each(chosen.expert_M), each(chosen.rank_M), each(chosen.fate_M)),
            weights_M=each(self.weights_M),
            whole_sequences=True,
        )

    def lengths(self, num_pairs: int) -> list[int] | None:
        """How so many pairs of whole experts fall into sequences; None where every token is for itself."""
        return [self.seq_len] * (num_pairs // self.seq_len) if self.whole_sequences else None

    @property
    def num_experts(self) -> int:
        return self.scores.probs_TE.shape[1]

    @property
    def num_pairs(self) -> int:
        """N, pairs to send."""
        return len(self.token_N)

    @property
    def num_chosen(self) -> int:
        """M, pairs chosen, dropped ones included."""
        return len(self.chosen.token_M)

    def groups(self) -> tuple[tuple[int, slice], ...]:
        """(slot, its rows among the N) for every expert that is sent anything, by slot. Waits for the device."""
        slots, counts = self.expert_N.unique_consecutive(return_counts=True)
        bounds = pairwise([0, *counts.cumsum(0).tolist()])
        return tuple((slot, slice(start, stop)) for slot, (start, stop) in zip(slots.tolist(), bounds, strict=True))

    def dropped(self) -> dict[Fate, int]:
        """Chosen pairs that are not sent, by what became of them. Waits for the device."""
        return {Fate(fate): n for fate, n in Counter(self.chosen.fate_M[self.num_pairs :].tolist()).items()}

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """The input row of every pair, (N, D). Differentiable."""
        return x_TD.index_select(0, self.token_N)

    def combine(self, out_ND: Tensor, ok_N: Tensor | None = None, fill_ED: Tensor | None = None) -> Tensor:
        """Weighted sum of what came back, (T, D) in the dtype of `out_ND`, added up in at least float32.

        A row that is not ok may hold anything, NaN too: neither the result nor any gradient sees it. It counts as zero,
        or as its expert's row of `fill_ED` (finite; typically the mean of what that expert used to answer), as do
        dropped pairs. A token without an answer or a fill is exactly zero, with finite gradients: the residual stream
        and the local shared expert carry it. `responded` takes no fill: it spreads a lost weight over the others.
        """
        if fill_ED is not None and self.norm == "responded":
            raise ValueError("weights normalised over the responses leave none for a fill; use norm='planned'")
        dtype = torch.promote_types(out_ND.dtype, self.weights_M.dtype)
        weights_N, token_N = self._weights_given(ok_N).to(dtype), self.token_N
        if ok_N is None or bool(ok_N.all()):
            y_TD = weighted_sum(out_ND.to(dtype), None, weights_N, token_N, num_tokens=self.num_tokens)
        else:
            row_A = ok_N.nonzero().squeeze(1)
            y_TD = weighted_sum(out_ND.to(dtype), row_A, weights_N[row_A], token_N[row_A], num_tokens=self.num_tokens)
        if fill_ED is not None:
            y_TD = y_TD + self._filled(fill_ED.to(dtype), ok_N)
        return y_TD.to(out_ND.dtype)

    def _filled(self, fill_ED: Tensor, ok_N: Tensor | None) -> Tensor:
        """What the pairs that were dropped or lost count as, (T, D)."""
        is_missing_M = torch.ones_like(self.chosen.fate_M, dtype=torch.bool)
        is_missing_M[: self.num_pairs] = False if ok_N is None else ~ok_N
        missing = self.chosen.at(is_missing_M.nonzero().squeeze(1))
        weights = self.weights_M[is_missing_M].to(fill_ED.dtype)
        return weighted_sum(fill_ED, missing.expert_M, weights, missing.token_M, num_tokens=self.num_tokens)

    def _weights_given(self, ok_N: Tensor | None) -> Tensor:
        if self.norm != "responded":
            return self.weights_N
        answered_N = self.weights_N if ok_N is None else torch.where(ok_N, self.weights_N, 0.0)
        return self.scale * _normalised(answered_N, self.token_N, self.num_tokens)


def _normalised(probs: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    total_T = probs.new_zeros(num_tokens).index_add(0, token, probs)
    safe_T = torch.where(total_T > MIN_DENOMINATOR, total_T, 1.0)
    return probs / safe_T[token]
