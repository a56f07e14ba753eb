"""Sampled text: seeded, cropped to the context, and never outside what top-k and top-p allow."""

from contextlib import nullcontext

import pytest
import torch

from tests.tiny_trunk import tiny_trunk
from trainer.model import TransformerLM
from trainer.sampling import choose, sample_text

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def draw_many(
    count: int = 60, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [
        choose(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator) for _ in range(count)
    ]


def sample(model: TransformerLM, prompt: str = "ab", *, seed: int = 0, num_bytes: int = 20) -> str:
    return sample_text(model, prompt, num_bytes=num_bytes, temperature=1.0, seed=seed, eval_calls=nullcontext)


def test_bytes_are_drawn_as_often_as_they_are_likely() -> None:
    drawn = draw_many(400)

    assert [drawn.count(token) / 400 for token in range(4)] == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.06)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draw_many(temperature=0.0)) == {1}


def test_a_low_temperature_makes_the_likely_likelier() -> None:
    assert draw_many(200, temperature=0.25).count(1) > 1.4 * draw_many(200).count(1)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draw_many(top_k=2)) == {1, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, {1}), (0.39, {1}), (0.41, {1, 3}), (0.95, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_hold_its_share(top_p: float, kept: set[int]) -> None:
    assert set(draw_many(top_p=top_p)) == kept


def test_top_p_counts_within_what_top_k_kept() -> None:
    assert set(draw_many(top_k=2, top_p=0.56)) == {1}


def test_the_seed_decides_the_text_and_the_global_generator_nothing() -> None:
    model = tiny_trunk()
    first = sample(model, seed=1)
    torch.manual_seed(99)

    assert sample(model, seed=1) == first
    assert sample(model, seed=2) != first
    assert first.startswith("ab")


def test_a_prompt_longer_than_the_context_is_cropped_to_its_end() -> None:
    model = tiny_trunk(context=4)
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].tolist()))

    sample(model, "abcdef", num_bytes=2)

    assert seen[0] == list(b"cdef")
    assert seen[1][:3] == list(b"def")


def test_an_empty_prompt_starts_on_a_new_line() -> None:
    model = tiny_trunk()
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].tolist()))

    sample(model, "", num_bytes=1)

    assert seen == [[ord("\n")]]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    model = tiny_trunk()
    model.register_forward_hook(lambda _, __, logits_BSV: torch.eye(256)[255].expand_as(logits_BSV) * 1e9)

    assert sample(model, "é", num_bytes=2) == "é\ufffd\ufffd"
