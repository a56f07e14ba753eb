"""Codecs keep the bounds they state, for gradients of every size, and read whatever bytes come."""

import math
import struct

import pytest
import torch
from torch import Tensor

from peer.wire_codecs import Codec, DType, pack, size_bytes, unpack

F32 = DType.FLOAT32
LARGEST_IN_INT8 = 3.37e38
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def there_and_back(x_ND: Tensor, codec: Codec, *, dither_seed: int | None = None) -> Tensor:
    packed = bytearray(pack(x_ND, F32, codec, dither_seed=dither_seed))
    assert len(packed) == size_bytes(F32, codec, x_ND.shape)
    return unpack(packed, F32, codec, x_ND.shape, device=x_ND.device)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of_real_size(dim: int = 512) -> Tensor:
    """Rows whose maxima go from 1e-7 to 1e5, as a gradient's do; half of the values far below the others."""
    x_ND = normal(25, dim) * torch.logspace(-7, 5, 25).unsqueeze(1)
    x_ND[:, ::2] *= 1e-3
    return x_ND


def outliers(dim: int = 512) -> Tensor:
    """Small values, in every row one that is a hundred thousand times as large."""
    x_ND = normal(16, dim)
    x_ND[:, 7 % dim] *= 1e5
    return x_ND


GRADIENTS = {
    "rows from 1e-7 to 1e5": rows_of_real_size(),
    "all of 1e-7": normal(8, 256) * 1e-7,
    "all of 1e5": normal(8, 256) * 1e5,
    "mixed within each row": normal(8, 512) * torch.logspace(-7, 5, 512),
    "outliers": outliers(),
    "mostly zeros": normal(8, 512) * (normal(8, 512, seed=1) > 1.5),
    "zeros": torch.zeros(3, 300),
    "subnormal": normal(4, 256) * 1e-39,
    "nearly the largest": normal(4, 256).sign() * torch.linspace(0, LARGEST_IN_INT8, 256),
    "one row": normal(1, 512),
    "short last block": rows_of_real_size(700),
    "narrower than a block": rows_of_real_size(24),
    "one value in a row": rows_of_real_size(1),
    "more rows than a piece": normal(1100, 256) * 1e-3,
}

every_gradient = pytest.mark.parametrize("x_ND", GRADIENTS.values(), ids=GRADIENTS.keys())


def largest_in_block(x_ND: Tensor) -> Tensor:
    """A of each value: of its block of 256 in its row."""
    blocks = x_ND.abs().split(256, dim=1)
    return torch.cat([block.amax(1, keepdim=True).expand_as(block) for block in blocks], dim=1)


def test_fp32_is_exact_bit_for_bit() -> None:
    x_ND = rows_of_real_size()
    x_ND[0, :6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45])

    assert torch.equal(there_and_back(x_ND, Codec.RAW).view(torch.int32), x_ND.view(torch.int32))


@every_gradient
def test_bf16_is_within_its_bound(x_ND: Tensor) -> None:
    error_ND = (there_and_back(x_ND, Codec.BF16) - x_ND).abs()

    assert bool((error_ND <= torch.clamp(2**-8 * x_ND.abs(), min=2**-134)).all())


@every_gradient
def test_fp16_is_within_its_bound(x_ND: Tensor) -> None:
    error_ND = (there_and_back(x_ND, Codec.FP16).double() - x_ND).abs()

    floor = max(2**-39 * float(x_ND.abs().max()), 2**-151)
    assert bool((error_ND <= torch.clamp(2**-11 * x_ND.double().abs(), min=floor)).all())


@every_gradient
def test_int8_to_the_nearest_is_within_its_bound(x_ND: Tensor) -> None:
    error_ND = (there_and_back(x_ND, Codec.INT8).double() - x_ND).abs()

    assert bool((error_ND <= torch.clamp(largest_in_block(x_ND).double() / 252, min=2**-127)).all())


@every_gradient
def test_int8_at_random_is_within_its_bound(x_ND: Tensor) -> None:
    error_ND = (there_and_back(x_ND, Codec.INT8, dither_seed=1).double() - x_ND).abs()

    assert bool((error_ND < torch.clamp(largest_in_block(x_ND).double() / 126, min=2**-126)).all())


@pytest.mark.parametrize("codec", [Codec.BF16, Codec.FP16, Codec.INT8])
def test_a_codec_that_rounds_does_round(codec: Codec) -> None:
    x_ND = rows_of_real_size()

    assert not torch.equal(there_and_back(x_ND, codec), x_ND)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("seed", [None, 3])
