"""`swarmoe peer`"""

from peer.settings import PeerSettings
from swarmoe.command_line import Invocation


def start(invocation: Invocation) -> int:
    """Host experts for a swarm. Ctrl+C leaves in good order."""
    settings = invocation.settings(PeerSettings)
    from peer.daemon import run_peer  # torch and hivemind take seconds to import

    return run_peer(settings)
