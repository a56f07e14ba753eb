"""`swarmoe generate`"""

from swarmoe.command_line import Invocation
from trainer.settings import GenerateSettings


def start(invocation: Invocation) -> int:
    """Sample text from the live swarm. The trunk is that of a trainer's newest checkpoint."""
    settings = invocation.settings(GenerateSettings)
    from trainer.generation import run_generate  # torch and hivemind take seconds to import

    return run_generate(settings, as_json=invocation.json)
