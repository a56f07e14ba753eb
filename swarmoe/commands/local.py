"""`swarmoe local`"""

from swarmoe.command_line import Invocation
from swarmoe.run_presets import run_manifest
from swarmoe.settings import LocalSettings


def start(invocation: Invocation) -> int:
    """Train with a whole swarm on this machine. Every member is a process of its own; ends with a verdict."""
    settings = invocation.settings(LocalSettings)
    manifest, _ = run_manifest(invocation.given, preset=settings.preset)
    from swarmoe.local_swarm import run_local

    return run_local(settings, manifest)
