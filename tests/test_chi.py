"""How busy a link lets a device be, against the worked example of the design and the codecs as they are."""

import itertools
from typing import get_args

import pytest
from pydantic import ValidationError

from experts.registry import expert_kind
from experts.settings import ExpertShape
from peer.chi import (
    Chi,
    bits_per_token,
    bits_per_value,
    break_even_tokens,
    chi_of,
    needed_bits_per_s,
    percent,
    si,
    verdict,
)
from peer.manifest import ModelSettings, RunManifest, WireCodec, WireSettings
from peer.rates import MeasuredDevice, MeasuredLink, Rates
from peer.remedies import remedies
from peer.wire_codecs import Codec, DType, size_bytes

INT8 = WireSettings(forward_codec="int8", backward_codec="int8")
FP32 = WireSettings(forward_codec="fp32", backward_codec="fp32")
FFN_4096 = ExpertShape(kind="ffn", dim=4096, hidden=4 * 4096)
"""alpha 8"""
RTX_3090_FLOPS_PER_S = 35e12
RUN = RunManifest(expert=ExpertShape(kind="ffn", dim=512, hidden=2048), model=ModelSettings(dim=512), wire=FP32)


def tokens_per_s(shape: ExpertShape, flops_per_s: float) -> float:
    return flops_per_s / (3 * expert_kind(shape.kind).flops_per_token(shape, context=128))


def test_the_worked_example_needs_2_9_gigabits_and_idles_97_percent_of_the_time_behind_100_megabits() -> None:
    needed = needed_bits_per_s(tokens_per_s(FFN_4096, RTX_3090_FLOPS_PER_S), INT8, dim=4096)

    assert needed == pytest.approx(2.9e9, rel=0.02)
    assert needed == pytest.approx(2 * 8.0625 * RTX_3090_FLOPS_PER_S / (6 * 8 * 4096))
    assert 1 - Chi(100e6, needed).utilisation == pytest.approx(0.97, abs=0.005)


def test_the_published_2_1_gigabits_of_8_bits_and_8_flops_per_parameter_are_the_same_law() -> None:
    """With the forward computed again for the backward, a trip takes 8 P and the link needs 6 / 8 of that."""
    needed = needed_bits_per_s(tokens_per_s(FFN_4096, RTX_3090_FLOPS_PER_S), INT8, dim=4096)

    assert needed * (6 / 8) * (8 / 8.0625) == pytest.approx(2.1e9, rel=0.02)


@pytest.mark.parametrize("dim", [8, 100, 256, 300, 512, 4096])
@pytest.mark.parametrize("codec", get_args(WireCodec))
def test_bits_a_value_are_those_of_the_codec(codec: WireCodec, dim: int) -> None:
    num_rows = 1 << 20  # so that a scale of the whole tensor does not count

    size = size_bytes(DType.FLOAT32, Codec.named(codec), (num_rows, dim))

    assert bits_per_value(codec, dim=dim) == pytest.approx(8 * size / (num_rows * dim), rel=1e-6)


def test_a_token_costs_the_mean_of_both_passes_each_way() -> None:
    mixed = WireSettings(forward_codec="int8", backward_codec="bf16")

    assert bits_per_token(mixed, dim=512) == 512 * (8.0625 + 16)
    assert bits_per_token(mixed, dim=512) == (bits_per_token(INT8, dim=512) + 2 * 512 * 16) / 2


def test_the_slower_way_decides() -> None:
    link = MeasuredLink(up_bits_per_s=1e6, down_bits_per_s=1e9, latency_ms=20.0)
    device = MeasuredDevice(tokens_per_s=1e3, flops_per_s=1e9)

    chi = chi_of(Rates(link=link, device=device), INT8, dim=256)

    assert chi is not None
    assert chi.link_bits_per_s == 1e6
    assert chi.value == pytest.approx(1e6 / (1e3 * 2 * 256 * 8.0625))


@pytest.mark.parametrize(
    "rates",
    [
        Rates(),
        Rates(link=MeasuredLink(up_bits_per_s=1.0, down_bits_per_s=1.0, latency_ms=0.0)),
        Rates(device=MeasuredDevice(tokens_per_s=1.0, flops_per_s=1.0)),
    ],
)
def test_without_a_link_or_a_device_there_is_no_chi(rates: Rates) -> None:
    assert chi_of(rates, INT8, dim=256) is None


