"""`swarmoe coordinator`"""

from coordinator.settings import CoordinatorSettings
from swarmoe.command_line import Invocation
from swarmoe.run_presets import run_manifest


def start(invocation: Invocation) -> int:
    """Start a run. Introduces its members to each other and shows them on a page."""
    settings = invocation.settings(CoordinatorSettings)
    manifest, _ = run_manifest(invocation.given, preset=settings.preset, file=settings.run)
    from coordinator.daemon import run_coordinator  # hivemind takes seconds to import

    return run_coordinator(settings, manifest)