def test_zeros_stay_zeros_beside_what_is_large(codec: Codec, seed: int | None) -> None:
    x_ND = torch.zeros(2, 300)
    x_ND[0, 5] = 1e5

    back_ND = there_and_back(x_ND, codec, dither_seed=seed)

    assert torch.equal(back_ND == 0, x_ND == 0)


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_no_int8_is_beyond_127(seed: int | None) -> None:
    """Largest magnitudes of every mantissa, so that scales round by every amount, up and down."""
    largest_N1 = torch.linspace(1, 2, 4099).unsqueeze(1)
    x_ND = torch.cat([largest_N1, -largest_N1, largest_N1.nextafter(torch.tensor(0.0))], dim=1)

    packed = pack(x_ND, F32, Codec.INT8, dither_seed=seed)

    values = torch.frombuffer(bytearray(packed[2 * 4099 :]), dtype=torch.int8)
    assert int(values.abs().min()) >= 125
    assert int(values.max()) <= 127
    assert int(values.min()) >= -127


def test_rounding_at_random_is_right_in_the_mean() -> None:
    x_ND = torch.linspace(-1, 1, 256).expand(64, 256).contiguous()
    rounds = 200

    mean_ND = (
        torch.stack([there_and_back(x_ND, Codec.INT8, dither_seed=seed) for seed in range(rounds)]).double().mean(0)
    )

    step = 1 / 126
    error_D = (mean_ND.mean(0) - x_ND[0]).abs()
    assert float(error_D.max()) < 4.5 * step * 0.5 / math.sqrt(rounds * 64)
    assert float((mean_ND - x_ND).abs().max()) < 5 * step * 0.5 / math.sqrt(rounds)


def test_at_random_keeps_in_the_mean_what_the_nearest_loses() -> None:
    x_ND = torch.full((512, 256), 1e-3)
    x_ND[:, 0] = 1.0

    nearest_ND = there_and_back(x_ND, Codec.INT8)[:, 1:]
    at_random_ND = there_and_back(x_ND, Codec.INT8, dither_seed=5)[:, 1:]

    assert not nearest_ND.any()
    assert float(at_random_ND.mean()) == pytest.approx(1e-3, rel=0.05)


def test_errors_at_random_do_not_repeat_from_row_to_row_or_from_seed_to_seed() -> None:
    x_ND = normal(1, 256).expand(4096, 256).contiguous()
    errors_ND = there_and_back(x_ND, Codec.INT8, dither_seed=1) - x_ND
    others_ND = there_and_back(x_ND, Codec.INT8, dither_seed=2) - x_ND

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    within_ND = errors_ND - errors_ND.mean(0)
    assert abs(correlation(within_ND[1:], within_ND[:-1])) < 0.005
    assert abs(correlation(within_ND, within_ND.roll(512, 0))) < 0.005
    assert abs(correlation(within_ND, others_ND - others_ND.mean(0))) < 0.005


def test_one_seed_rounds_one_way() -> None:
    x_ND = normal(1100, 256)

    once, again, other = (pack(x_ND, F32, Codec.INT8, dither_seed=seed) for seed in (7, 7, 8))

    assert once == again
    assert once != other


def test_bf16_is_infinite_above_its_range_and_rounds_ties_to_even() -> None:
    huge_ND = torch.tensor([[3.38e38, 3.4e38, -3.4e38]])
    ties_ND = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8]])

    assert there_and_back(huge_ND, Codec.BF16).isfinite().tolist() == [[True, False, False]]
    assert there_and_back(ties_ND, Codec.BF16).tolist() == [[1.0, 1 + 2**-6]]


@pytest.mark.parametrize("factor", [2.0**-133, 1e-7, 1.0, 1e5, 3e33])
def test_fp16_takes_its_largest_magnitude_at_any_scale(factor: float) -> None:
    """Whole numbers up to 2048 are exact, and a power of two for a scale loses none of that."""
    x_ND = torch.arange(-2048.0, 2049.0).unsqueeze(0) * 2.0 ** round(math.log2(factor))

    assert torch.equal(there_and_back(x_ND, Codec.FP16), x_ND)


