"""Bytes go to a device and come back as they were, whatever went before them."""

import pytest
import torch
from torch import Tensor

from peer.staging import to_device, to_host
from peer.tensors import Role, decode, encode
from peer.wire_codecs import Codec

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
    ),
]


def bytes_of(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_come_back_as_they_went_and_do_not_change_with_the_next(device: str) -> None:
    sent = [bytes_of(size, seed) for seed, size in enumerate((1000, 1, 70_000, 333))]

    there = [to_device(data, torch.device(device)) for data in sent]
    back = [to_host(data) for data in there]

    assert all(data.device.type == device for data in there)
    assert all(torch.equal(came, went) for came, went in zip(back, sent, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_computed_on_arrives_before_it_is_computed_on_and_leaves_after(device: str) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32)

    there = to_device(x.view(torch.uint8), torch.device(device)).view(torch.int32)
    for _ in range(50):
        there = there + 1
    back = to_host(there.view(torch.uint8)).view(torch.int32)

    assert torch.equal(back, x + 50)


def test_on_the_cpu_nothing_is_copied() -> None:
    data = bytes_of(100, 0)

    assert to_host(to_device(data, torch.device("cpu"))).data_ptr() == data.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", list(Codec))
def test_a_tensor_is_the_same_on_every_device(device: str, codec: Codec) -> None:
    x_ND = torch.randn(17, 8, generator=torch.Generator().manual_seed(0))

    wire = encode(x_ND.to(device), Role.ROWS, codec)

    assert bytes(wire.data) == bytes(encode(x_ND, Role.ROWS, codec).data)
    assert torch.equal(decode(wire, device=torch.device(device)).cpu(), decode(wire))