def test_real_calls_refine_what_a_device_achieves() -> None:
    link = MeasuredLink(up_bits_per_s=1.0, down_bits_per_s=1.0, latency_ms=0.0)
    at_start = Rates(link=link, device=MeasuredDevice(tokens_per_s=1e3, flops_per_s=6e9))

    refined = at_start.refined(2e3)

    assert refined == Rates(link=link, device=MeasuredDevice(tokens_per_s=2e3, flops_per_s=12e9))
    assert at_start.refined(None) == at_start
    assert Rates(link=link).refined(2e3) == Rates(link=link)


@pytest.mark.parametrize(("value", "utilisation", "is_low"), [(0.1, 0.1, True), (0.2, 0.2, False), (7.0, 1.0, False)])
def test_a_device_is_busy_as_often_as_chi_says_and_at_most_always(
    value: float, utilisation: float, is_low: bool
) -> None:
    chi = Chi(value, 1.0)

    assert (chi.utilisation, chi.is_low) == (utilisation, is_low)


def test_at_equal_precision_tokens_and_replica_are_even_at_alpha_d_over_2() -> None:
    num_parameters = expert_kind("ffn").num_parameters(FFN_4096)

    assert break_even_tokens(num_parameters, FP32, dim=4096, sync_bits_per_parameter=32) == 8 * 4096 / 2


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.037, "busy 3.7 % of the time"), (0.5, "busy 50 % of the time"), (1.0, "not hold"), (12.0, "not hold")],
)
def test_the_verdict_is_a_sentence(value: float, said: str) -> None:
    link = MeasuredLink(up_bits_per_s=value * 1e9, down_bits_per_s=1e12, latency_ms=1.0)
    device = MeasuredDevice(tokens_per_s=1.0, flops_per_s=35e12)

    sentence = verdict(Chi(value * 1e9, 1e9), link, device, experts="ffn experts of 512 x 2048")

    assert said in sentence
    assert "at 35 TFLOP/s could use 1 Gbit/s" in sentence


def test_each_remedy_is_worth_what_it_says() -> None:
    chi = Chi(1e6, 1e8)

    codec, larger, blocks, resident = remedies(RUN, chi)

    assert codec == f"int8 on the wire both ways: busy {percent(0.01 * 32 / 8.0625)} of the time"
    assert larger.startswith("experts with 64 times the hidden width, 131072 (134 M parameters each): busy 64 %")
    num_blocks = int(blocks.split()[2])
    stack = ExpertShape(kind="stack", dim=512, hidden=2048, blocks=num_blocks)
    gain = tokens_per_s(RUN.expert, 1.0) / tokens_per_s(stack, 1.0)
    assert 0.5 <= 0.01 * gain < 0.5 + gain / num_blocks * 0.01
    assert percent(0.01 * gain) in blocks
    assert "not built yet" in resident
    assert f"more than {2 * 512 * 2048 * 16 / (2 * 512 * 32):,.0f} tokens" in resident


def test_who_sends_int8_already_and_has_the_largest_experts_is_told_neither() -> None:
    run = RUN.model_copy(update={"wire": INT8, "expert": RUN.expert.model_copy(update={"hidden": 1 << 20})})

    said = remedies(run, Chi(1e6, 1e8))

    assert not any("int8" in remedy or "hidden width" in remedy for remedy in said)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5 bit/s"), (999.6, "1 kbit/s"), (2.87e9, "2.87 Gbit/s"), (35e12, "35 Tbit/s"), (1e18, "1e+03 Pbit/s")],
)
def test_rates_have_three_digits(value: float, text: str) -> None:
    assert si(value, "bit/s") == text


@pytest.mark.parametrize(("share", "text"), [(0.0004, "0.04 %"), (0.42, "42 %"), (0.994, "99 %"), (1.0, "100 %")])
def test_shares_have_two(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(("up_bits_per_s", "down_bits_per_s"), (0.0, 1e-300)),
        *itertools.product(
            ("up_bits_per_s", "down_bits_per_s", "latency_ms"),
            (-1.0, 1e300, float("nan"), float("inf"), None, "fast"),
        ),
    ],
)
def test_a_link_out_of_bounds_is_none(field: str, value: object) -> None:
    plain = {"up_bits_per_s": 1.0, "down_bits_per_s": 1.0, "latency_ms": 1.0}

    with pytest.raises(ValidationError):
        MeasuredLink.model_validate({**plain, field: value})


@pytest.mark.hostile
def test_whatever_may_be_measured_makes_a_finite_chi() -> None:
    for link, device in ((1e18, 1e-3), (1e-3, 1e18)):
        rates = Rates(
            link=MeasuredLink(up_bits_per_s=link, down_bits_per_s=link, latency_ms=0.0),
            device=MeasuredDevice(tokens_per_s=device, flops_per_s=device),
        )
        chi = chi_of(rates, INT8, dim=1)
        assert chi is not None
        assert 0 < chi.value < float("inf")
