"""Held-out bits per byte: the right mean, and nothing learns from it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from tests.tiny_trunk import tiny_trunk
from trainer.evaluate import bits_per_byte


def windows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    text_WS = torch.randint(256, (count, 9), generator=torch.Generator().manual_seed(3))
    return text_WS[:, :-1], text_WS[:, 1:]


def test_a_model_that_knows_nothing_needs_eight_bits_for_a_byte() -> None:
    model = tiny_trunk()
    torch.nn.init.zeros_(model.lm_head.weight)

    assert bits_per_byte(model, windows(5), sequences=2, eval_calls=nullcontext) == pytest.approx(8.0)


def test_it_is_the_mean_over_bytes_however_they_are_batched() -> None:
    model = tiny_trunk()
    tokens_WS, targets_WS = windows(5)
    loss, num_tokens = model.loss_sum(tokens_WS, targets_WS)

    in_pairs = bits_per_byte(model, (tokens_WS, targets_WS), sequences=2, eval_calls=nullcontext)

    assert in_pairs == pytest.approx(loss.item() / math.log(2) / num_tokens)


def test_every_forward_runs_in_its_own_context_without_a_graph_in_evaluation_mode() -> None:
    model = tiny_trunk()
    seen: list[tuple[bool, bool]] = []

    @contextmanager
    def eval_calls() -> Iterator[None]:
        seen.append((model.training, torch.is_grad_enabled()))
        yield

    bits_per_byte(model, windows(5), sequences=2, eval_calls=eval_calls)

    assert seen == [(False, False)] * 3
    assert model.training
    assert torch.is_grad_enabled()


def test_the_mode_is_put_back_when_a_forward_fails() -> None:
    model = tiny_trunk(context=4)

    with pytest.raises(ValueError, match="do not fit the context"):
        bits_per_byte(model, windows(1), sequences=1, eval_calls=nullcontext)

    assert model.training
