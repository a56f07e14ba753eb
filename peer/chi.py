"""How busy a link lets a device be: chi. Pure arithmetic over what others measured; knows no torch, no expert's maths.

A token's trip through an expert and back moves 2 D values each way: inputs and gradients of outputs up, outputs and
gradients of inputs down. Behind W bits a second each way, on a device that achieves F FLOP/s,

    utilisation = min(1, chi)    chi = W / W*    W* = 2 D b F / (FLOPs of the trip)

with b the mean bits a value of the forward's and the backward's codec. Of an expert with P = alpha D^2 parameters, all
in linear maps, the trip takes 6 P FLOPs: W* = 2 b F / (6 alpha D). Latency is not in it: calls in flight hide latency.

Tokens to the expert, or the expert to the tokens: T tokens cost 2 D b T bits each way, a replica where the tokens are
costs P b_g bits a sync. The two are even at T* = P b_g / (2 D b) = alpha D b_g / (2 b) tokens per expert and sync.
"""

from dataclasses import dataclass

from peer.manifest import WireCodec, WireSettings
from peer.rates import MeasuredDevice, MeasuredLink, Rates

LOW_UTILISATION = 0.2
"""Below it a device is as good as idle, and its owner should know before it starts."""
_INT8_BLOCK = 256
_SCALE_BITS = 16
_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Chi:
    """A link against what a device behind it could use."""

    link_bits_per_s: float
    """W"""
    needed_bits_per_s: float
    """W*"""

    @property
    def value(self) -> float:
        """chi"""
        return self.link_bits_per_s / self.needed_bits_per_s

    @property
    def utilisation(self) -> float:
        """The share of the time that the device can be busy."""
        return min(1.0, self.value)

    @property
    def is_low(self) -> bool:
        return self.utilisation < LOW_UTILISATION


def chi_of(rates: Rates, wire: WireSettings, *, dim: int) -> Chi | None:
    """Of one peer, for the experts its device was measured on; none when something was not measured."""
    if rates.link is None or rates.device is None:
        return None
    return Chi(rates.link.bits_per_s, needed_bits_per_s(rates.device.tokens_per_s, wire, dim=dim))


def needed_bits_per_s(tokens_per_s: float, wire: WireSettings, *, dim: int) -> float:
    """W*: what a device uses up, each way, that takes so many tokens through an expert of width `dim` and back."""
    return tokens_per_s * bits_per_token(wire, dim=dim)


def bits_per_token(wire: WireSettings, *, dim: int) -> float:
    """2 D b: what one token and expert cost, each way, forward and backward."""
    return dim * (bits_per_value(wire.forward_codec, dim=dim) + bits_per_value(wire.backward_codec, dim=dim))


def bits_per_value(codec: WireCodec, *, dim: int) -> float:
    """b of one codec, with the scales it sends along for each row of `dim` values."""
    if codec == "int8":
        num_blocks = -(-dim // min(dim, _INT8_BLOCK))
        return 8 + _SCALE_BITS * num_blocks / dim
    return {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0}[codec]


def break_even_tokens(num_parameters: int, wire: WireSettings, *, dim: int, sync_bits_per_parameter: float) -> float:
    """T*: with more tokens per expert and sync, keeping a replica moves fewer bits than sending the tokens."""
    return num_parameters * sync_bits_per_parameter / bits_per_token(wire, dim=dim)


def verdict(chi: Chi, link: MeasuredLink, device: MeasuredDevice, *, experts: str) -> str:
    """One sentence for the owner of the device; `experts` names their kind and size."""
    needs = (
        f"{experts} at {si(device.flops_per_s, 'FLOP/s')} could use {si(chi.needed_bits_per_s, 'bit/s')}, and this"
        f" link has {si(link.bits_per_s, 'bit/s')}"
    )
    if chi.value >= 1:
        return f"{needs} (chi {chi.value:.3g}): it will not hold the device back"
    return f"{needs} (chi {chi.value:.2g}): the device can be busy {percent(chi.utilisation)} of the time"


def link_in_words(link: MeasuredLink) -> str:
    up, down = si(link.up_bits_per_s, "bit/s"), si(link.down_bits_per_s, "bit/s")
    return f"{up} up, {down} down, {link.latency_ms:.3g} ms there and back"


def percent(share: float) -> str:
    """Two digits where there are few: `0.37 %`, `4.2 %`, `42 %`."""
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def si(value: float, unit: str) -> str:
    """Three digits and a prefix: `2.87 Gbit/s`."""
    thousands = 0
    while value >= 999.5 and thousands < len(_PREFIXES) - 1:
        value /= 1000
        thousands += 1
    return f"{value:.3g} {_PREFIXES[thousands]}{unit}"
