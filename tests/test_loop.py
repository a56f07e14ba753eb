"""One training step: in flight together, added in order, refused as a whole."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peer.manifest import TrunkOptimizerSettings
from tests.swarm import local_experts, local_training_loop, step_of, tiny_run, training_loop_of
from trainer.loop import TrainingLoop
from trainer.routing.plan import Plan
from trainer.routing.view import View
from trainer.scope import MicroBatch

TOKENS = 4 * 16
"""Of a micro-batch: sequences times context."""


class WatchedExperts:
    """Returns what it was given, says when it was called forward and backward, and does something on the way."""

    def __init__(self, on_forward: Callable[[MicroBatch], object] = lambda _: None) -> None:
        self.events: list[str] = []
        self.loss_tokens: set[float] = set()
        self.answers = True
        self._on_forward = on_forward

    def run(self, x_TD: Tensor, plan: Plan, layer: int, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        self.events.append("forward")
        self.loss_tokens.add(micro_batch.loss_tokens)
        self._on_forward(micro_batch)
        answered = plan.num_pairs if self.answers else 0
        micro_batch.scope.answered(layer, sent=plan.num_pairs, answered=answered)
        out_ND = plan.dispatch(x_TD)
        if out_ND.requires_grad:
            out_ND.register_hook(lambda _: self.events.append("backward"))
        return out_ND, torch.full((plan.num_pairs,), self.answers)


def watched_loop(experts: WatchedExperts, *, micro_batches: int = 3, **fields) -> TrainingLoop:
    manifest = tiny_run(micro_batches=micro_batches, **fields)
    return training_loop_of(manifest, experts, lambda layer: View.all_alive(layer, manifest.experts_per_layer))


def state_of(loop: TrainingLoop) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loop.model.state_dict().items()}


def assert_unchanged(loop: TrainingLoop, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())


def test_no_backward_is_sent_before_every_forward_is_in() -> None:
    experts = WatchedExperts()
    with watched_loop(experts) as loop:
        outcome = loop.step(0)

    assert outcome.skipped is None
    assert experts.events == ["forward"] * 6 + ["backward"] * 6


def test_micro_batches_are_in_flight_together() -> None:
    together = threading.Barrier(3)
    experts = WatchedExperts(lambda _: together.wait(timeout=10.0))

    with watched_loop(experts) as loop:
        loop.step(0)  # a micro-batch that waited for another to end would break the barrier

    assert not together.broken


def test_workers_run_their_own_backwards() -> None:
    settings: set[bool] = set()
    experts = WatchedExperts(lambda _: settings.add(torch.autograd.is_multithreading_enabled()))

    with watched_loop(experts) as loop:
        loop.step(0)

    assert settings == {False}
    assert torch.autograd.is_multithreading_enabled()


def test_experts_are_told_how_many_tokens_their_gradient_is_of() -> None:
    experts = WatchedExperts()

    with watched_loop(experts) as loop:
        outcome = loop.step(0)

    assert experts.loss_tokens == {float(TOKENS)}
    assert outcome.tokens == 3 * TOKENS


def test_the_trunk_steps_along_the_mean_over_all_tokens_of_the_step() -> None:
    plain = TrunkOptimizerSettings(
        learning_rate=1.0, betas=(0.0, 0.0), eps=1e3, warmup_steps=0, weight_decay=0.0, clip_norm=1e9
    )  # so large an epsilon makes AdamW step along the gradient
    router = {"preset": "mixtral", "top_k": 2, "balance": 5.0}
    with watched_loop(WatchedExperts(), trunk=plain, router=router) as loop:
        before, model = state_of(loop), loop.model
        total = 0.0
        for index in range(3):
            tokens_BS, targets_BS = loop.data.batch(0, index, trainer_shard=7, sequences=4, seed=0)
            with MicroBatch(step_of().scope, index).activate():
                loss, num_tokens = model.loss_sum(tokens_BS, targets_BS)
                total = total + loss + sum(layer.loss for layer in model.moe_modules()) * num_tokens
        parameters = dict(model.named_parameters())
        mean = torch.autograd.grad(total / (3 * TOKENS), parameters.values(), allow_unused=True)

        loop.step(0)

        for (name, parameter), gradient in zip(parameters.items(), mean, strict=True):
            if gradient is not None and not name.endswith("router.score.weight_ED"):  # routers are clipped
                torch.testing.assert_close((before[name] - parameter) * 1e3, gradient, rtol=1e-2, atol=1e-3)


def test_the_same_steps_give_the_same_trunk_bit_for_bit() -> None:
    states = []
    for _ in range(2):
        with watched_loop(WatchedExperts()) as loop:
            losses = [loop.step(step).bits_per_byte for step in range(4)]
            states.append((losses, state_of(loop)))

    (losses, first), (losses_again, second) = states

    assert losses == losses_again
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_routers_learn_once_per_micro_batch_when_the_step_is_over() -> None:
    with local_training_loop(tiny_run(router={"preset": "deepseek_v3", "top_k": 2})) as loop:
        before = state_of(loop)

        loop.step(0)

        biases = [name for name in before if name.endswith("bias_E")]
        seeds = [name for name in before if name.endswith("draw_seed")]
        after = loop.model.state_dict()
        assert len(biases) == len(seeds) == 2
        assert all(not torch.equal(after[name], before[name]) for name in biases)
        assert all(after[name] == before[name] + 1 for name in seeds)


def test_a_step_of_which_too_little_came_back_changes_nothing_and_says_where() -> None:
    experts = WatchedExperts()
    with watched_loop(experts) as loop:
        loop.step(0)
        before, experts.answers, experts.events[:] = state_of(loop), False, []

        outcome = loop.step(1)

        assert outcome.skipped == "layer 0: only 0 of 384 pairs came back"
        assert outcome.tokens == 0
        assert outcome.bits_per_byte is not None
        assert "backward" not in experts.events
        assert_unchanged(loop, before)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    experts = WatchedExperts()
    with watched_loop(experts) as loop:
        with torch.no_grad():
            loop.model.lm_head.weight[3, 3] = torch.inf
        before = state_of(loop)

        outcome = loop.step(0)

        assert outcome.skipped == "the loss is not finite"
        assert outcome.bits_per_byte is None
        assert "backward" not in experts.events
        assert_unchanged(loop, before)


def test_a_gradient_that_is_not_finite_leaves_the_trunk_as_it_was() -> None:
    with watched_loop(WatchedExperts()) as loop:
        loop.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
        before = state_of(loop)

        outcome = loop.step(0)

        assert outcome.skipped == "the trunk's gradient is not finite"
        assert outcome.tokens == 0
        assert_unchanged(loop, before)


def test_a_bug_in_a_worker_comes_out_of_the_step() -> None:
    def fail(_: MicroBatch) -> None:
        raise ZeroDivisionError

    with watched_loop(WatchedExperts(fail)) as loop, pytest.raises(ZeroDivisionError):
        loop.step(0)


def test_with_experts_in_process_it_learns() -> None:
    with local_training_loop(tiny_run(), local_experts(tiny_run())) as loop:
        losses = [loop.step(step).bits_per_byte for step in range(12)]

    assert losses[-1] < losses[0] - 0.5
