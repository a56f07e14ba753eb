"""Tensors travel by their role; headers are believed only when they add up."""

import math

import pytest
import torch
from torch import Tensor

from peer.errors import MalformedMessage
from peer.tensors import (
    Role,
    TensorTooLarge,
    WireTensor,
    all_finite,
    check_header,
    decode,
    decode_row_index,
    encode,
    header_of,
)
from peer.wire_codecs import Codec, DType
from protos import swarm_pb2 as pb

ALL = frozenset(Codec)


def _as_received(wire: WireTensor) -> WireTensor:
    return WireTensor(wire.spec, bytearray(wire.data))


def _there_and_back(x_ND: Tensor, codec: Codec) -> Tensor:
    return decode(_as_received(encode(x_ND, Role.ROWS, codec)))


def _normal() -> Tensor:
    return torch.randn(8, 300, generator=torch.Generator().manual_seed(0))


def test_a_row_index_comes_back_as_int64_and_only_within_the_rows() -> None:
    row_index_N = torch.tensor([0, 2, 2, 1], dtype=torch.int32)
    wire = _as_received(encode(row_index_N, Role.ROW_INDEX, Codec.RAW))

    assert decode_row_index(wire, num_rows=3).tolist() == [0, 2, 2, 1]
    with pytest.raises(MalformedMessage, match="row 2 of 2"):
        decode_row_index(wire, num_rows=2)


@pytest.mark.hostile
@pytest.mark.parametrize("bad", [-1, -(2**31), 2**31 - 1])
def test_a_row_index_outside_the_rows_is_refused(bad: int) -> None:
    wire = encode(torch.tensor([0, bad], dtype=torch.int32), Role.ROW_INDEX, Codec.RAW)

    with pytest.raises(MalformedMessage, match=f"row {bad} of 5"):
        decode_row_index(_as_received(wire), num_rows=5)


def test_sending_fp32_copies_nothing_and_receiving_it_neither() -> None:
    x_ND = torch.zeros(2, 3)
    sent = encode(x_ND, Role.ROWS, Codec.RAW)
    x_ND[0, 0] = 1.0
    received = _as_received(sent)
    decoded_ND = decode(received)
    decoded_ND[1, 2] = 2.0

    assert bytes(sent.data[:4]) == b"\x00\x00\x80\x3f"
    assert bytes(received.data[-4:]) == b"\x00\x00\x00\x40"


@pytest.mark.parametrize("codec", Codec)
def test_a_view_and_a_tensor_that_learns_travel_by_their_values(codec: Codec) -> None:
    x_DN = _normal().requires_grad_()

    back_ND = _there_and_back(x_DN.t(), codec)

    assert torch.equal(back_ND, _there_and_back(x_DN.detach().t().clone(), codec))
    assert not back_ND.requires_grad


@pytest.mark.parametrize("role", [Role.GRADIENTS, Role.ROW_GRADIENTS])
def test_gradients_in_int8_are_rounded_at_random_by_seed_and_role(role: Role) -> None:
    x_ND = _normal()
    other_role = Role.ROW_GRADIENTS if role is Role.GRADIENTS else Role.GRADIENTS

    once, again = (encode(x_ND, role, Codec.INT8, dither_seed=b"a call's id") for _ in range(2))
    other_seed = encode(x_ND, role, Codec.INT8, dither_seed=b"another's")
    other = encode(x_ND, other_role, Codec.INT8, dither_seed=b"a call's id")
    nearest = encode(x_ND, Role.ROWS, Codec.INT8)

    assert once == again
    assert len({bytes(wire.data) for wire in (once, other_seed, other, nearest)}) == 4


def test_gradients_in_int8_are_not_rounded_without_a_seed() -> None:
    with pytest.raises(ValueError, match="need a dither_seed"):
        encode(_normal(), Role.GRADIENTS, Codec.INT8)


@pytest.mark.parametrize("role", [Role.ROWS, Role.OUTPUTS])
def test_rows_in_int8_are_rounded_to_the_nearest_whatever_seed_there_is(role: Role) -> None:
    assert encode(_normal(), role, Codec.INT8, dither_seed=b"seed") == encode(_normal(), role, Codec.INT8)


def test_encode_refuses_what_is_not_its_roles_kind_of_tensor() -> None:
    with pytest.raises(TypeError, match="float32"):
        encode(torch.zeros(2, 2, dtype=torch.float64), Role.ROWS, Codec.RAW)
    with pytest.raises(ValueError, match="rank 2"):
        encode(torch.zeros(2, 2, 2), Role.ROWS, Codec.RAW)
    with pytest.raises(ValueError, match="at least one row"):
        encode(torch.zeros(0, 2), Role.ROWS, Codec.RAW)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(bad: float) -> None:
    x_ND = torch.ones(3, 4)
    x_ND[1, 2] = bad

    assert not all_finite(x_ND)
    x_ND[2, 2] = -bad
    assert not all_finite(x_ND)


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((4, 4), 3e38))


