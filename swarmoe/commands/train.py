"""`swarmoe train`"""

from swarmoe.command_line import Invocation
from trainer.settings import TrainSettings


def start(invocation: Invocation) -> int:
    """Train the swarm's model on text of yours."""
    settings = invocation.settings(TrainSettings)
    from trainer.daemon import run_trainer  # torch and hivemind take seconds to import

    return run_trainer(settings)
