"""Pressure to even use: losses for the router, or a bias on its selection. All of it weighs experts by their share.

f_e is the fraction of the chosen pairs that went to expert e, dropped ones included: what is wanted, not what is
served. P_e is the mean probability given to e, c_e its share. Only P_e is differentiable, which moves probability away
from the busy.
"""

import torch
from torch import Tensor, nn

from trainer.routing.plan import Plan
from trainer.routing.view import recentred


class Balance(nn.Module):
    """A loss, a selection bias, or both; this one is neither. State changes in `observe` only, after the step."""

    def bias(self, alive_E: Tensor) -> Tensor | None:
        """What to add to the probabilities for selection, (E,)."""
        return None

    def loss(self, plan: Plan) -> Tensor | None:
        """Weighted, to be added to the task's loss. Never called for a plan without a pair."""
        return None

    def observe(self, plan: Plan) -> None:
        """Learn from a plan that was carried out."""


class SwitchLoss(Balance):
    """Fedus et al. 2021, eqs. 4-6, for unequal shares: sum_e f_e P_e / c_e, over the micro-batch.

    Equal shares give the paper's E * sum_e f_e P_e. It is 1 at f = P = c, and not bounded by it from below.
    transformers' Mixtral loss is K times this one: it counts f_e per token, not per choice.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, plan: Plan) -> Tensor:
        return self.weight * _uneven_use(plan, plan.scores.probs_TE, seq_len=plan.num_tokens)


class SeqLoss(Balance):
    """DeepSeek-V3 eqs. 17-20: the same within each sequence, on probabilities made to sum to 1 per token."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, plan: Plan) -> Tensor:
        probs_TE = plan.scores.probs_TE
        tiny = torch.finfo(probs_TE.dtype).tiny
        return self.weight * _uneven_use(plan, probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=tiny), plan.seq_len)


class ZLoss(Balance):
    """ST-MoE eq. 5: mean_t (logsumexp over the living of the logits)^2. Keeps logits where float32 is fine-grained."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, plan: Plan) -> Tensor:
        live_logits_TE = plan.scores.logits_TE + torch.where(plan.scores.alive_E, 0.0, -torch.inf)
        return self.weight * live_logits_TE.logsumexp(dim=-1).square().mean()


class BiasBalance(Balance):
    """Balancing without a loss (Wang et al. 2024): an expert's bias moves by `rate` towards its share of the pairs.

    b_e += rate * sign(c_e * M - n_e) for the living, once per observed plan. Selection sees the biases recentred to
    zero mean over the living; weights never see them. With few tokens it ends up stepping to and fro by `rate`.
    """

    bias_E: Tensor

    def __init__(self, num_experts: int, rate: float = 1e-3) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def bias(self, alive_E: Tensor) -> Tensor:
        return recentred(self.bias_E, alive_E)

    @torch.no_grad()
    def observe(self, plan: Plan) -> None:
        count_E = plan.chosen.expert_M.bincount(minlength=plan.num_experts)
        towards_share_E = (plan.scores.share_E * plan.num_chosen - count_E).sign()
        # A dead expert has no share and no pair, so it stays. Not in place: another thread keeps the tensor it read.
        self.bias_E = self.bias_E + self.rate * towards_share_E


def _uneven_use(plan: Plan, probs_TE: Tensor, seq_len: int) -> Tensor:
    """Mean over sequences of sum_e f_e P_e / c_e."""
    num_experts, num_seqs = plan.num_experts, plan.num_tokens // seq_len
    seq_M = plan.chosen.token_M // seq_len
    count_BE = (seq_M * num_experts + plan.chosen.expert_M).bincount(minlength=num_seqs * num_experts)
    count_BE = count_BE.view(num_seqs, num_experts).to(probs_TE.dtype)
    f_BE = count_BE / count_BE.sum(-1, keepdim=True).clamp(min=1)
    p_BE = probs_TE.view(num_seqs, seq_len, num_experts).mean(1)
    per_share_E = torch.where(plan.scores.alive_E, 1 / plan.scores.share_E, 0.0)
    return (f_BE * p_BE * per_share_E).sum(-1).mean()
