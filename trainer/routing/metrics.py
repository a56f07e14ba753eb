"""How evenly a layer's experts are used, and how much was lost. Plain numbers, for people and reports."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.routing.plan import Plan


@dataclass(frozen=True)
class Metrics:
    """One layer, one plan. Demand counts every chosen pair, also the dropped and lost ones."""

    load_entropy: float
    """H(f) / log(live experts): 1 is perfectly even; aim for 0.95 and more."""
    max_violation: float
    """max_e f_e / c_e - 1: how far the busiest expert is above its share; 0 is perfect, aim for 0.5 and less."""
    drop_share: float
    """Chosen pairs that never went out (capacity, dice)."""
    lost_share: float
    """Pairs that went out and did not come back."""
    unanswered_share: float
    """Tokens that no expert answered."""


@torch.no_grad()
def measure(plan: Plan, ok_N: Tensor | None = None) -> Metrics:
    """Waits for the device. Without a chosen pair: even use of nothing, and every token unanswered."""
    num_live, chosen, sent = plan.scores.num_live, plan.num_chosen, plan.num_pairs
    alive_E, share_E = plan.scores.alive_E.cpu(), plan.scores.share_E.cpu().double()
    load_E = plan.chosen.expert_M.bincount(minlength=plan.num_experts).cpu().double() / max(chosen, 1)
    entropy = float(torch.special.entr(load_E).sum())
    answered_N = plan.token_N if ok_N is None else plan.token_N[ok_N]
    return Metrics(
        load_entropy=entropy / math.log(num_live) if num_live > 1 and chosen else 1.0,
        max_violation=float((load_E / share_E)[alive_E].max()) - 1.0 if chosen else 0.0,
        drop_share=(chosen - sent) / max(chosen, 1),
        lost_share=(sent - len(answered_N)) / max(sent, 1),
        unanswered_share=(1.0 - len(answered_N.unique()) / plan.num_tokens) if plan.num_tokens else 0.0,
    )
