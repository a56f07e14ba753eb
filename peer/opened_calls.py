"""Calls on the compute thread between their decoding and their answer, and what is kept of them. Data only."""

from dataclasses import dataclass, field

from torch import Tensor

from experts.bank import Pass
from experts.uid import ExpertUid
from peer.messages import Outcome
from peer.pair_rows import PairRows
from peer.requests import Request
from peer.transport import CallRefused


@dataclass(frozen=True, eq=False)
class KeptCall:
    rows: PairRows
    run: Pass | None
    """With the autograd graph; None when outputs must be computed again."""
    sent_bytes: int
    """What its caller would have to send once more."""


@dataclass(frozen=True, eq=False)
class OpenedForward:
    position: int
    request: Request
    rows: PairRows
    """Of the experts that are here."""


@dataclass(eq=False)
class OpenedBackward:
    position: int
    request: Request
    outcomes: dict[ExpertUid, Outcome]
    rows: PairRows
    """Of the experts that take it."""
    grad_ND: Tensor
    run: Pass | None
    grad_x_ND: Tensor | None = None
    refused: CallRefused | None = None

    def failed(self, uids: set[ExpertUid]) -> None:
        """These experts' own gradients were not finite."""
        self.outcomes |= dict.fromkeys(uids & set(self.rows.uids), Outcome.NON_FINITE)


@dataclass
class Turn:
    """Backwards since the experts' last step."""

    gathered: set[ExpertUid] = field(default_factory=set[ExpertUid])
    non_finite: set[ExpertUid] = field(default_factory=set[ExpertUid])
    """Experts that threw a gradient away: whose it was has been told."""
