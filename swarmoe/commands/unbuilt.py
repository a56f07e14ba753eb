"""Commands whose names are settled and whose machinery is not built."""

from collections.abc import Callable

from peer.errors import BadConfiguration
from swarmoe.command_line import Invocation


def unbuilt(name: str, purpose: str) -> Callable[[Invocation], int]:
    """A command that says so and ends as a usage error."""

    def start(invocation: Invocation) -> int:
        raise BadConfiguration(f"swarmoe {name} is not built yet")

    start.__doc__ = f"{purpose}: not built yet."
    return start