@pytest.mark.parametrize("role", Role)
def test_a_header_survives_the_wire(role: Role) -> None:
    tensor = torch.zeros([4, 3][: role.rank], dtype=torch.int32 if role.dtype is DType.INT32 else torch.float32)
    spec = encode(tensor, role, Codec.RAW).spec

    received = pb.TensorHeader.FromString(header_of(spec).SerializeToString())

    assert check_header(received, codecs_allowed=ALL, max_bytes=1 << 20) == spec


def _header(**changes: object) -> pb.TensorHeader:
    fields: dict[str, object] = {
        "role": pb.ROLE_ROWS,
        "dtype": pb.DTYPE_FLOAT32,
        "codec": pb.CODEC_RAW,
        "shape": [2, 3],
        "size_bytes": 24,
    }
    return pb.TensorHeader(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_the_header_that_the_hostile_ones_vary_is_accepted() -> None:
    assert check_header(_header(), codecs_allowed=ALL, max_bytes=24).shape == (2, 3)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"role": 0}, "unknown"),
        ({"role": 99}, "unknown"),
        ({"dtype": 0}, "unknown"),
        ({"dtype": 7}, "unknown"),
        ({"codec": 0}, "unknown"),
        ({"codec": -1}, "unknown"),
        ({"dtype": pb.DTYPE_INT32}, "must be FLOAT32"),
        ({"role": pb.ROLE_ROW_INDEX, "shape": [6]}, "must be INT32"),
        ({"shape": []}, "rank 0"),
        ({"shape": [24]}, "rank 1"),
        ({"shape": [1] * 9}, "rank 9"),
        ({"shape": [0, 3], "size_bytes": 0}, "positive"),
        ({"shape": [-2, -3]}, "positive"),
        ({"shape": [-(2**63), 1]}, "positive"),
        ({"size_bytes": 0}, "announces 0 bytes"),
        ({"size_bytes": 23}, "takes 24"),
        ({"size_bytes": 25}, "takes 24"),
        ({"codec": pb.CODEC_BF16}, "takes 12"),
        ({"codec": pb.CODEC_FP16}, "takes 16"),
        ({"codec": pb.CODEC_INT8}, "takes 10"),
        ({"codec": pb.CODEC_INT8, "shape": [2, 257], "size_bytes": 2 * 257 + 2 * 2}, "takes 522"),
        ({"role": pb.ROLE_ROW_INDEX, "dtype": pb.DTYPE_INT32, "codec": pb.CODEC_BF16, "shape": [6]}, "not allow"),
        ({"role": pb.ROLE_LENGTHS, "dtype": pb.DTYPE_INT32, "codec": pb.CODEC_INT8, "shape": [6]}, "not allow"),
        ({"role": pb.ROLE_LENGTHS, "shape": [6]}, "must be INT32"),
    ],
)
def test_a_header_that_does_not_add_up_is_malformed(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason) as error:
        check_header(_header(**changes), codecs_allowed=ALL, max_bytes=1 << 20)

    assert not isinstance(error.value, TensorTooLarge)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2**62, 4]},
        {"shape": [2**62, 4], "size_bytes": 0},
        {"shape": [2**62, 2**62], "size_bytes": 2**64 - 1},
        {"shape": [2**63 - 1, 2**63 - 1]},
        {"size_bytes": 5_000_000_000},
        {"shape": [1_250_000, 1000], "size_bytes": 5_000_000_000},
        {"codec": pb.CODEC_INT8, "shape": [2**62, 1], "size_bytes": 3 * 2**62},
        {"codec": pb.CODEC_FP16, "shape": [1, 2**62], "size_bytes": 2**63 + 4},
    ],
)
def test_a_header_that_announces_too_much_is_too_large_before_anything_is_allocated(changes: dict[str, object]) -> None:
    with pytest.raises(TensorTooLarge, match="at most 1048576"):
        check_header(_header(**changes), codecs_allowed=ALL, max_bytes=1 << 20)


def test_a_codec_outside_the_runs_list_is_refused() -> None:
    header = _header(codec=pb.CODEC_BF16, size_bytes=12)

    assert check_header(header, codecs_allowed={Codec.BF16}, max_bytes=100).codec is Codec.BF16
    with pytest.raises(MalformedMessage, match="BF16, which this run does not allow"):
        check_header(header, codecs_allowed={Codec.RAW}, max_bytes=100)


@pytest.mark.parametrize(
    ("ours", "schema"), [(DType, pb.DType), (Codec, pb.Codec), (Role, pb.Role)], ids=["dtype", "codec", "role"]
)
def test_our_names_are_the_schemas_without_its_unspecified(ours: type[DType | Codec | Role], schema: object) -> None:
    named = {f"{ours.__name__.upper()}_{member.name}": member.value for member in ours}

    assert named == {name: value for name, value in schema.items() if value}  # pyright: ignore
