"""One peer's part of a layer's forward or backward, while its answer comes in. Decodes and places; asks nobody."""

from dataclasses import dataclass

from torch import Tensor

from peer.messages import Call, Outcome
from peer.tensors import all_finite, decode
from peer.transport import Endpoint
from trainer.caller import Ending, Heard, Said
from trainer.ledger import LossReason
from trainer.packing import PeerGroup


@dataclass(frozen=True)
class Answered:
    """A call that brought something back: where its backward goes."""

    group: PeerGroup[Endpoint]
    """Only the pairs that came back."""
    call: Call
    """Its rows are kept to be sent once more, should the peer have forgotten them."""
    versions: dict[int, int]


class AskedForward:
    """One peer's part of a forward, while its answer comes in."""

    def __init__(self, group: PeerGroup[Endpoint]) -> None:
        self.group = group
        self.call: Call | None = None
        """None until it is its turn to be sent."""
        self.versions: dict[int, int] = {}
        """Of the experts whose rows have come back."""
        self.non_finite: set[int] = set()
        """Experts whose rows the peer called good, and were not."""
        self._heard = Heard()

    def hear(self, said: Said, out_ND: Tensor, ok_N: Tensor) -> None:
        """Write a group's rows into their pairs, unless they are not finite."""
        self._heard.hear(said)
        if isinstance(said, Ending) or said.tensor is None:
            return
        versions = {expert.index: expert.version for expert in said.experts if expert.outcome is Outcome.OK}
        rows_ND = decode(said.tensor)
        if not all_finite(rows_ND):
            self.non_finite |= versions.keys()
            return
        self.group.place(rows_ND, list(versions), out_ND)
        for expert in self.group.experts:
            if expert.slot in versions:
                ok_N[expert.pairs] = True
        self.versions |= versions

    def loss_reason(self, slot: int) -> LossReason | None:
        return LossReason.NON_FINITE if slot in self.non_finite else self._heard.loss_reason(slot)


class AskedBackward:
    """One peer's part of a backward, while its answer comes in."""

    def __init__(self, answered: Answered) -> None:
        self.answered = answered
        self.heard = Heard()
        self.grad_UD: Tensor | None = None
        """The sum of what has come so far."""

    @property
    def is_missed(self) -> bool:
        """The peer has forgotten the inputs."""
        return self.heard.is_all(Outcome.MISSING_INPUTS)

    def hear(self, said: Said) -> None:
        self.heard.hear(said)
        if isinstance(said, Ending) or said.tensor is None:
            return
        rows_UD = decode(said.tensor)
        self.grad_UD = rows_UD if self.grad_UD is None else self.grad_UD.add_(rows_UD)
