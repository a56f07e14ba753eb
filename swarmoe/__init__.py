"""swarmoe: train one Mixture-of-Experts model together. The public face: re-exports, no logic.

Names are imported when they are first asked for: torch and hivemind take seconds, and `swarmoe --help` needs neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experts.registry import register_expert
    from trainer.routing import presets as routers
    from trainer.swarm import RemoteMoE, Swarm, join

__version__ = "0.1.0"
__all__ = ["RemoteMoE", "Swarm", "__version__", "join", "register_expert", "routers"]


def __getattr__(name: str) -> Any:
    if name in {"join", "RemoteMoE", "Swarm"}:
        from trainer import swarm

        return getattr(swarm, name)
    if name == "register_expert":
        from experts.registry import register_expert

        return register_expert
    if name == "routers":
        from trainer.routing import presets

        return presets
    raise AttributeError(f"module 'swarmoe' has no attribute {name!r}")
