"""One expert's place in a bank: where its tensors are, how far it is, and the gradient it gathers for its next step."""

from dataclasses import dataclass

from experts.optimizer import Tensors
from experts.state import Clock


@dataclass
class Gathered:
    """A gradient on its way to the next step."""

    gradients: Tensors
    rows: int
    loss_tokens: float


@dataclass
class Hosted:
    """A place in the stacks, and what changes there."""

    slot: int
    clock: Clock
    revision: int
    """Unique in the bank, new whenever the weights change: after removal and return a version may repeat."""
    gathered: Gathered | None = None
    had_non_finite: bool = False

    @property
    def rows_gathered(self) -> int:
        return self.gathered.rows if self.gathered is not None else 0

    def gather(self, gradients: Tensors, *, rows: int, loss_tokens: float) -> None:
        """Takes the gradients over: with a step after each backward they are never copied."""
        if self.gathered is None:
            self.gathered = Gathered(gradients, rows, loss_tokens)
            return
        for total, gradient in zip(self.gathered.gradients, gradients, strict=True):
            total.add_(gradient)
        self.gathered.rows += rows
        self.gathered.loss_tokens += loss_tokens
