"""What would raise a low chi, and to what: computed from the run's own numbers, said in words. Measures nothing.

Everything here holds the device's FLOP/s fixed: chi grows as the bits of a token's trip shrink, and as its FLOPs grow.
"""

import math
from collections.abc import Iterator
from typing import get_args

from experts.registry import expert_kind
from experts.settings import ExpertShape
from peer.chi import Chi, bits_per_token, bits_per_value, break_even_tokens, percent, si
from peer.manifest import RunManifest, WireCodec

_ENOUGH = 0.5
"""A device that is busy half of the time is worth its electricity."""
_MOST_HIDDEN = 1 << 20
_MOST_BLOCKS = 64
"""As in ExpertShape."""
_WORTH_SAYING = 1.05
_SYNC_BITS = 16.0
"""A replica's parameter in bf16, once a sync."""


def remedies(manifest: RunManifest, chi: Chi) -> list[str]:
    """Each by itself, with what the device would be busy then."""
    return [*_codec(manifest, chi), *_larger(manifest, chi), *_blocks(manifest, chi), _resident(manifest)]


def experts_in_words(shape: ExpertShape) -> str:
    """`swiglu experts of 128 x 256`"""
    blocks = f"{shape.blocks}-block " if expert_kind(shape.kind).has_blocks else ""
    return f"{blocks}{shape.kind} experts of {shape.dim} x {shape.hidden}"


def _codec(manifest: RunManifest, chi: Chi) -> Iterator[str]:
    dim = manifest.expert.dim
    codecs: tuple[WireCodec, ...] = get_args(WireCodec)
    smallest = min(codecs, key=lambda codec: bits_per_value(codec, dim=dim))
    gain = bits_per_token(manifest.wire, dim=dim) / (2 * dim * bits_per_value(smallest, dim=dim))
    if gain > _WORTH_SAYING:
        yield f"{smallest} on the wire both ways: {_busy(chi, gain)}"


def _larger(manifest: RunManifest, chi: Chi) -> Iterator[str]:
    shape = manifest.expert
    times = 1
    while shape.hidden * times * 2 <= _MOST_HIDDEN:
        times *= 2
        larger = shape.model_copy(update={"hidden": shape.hidden * times})
        gain = _work(manifest, larger) / _work(manifest, shape)
        if chi.value * gain >= _ENOUGH:
            size = _size(expert_kind(shape.kind).num_parameters(larger))
            yield f"experts with {times} times the hidden width, {larger.hidden} ({size} each): {_busy(chi, gain)}"
            return


def _blocks(manifest: RunManifest, chi: Chi) -> Iterator[str]:
    """The smallest stack that is enough, or the largest there can be; its work is one block's, times its blocks."""
    now = manifest.expert
    block = ExpertShape(kind="block", dim=now.dim, hidden=now.hidden)
    try:
        gain_each = _work(manifest, block) / _work(manifest, now)
    except ValueError:
        return  # not every width can be cut into heads
    blocks = min(_MOST_BLOCKS, math.ceil(_ENOUGH / (chi.value * gain_each)))
    if blocks * gain_each > _WORTH_SAYING:
        size = _size(blocks * expert_kind("block").num_parameters(block))
        yield f"stacks of {blocks} transformer blocks as experts ({size} each): {_busy(chi, blocks * gain_each)}"


def _resident(manifest: RunManifest) -> str:
    num_parameters = expert_kind(manifest.expert.kind).num_parameters(manifest.expert)
    tokens = break_even_tokens(
        num_parameters, manifest.wire, dim=manifest.expert.dim, sync_bits_per_parameter=_SYNC_BITS
    )
    return (
        "experts that stay where the tokens are and are averaged now and then (not built yet): fewer bytes once an"
        f" expert gets more than {tokens:,.0f} tokens per averaging"
    )


def _size(num_parameters: int) -> str:
    return f"{si(num_parameters, '').strip()} parameters"


def _work(manifest: RunManifest, shape: ExpertShape) -> int:
    return expert_kind(shape.kind).flops_per_token(shape, context=manifest.model.context)


def _busy(chi: Chi, gain: float) -> str:
    return f"busy {percent(min(1.0, chi.value * gain))} of the time"
