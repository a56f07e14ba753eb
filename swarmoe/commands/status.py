"""`swarmoe status`"""

from coordinator.settings import StatusSettings
from swarmoe.command_line import Invocation


def start(invocation: Invocation) -> int:
    """Show who is in a swarm. Says who serves which expert, and which expert nobody serves."""
    settings = invocation.settings(StatusSettings)
    from coordinator.status import run_status  # hivemind takes seconds to import

    return run_status(settings, as_json=invocation.json)