@pytest.mark.parametrize("largest", [65504.0, 65505.0, 65519.0, 65520.0, 131007.0, 3.4e38])
def test_fp16_never_overflows_by_itself(largest: float) -> None:
    assert bool(there_and_back(torch.tensor([[largest, -1.0]]), Codec.FP16).isfinite().all())


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize(
    "bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F800000], ids=["nan", "max nan", "snan", "inf"]
)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("seed", [None, 1])
def test_what_is_not_finite_is_not_finite_on_the_other_side(
    codec: Codec, bits: int, negative: bool, seed: int | None
) -> None:
    x_ND = normal(3, 300)
    x_ND.view(torch.int32)[1, 290] = bits - (1 << 31) * negative

    assert not there_and_back(x_ND, codec, dither_seed=seed)[1].isfinite().all()


def _int8_bytes(scale: float, value: int) -> bytearray:
    return bytearray(struct.pack("<f", scale)[2:] + struct.pack("b", value))


@pytest.mark.hostile
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("value", [0, 1, -128])
def test_a_scale_that_is_not_finite_makes_no_finite_value(scale: float, value: int) -> None:
    int8 = unpack(_int8_bytes(scale, value), F32, Codec.INT8, (1, 1))
    fp16 = unpack(bytearray(struct.pack("<fe", scale, value)), F32, Codec.FP16, (1, 1))

    assert not int8.isfinite().any()
    assert not fp16.isfinite().any()


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("scale", "value", "read"),
    [(-0.5, 3, -1.5), (0.5, -128, -64.0), (0.0, 127, 0.0), (2.0**-133, 1, 2.0**-133), (-0.0, 5, -0.0)],
)
def test_other_scales_that_nobody_sends_make_values_that_anybody_may_send(
    scale: float, value: int, read: float
) -> None:
    assert unpack(_int8_bytes(scale, value), F32, Codec.INT8, (1, 1)).item() == read
    assert unpack(bytearray(struct.pack("<fe", scale, value)), F32, Codec.FP16, (1, 1)).item() == read


@pytest.mark.hostile
def test_a_scale_and_a_value_whose_product_is_too_large_are_infinite() -> None:
    assert unpack(_int8_bytes(3e38, 2), F32, Codec.INT8, (1, 1)).isinf().all()


@pytest.mark.parametrize(
    ("codec", "shape", "expected"),
    [
        (Codec.RAW, (3, 300), 3600),
        (Codec.BF16, (3, 300), 1800),
        (Codec.FP16, (3, 300), 1804),
        (Codec.INT8, (3, 300), 3 * (300 + 2 * 2)),
        (Codec.INT8, (3, 256), 3 * (256 + 2)),
        (Codec.INT8, (3, 257), 3 * (257 + 4)),
        (Codec.INT8, (3, 8), 3 * (8 + 2)),
        (Codec.INT8, (2**62, 2**62), 2**62 * (2**62 + 2**55)),
    ],
)
def test_a_tensor_takes_exactly_these_bytes(codec: Codec, shape: tuple[int, int], expected: int) -> None:
    assert size_bytes(F32, codec, shape) == expected


def test_int8_is_laid_out_as_the_protocol_says() -> None:
    x_ND = torch.zeros(2, 257)
    x_ND[0, 0], x_ND[0, 256], x_ND[1, 1], x_ND[1, 256] = 127.0, 1270.0, -12.7, 1e-40

    packed = bytearray(pack(x_ND, F32, Codec.INT8))

    scales = torch.frombuffer(packed, dtype=torch.bfloat16, count=4)
    values_ND = torch.frombuffer(packed, dtype=torch.int8, offset=8).view(2, 257)
    assert scales.tolist() == pytest.approx([1.0, 10.0, 0.1, 2.0**-126], rel=2**-7)
    assert [values_ND[0, 0], values_ND[0, 256], values_ND[1, 1], values_ND[1, 256]] == [126, 126, -126, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", Codec)
def test_a_device_writes_and_reads_the_same_bytes(codec: Codec, device: str) -> None:
    x_ND = rows_of_real_size(700)
    expected_ND = there_and_back(x_ND, codec)

    back_ND = there_and_back(x_ND.to(device), codec)

    assert back_ND.device.type == torch.device(device).type
    assert torch.equal(back_ND.cpu(), expected_ND)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_rounds_at_random_by_the_seed(device: str) -> None:
    x_ND = torch.full((512, 256), 1e-3, device=device)
    x_ND[:, 0] = 1.0

    once_ND, again_ND = (there_and_back(x_ND, Codec.INT8, dither_seed=5)[:, 1:] for _ in range(2))

    assert torch.equal(once_ND, again_ND)
    assert float(once_ND.mean()) == pytest.approx(1e-3, rel=0.05)
