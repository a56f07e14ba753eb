"""The mixture layer in anybody's model: `.backward()`, a mean loss, threads, evaluation, nobody there."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.swarm import DIM, MemorySwarm, local_experts, seeded, tiny_run
from trainer.moe import MoELayer
from trainer.routing.view import View
from trainer.swarm import router_for

X_BSD = torch.randn(2, 5, DIM, generator=seeded(0))


@pytest.fixture
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm(virtual=True) as swarm:
        swarm.spread_over(3)
        yield swarm


def local_moe(experts=None, *, num_experts: int = 6) -> MoELayer:
    manifest = tiny_run(experts_per_layer=num_experts)
    return MoELayer(
        0,
        router_for(manifest, 0),
        experts or local_experts(manifest),
        lambda layer: View.all_alive(layer, num_experts),
        timeout_s=5.0,
    )


class SomebodysModel(nn.Module):
    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        self.moe = moe
        self.after = nn.Linear(DIM, 1)

    def forward(self, x):
        hidden = self.before(x)
        return self.after(hidden + self.moe(hidden))


def trained(model: SomebodysModel, *, steps: int = 15) -> list[float]:
    """Fits a mean loss, as anybody would."""
    losses = []
    for _ in range(steps):
        loss = (model(X_BSD) - X_BSD.sum(-1, keepdim=True)).square().mean()
        losses.append(loss.item())
        (loss + model.moe.loss).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        model.zero_grad()
    return losses


def test_in_a_plain_model_it_trains_as_the_same_experts_in_this_process_do(swarm: MemorySwarm) -> None:
    torch.manual_seed(5)
    remote = SomebodysModel(swarm.moe())
    torch.manual_seed(5)
    local = SomebodysModel(local_moe())

    losses = trained(remote)

    assert losses == pytest.approx(trained(local), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    assert remote.moe.ledger.read().backwards["applied"] == 45
    for ours, theirs in zip(remote.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(DIM,), (7, DIM), (2, 5, DIM), (2, 3, 4, DIM)])
def test_any_leading_shape_comes_back_as_it_went(swarm: MemorySwarm, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=seeded(1))

    y = swarm.moe()(x)

    assert y.shape == shape
    torch.testing.assert_close(y, local_moe()(x))


def test_tokens_that_need_no_gradient_still_teach_the_experts_and_the_router(swarm: MemorySwarm) -> None:
    moe = swarm.moe()

    moe(X_BSD).square().mean().backward()

    assert any(version == 1 for version in swarm.versions().values())
    assert all(parameter.grad.any() for parameter in moe.parameters())


def test_the_same_holds_for_experts_in_this_process() -> None:
    experts = local_experts(tiny_run())

    local_moe(experts)(X_BSD).square().mean().backward()

    assert any(experts._bank.version(uid) for uid in experts._bank.uids)


@pytest.mark.parametrize("where", ["remote", "local"])
def test_evaluation_teaches_nobody_and_has_no_way_back(swarm: MemorySwarm, where: str) -> None:
    moe = (swarm.moe() if where == "remote" else local_moe()).eval()

    y = moe(X_BSD.clone().requires_grad_())

    with pytest.raises(RuntimeError, match="evaluation"):
        y.sum().backward()
    assert set(swarm.versions().values()) == {0}
    assert moe.ledger.read().calls["sent"] == 0


@pytest.mark.parametrize("where", ["remote", "local"])
def test_there_is_one_way_back_per_forward(swarm: MemorySwarm, where: str) -> None:
    moe = swarm.moe() if where == "remote" else local_moe()
    y = moe(X_BSD)
    y.sum().backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="once per forward"):
        y.sum().backward()


def test_without_gradients_a_training_model_teaches_nobody(swarm: MemorySwarm) -> None:
    moe = swarm.moe()

    with torch.no_grad():
        y = moe(X_BSD)

    assert not y.requires_grad
    assert moe.ledger.read().calls["sent"] == 0
    assert all(peer.host._compute.kept_bytes == 0 for peer in swarm.peers)


def test_metrics_say_what_became_of_the_pairs(swarm: MemorySwarm) -> None:
    moe = swarm.moe()
    swarm.faults.take_down(swarm.peers[0].peer_id)

    y = moe(X_BSD)

    lost = moe.metrics.pairs_sent - moe.metrics.pairs_answered
    assert moe.metrics.pairs_sent == 20
    assert 0 < lost < 20
    assert moe.metrics.experts_alive == 6
    assert moe.metrics.tokens_without_answer == int((y.flatten(0, 1) == 0).all(-1).sum())
    moe(X_BSD)
    assert moe.metrics.experts_alive == 4  # those of the silent peer are believed gone


def test_where_nobody_lives_the_layer_adds_nothing_and_has_a_finite_loss() -> None:
    with MemorySwarm(virtual=True) as swarm:
        moe, x_BSD = swarm.moe(), X_BSD.clone().requires_grad_()

        y_BSD = moe(x_BSD)
        (y_BSD.sum() + moe.loss).backward()

        assert not y_BSD.any()
        assert moe.metrics.experts_alive == 0
        assert moe.metrics.tokens_without_answer == 10
        assert moe.loss.isfinite()
        assert x_BSD.grad.isfinite().all()


def test_loss_and_metrics_are_those_of_the_threads_own_last_forward() -> None:
    moe, elsewhere = local_moe(), []
    moe(X_BSD)
    mine = moe.loss

    def other() -> None:
        with pytest.raises(RuntimeError, match="this thread's last forward"):
            _ = moe.loss
        moe(X_BSD[:1])
        elsewhere.append((moe.loss, moe.metrics))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()

    (their_loss, their_metrics) = elsewhere[0]
    assert their_metrics.pairs_sent == 10
    assert moe.metrics.pairs_sent == 20
    assert moe.loss is mine
    assert their_loss.item() != mine.item()


def test_before_the_first_forward_there_is_no_loss() -> None:
    with pytest.raises(RuntimeError, match="there was none"):
        _ = local_moe().metrics


def test_the_balance_loss_teaches_the_router() -> None:
    moe = local_moe()
    moe(X_BSD)

    moe.loss.backward()

    assert moe.loss > 0
    assert all(parameter.grad.any() for parameter in moe.router.parameters())


def test_outside_a_training_loop_a_router_learns_from_each_training_forward_at_once() -> None:
    moe = local_moe()
    seed = int(moe.router.draw_seed)

    moe(X_BSD)
    assert int(moe.router.draw_seed) == seed + 1

    moe.eval()(X_BSD)
    assert int(moe.router.draw_seed) == seed + 1
