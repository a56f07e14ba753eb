"""The router: score, gate, select, plan. It knows no network; what the network lost comes back through `observe`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.routing.balance import Balance
from trainer.routing.gate import Gate
from trainer.routing.metrics import Metrics, measure
from trainer.routing.plan import Norm, Plan
from trainer.routing.score import Score
from trainer.routing.selection import Scores, Select
from trainer.routing.view import View


class Router(nn.Module):
    """One layer's choice of experts for each token.

    `forward` changes nothing, so it may be repeated (recomputation, retries) and run in several threads: the same
    tokens and view give the same plan. Everything that changes, changes in `learn`, after the step.
    """

    draw_seed: Tensor

    def __init__(
        self,
        score: Score,
        gate: Gate,
        select: Select,
        *,
        norm: Norm = "planned",
        scale: float = 1.0,
        balance: Sequence[Balance] = (),
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if select.k == 1 and norm != "none":
            raise ValueError(
                "with one expert per token a normalised weight is always 1, so the router would get no gradient and "
                "never learn; use a top_k of 2 or more, or a router that does not normalise, such as switch"
            )
        self.score, self.gate, self.select = score, gate, select
        self.norm: Norm = norm
        self.scale = scale
        self.balance = nn.ModuleList(balance)
        self.register_buffer("draw_seed", torch.randint(1 << 62, (), generator=generator))

    def forward(self, x_TD: Tensor, view: View, *, seq_len: int | None = None) -> Plan:
        """Plan the calls of T tokens; `seq_len` tokens make a sequence (none: all of them are one).

        Probabilities and weights are float32 even under autocast, float64 for float64 tokens.
        """
        seq_len = len(x_TD) if seq_len is None else seq_len
        if len(x_TD) and (seq_len < 1 or len(x_TD) % seq_len):
            raise ValueError(f"{len(x_TD)} tokens are not a whole number of sequences of {seq_len}")
        alive_E = view.alive_E.to(x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.score(x_TD)
            if logits_TE.shape[1] != view.num_experts:
                raise ValueError(f"this router knows {logits_TE.shape[1]} experts, the view lists {view.num_experts}")
            scores = Scores(
                logits_TE=logits_TE,
                probs_TE=self.gate(logits_TE, alive_E),
                prior_E=self._prior(view, alive_E),
                alive_E=alive_E,
                share_E=view.share_E.to(x_TD.device),
                num_live=view.num_live,
                training=self.training,
                draw_seed=self.draw_seed,
            )
            return Plan.of(self.select(scores), scores, norm=self.norm, scale=self.scale, seq_len=seq_len)

    def loss(self, plan: Plan) -> Tensor:
        """The sum of the balance losses, a scalar; 0 for a plan without a pair."""
        total = plan.scores.logits_TE.new_zeros(())
        if plan.num_chosen == 0:
            return total
        for term in self._balances():
            loss = term.loss(plan)
            total = total if loss is None else total + loss
        return total

    def learn(self, plan: Plan) -> None:
        """Take note of a plan that was carried out: once per plan, after the step, from one thread at a time."""
        for term in self._balances():
            term.observe(plan)
        self.draw_seed = self.draw_seed + 1

    def observe(self, plan: Plan, ok_N: Tensor | None = None) -> Metrics:
        """`learn`, and say how evenly the plan used the experts, which waits for the device."""
        self.learn(plan)
        return measure(plan, ok_N)

    def _prior(self, view: View, alive_E: Tensor) -> Tensor:
        prior_E = view.prior_E.to(alive_E.device)
        for term in self._balances():
            bias_E = term.bias(alive_E)
            prior_E = prior_E if bias_E is None else prior_E + bias_E
        return prior_E

    def _balances(self) -> list[Balance]:
        return [term for term in self.balance if isinstance(term, Balance)]
