"""A swarm this process has joined, and the one layer that puts it into a PyTorch model: what users import.

with join("203.0.113.5:4700") as swarm:
    moe = RemoteMoE(swarm, layer=0, router="mixtral")
    loss = model_with(moe)(x).mean() + moe.loss
    loss.backward()  # the experts have learnt, wherever they are
"""

from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Self

import torch

from experts.registry import expert_kind
from peer.bootstrap import parse_join
from peer.errors import BadConfiguration
from peer.event_loop import EventLoopThread
from peer.held import Held
from peer.hosting import LayerHosts
from peer.identity import Identity
from peer.library_logging import log_like_a_library
from peer.manifest import RunManifest
from peer.membership import Membership, membership
from peer.snapshot import DirectorySnapshot
from peer.supervisor import DhtSupervisor
from trainer.absences import Absences
from trainer.moe import MoELayer
from trainer.remote_experts import RemoteExperts
from trainer.routing.presets import build_router
from trainer.routing.router import Router
from trainer.routing.view import View

LEAVE_WITHIN_S = 5.0


class Swarm:
    """An open membership seen from training threads. Made by `join`; a context manager."""

    def __init__(self, loop: EventLoopThread, held: Held[Membership], member: Membership) -> None:
        self._loop = loop
        self._held = held
        self.member = member
        self.experts = RemoteExperts(
            run_id=member.manifest.run_id,
            wire=member.manifest.wire,
            transport=member.transport,
            directory=member.directory,
            loop=loop,
        )

    @property
    def manifest(self) -> RunManifest:
        """What this swarm trains."""
        return self.member.manifest

    def snapshot(self) -> DirectorySnapshot:
        """The swarm as last seen. Never blocks."""
        return self.member.directory.snapshot()

    def view(self, layer: int) -> View:
        """Which experts of a layer can be called now, and how much each wants. Never blocks."""
        return view_of(self.snapshot(), layer, self.manifest.experts_per_layer, self.experts.absences)

    def experts_alive(self) -> int:
        """Experts of the run that can be called now."""
        return self._num_live(self.snapshot())

    def wait_until(self, predicate: Callable[[DirectorySnapshot], bool], *, timeout_s: float) -> bool:
        """Block until the directory shows it; False when it did not in time."""
        waiting = self.member.directory.wait_until(predicate, timeout_s)
        try:
            return self._loop.run(waiting, timeout_s=timeout_s + 1.0) is not None
        except TimeoutError:  # the loop is too busy even to say no
            return False

    def wait_for_experts(self, *, timeout_s: float, at_least: int | None = None) -> bool:
        """Block until so many experts of the run (none: every one) can be called; False when they cannot in time."""
        num_experts = self.manifest.num_experts
        wanted = num_experts if at_least is None else min(at_least, num_experts)
        return self.wait_until(lambda snapshot: self._num_live(snapshot) >= wanted, timeout_s=timeout_s)

    def close(self) -> None:
        """Leave. Blocks for a moment."""
        try:
            self._held.close()
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _num_live(self, snapshot: DirectorySnapshot) -> int:
        absent = self.experts.absences.absent(snapshot)
        num_experts = self.manifest.experts_per_layer
        layers = (snapshot.layer(layer, num_experts, without=absent) for layer in range(self.manifest.moe_layers))
        return sum(int(hosts.is_served_E.sum()) for hosts in layers)


def join(*addresses: str, timeout_s: float = 30.0) -> Swarm:
    """Join the swarm that answers at any of these `HOST:PORT[/KEY]`, as a member that trains and hosts nothing.

    Blocks. Raises ValueError for what is no address, CouldNotJoin, ManifestMismatch. Close it, or use it as a context.
    """
    log_like_a_library()
    joins = [parse_join(address) for address in addresses]
    supervisor = DhtSupervisor.spawn()
    loop = EventLoopThread().start()
    opening = membership(joins, identity=Identity.generate(), supervisor=supervisor, timeout_s=timeout_s)
    held = Held(loop, opening, leave_timeout_s=LEAVE_WITHIN_S)
    try:
        member = held.open()
    except BaseException:
        loop.close()
        raise
    assert member is not None, "nobody was there to stop it"
    return Swarm(loop, held, member)


class RemoteMoE(MoELayer):
    """A drop-in layer over the experts of one mixture layer of a swarm: (..., D) -> (..., D), differentiable.

    `router` is a preset's name, a Router of yours, or none for the run's own. Its gradients are yours to apply; the
    experts learn where they are, by the mean of the losses you call `backward` on.
    """

    def __init__(self, swarm: Swarm, layer: int = 0, router: str | Router | None = None) -> None:
        manifest = swarm.manifest
        if not 0 <= layer < manifest.moe_layers:
            raise ValueError(f"this run has {manifest.moe_layers} mixture layers, from 0; there is no layer {layer}")
        super().__init__(
            layer,
            router if isinstance(router, Router) else router_for(manifest, layer, preset=router),
            swarm.experts,
            swarm.view,
            timeout_s=manifest.wire.step_timeout_s,
            whole_sequences=sees_sequences(manifest),
        )


def sees_sequences(manifest: RunManifest) -> bool:
    """Whether the run's experts see sequences. BadConfiguration when their kind is not installed here."""
    try:
        return expert_kind(manifest.expert.kind).is_sequence_level
    except ValueError as error:
        raise BadConfiguration(f"this run's experts are of a kind that this installation lacks: {error}") from None


def router_for(manifest: RunManifest, layer: int, *, preset: str | None = None) -> Router:
    """The router of one layer: the run's own, or another preset with its own settings. The same on every trainer."""
    own = preset is None
    return build_router(
        manifest.router.preset if preset is None else preset,
        dim=manifest.model.dim,
        num_experts=manifest.experts_per_layer,
        top_k=manifest.router.top_k if own else None,
        balance=manifest.router.balance if own else None,
        seed=(manifest.seed << 16) + layer,
    )


def view_of(snapshot: DirectorySnapshot, layer: int, num_experts: int, absences: Absences) -> View:
    """One layer as routers read it. An expert is alive when somebody whom we have not missed takes calls for it."""
    return _view(layer, snapshot.layer(layer, num_experts, without=absences.absent(snapshot)))


@lru_cache(maxsize=64)
def _view(layer: int, hosts: LayerHosts) -> View:
    """Made once for as long as nobody says anything new about hosting: the same hosts are then the same object."""
    return View.of(
        layer,
        torch.from_numpy(hosts.is_served_E),
        capacity=torch.from_numpy(hosts.share_E),
        bias=torch.from_numpy(hosts.bias_E),
    )
