"""A run's model put together from its manifest: the trunk, a router per mixture layer, and what steps them."""

from collections.abc import Callable

from peer.manifest import RunManifest
from trainer.model import TransformerLM
from trainer.moe import MoELayer
from trainer.remote_experts import Experts
from trainer.routing.view import View
from trainer.swarm import router_for, sees_sequences
from trainer.trunk_optimizer import TrunkOptimizer


def build_model(manifest: RunManifest, experts: Experts, view: Callable[[int], View]) -> TransformerLM:
    """The same trunk and routers on every trainer of the run; where the experts are is the caller's."""

    def make_moe(layer: int) -> MoELayer:
        router = router_for(manifest, layer)
        return MoELayer(
            layer,
            router,
            experts,
            view,
            timeout_s=manifest.wire.step_timeout_s,
            whole_sequences=sees_sequences(manifest),
        )

    return TransformerLM(manifest.model, moe_layers=manifest.moe_layers, make_moe=make_moe, seed=manifest.seed)


def build_optimizer(manifest: RunManifest, model: TransformerLM) -> TrunkOptimizer:
    """Over everything a trainer owns; experts step themselves."""
    return TrunkOptimizer(
        dict(model.named_parameters()), routers=model.router_parameters(), settings=manifest.trunk_optimizer
    )
