"""The dense trunk: a decoder-only transformer laid out and named like Qwen2-MoE in transformers.

Routed experts come from outside, one module per mixture layer; this file does not know whether they are remote. Their
names are the only ones that differ: what is `mlp.gate` and `mlp.experts` there lives under `mlp.routed` here.

B batch, S sequence, D width, V vocabulary, A attention heads, C channels of one head, H inner width of an MLP.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from peer.manifest import ModelSettings

MakeMoe = Callable[[int], nn.Module]
"""From an index among the mixture layers to a module (B, S, D) -> (B, S, D)."""


def dense_hidden(dim: int) -> int:
    """Inner width of the MLP in layers without experts: 8/3 D up to a multiple of 16, the size of a plain 4 D MLP."""
    return -(-8 * dim // 48) * 16


class TransformerLM(nn.Module):
    """Tokens in, logits out; the last `moe_layers` of `settings.layers` are mixtures.

    Its own parameters depend on `seed` alone, not on the global generator; what `make_moe` returns is taken as it is.
    Holds no state between calls: several threads may run it at once.
    """

    def __init__(self, settings: ModelSettings, *, moe_layers: int, make_moe: MakeMoe, seed: int) -> None:
        super().__init__()
        self.settings = settings
        init = _Init(settings, seed)
        self.model = _Decoder(settings, moe_layers=moe_layers, make_moe=make_moe, init=init)
        self.lm_head = init.linear(settings.dim, settings.vocab)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V). ValueError when S is longer than the context."""
        return self.lm_head(self.model(tokens_BS))

    def loss_sum(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, int]:
        """Sum of the tokens' cross-entropies in nats, in float32, and how many tokens that was."""
        logits_BSV = self(tokens_BS)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")
        return loss, targets_BS.numel()

    def moe_modules(self) -> list[nn.Module]:
        """What `make_moe` returned, in order of the layers."""
        return [layer.mlp.routed for layer in self.model.decoder_layers() if isinstance(layer.mlp, _MixtureBlock)]

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that came with `make_moe`, by its full name."""
        theirs = {id(parameter) for moe in self.moe_modules() for parameter in moe.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in theirs}


class _Init:
    """Fresh layers from one generator, with the spread D^-1/2; those that write to the residual stream as in GPT-2.

    Qwen2's fixed 0.02 is D^-1/2 at its D of 2048; at D = 128 it cost 0.25 bits per byte after 200 steps.
    """

    def __init__(self, settings: ModelSettings, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed % (1 << 63))
        self._std = settings.dim**-0.5
        self._residual_std = self._std / (2 * settings.layers) ** 0.5

    def linear(self, d_in: int, d_out: int, *, bias: bool = False, to_residual: bool = False) -> nn.Linear:
        linear = cast("nn.Linear", skip_init(nn.Linear, d_in, d_out, bias=bias))
        std = self._residual_std if to_residual else self._std
        nn.init.normal_(linear.weight, std=std, generator=self._generator)
        if bias:
            nn.init.zeros_(linear.bias)
        return linear

    def embedding(self, vocab: int, dim: int) -> nn.Embedding:
        embedding = cast("nn.Embedding", skip_init(nn.Embedding, vocab, dim))
        nn.init.normal_(embedding.weight, std=self._std, generator=self._generator)
        return embedding


class _Decoder(nn.Module):
    def __init__(self, settings: ModelSettings, *, moe_layers: int, make_moe: MakeMoe, init: _Init) -> None:
        super().__init__()
        num_dense = settings.layers - moe_layers
        self.embed_tokens = init.embedding(settings.vocab, settings.dim)
        self.layers = nn.ModuleList(
            _DecoderLayer(
                settings,
                _MixtureBlock(settings, make_moe(index - num_dense), init)
                if index >= num_dense
                else _SwiGLU(settings.dim, dense_hidden(settings.dim), init),
                init,
            )
            for index in range(settings.layers)
        )
        self.norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        cos_SC, sin_SC = _rope(settings)
        self.cos_SC: Tensor = nn.Buffer(cos_SC, persistent=False)
        self.sin_SC: Tensor = nn.Buffer(sin_SC, persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        length = tokens_BS.shape[1]
        if length > self.cos_SC.shape[0]:
            raise ValueError(f"{length} tokens do not fit the context of {self.cos_SC.shape[0]}")
        x_BSD = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cos_SC[:length], self.sin_SC[:length])
        return self.norm(x_BSD)

    def decoder_layers(self) -> "list[_DecoderLayer]":
        return [cast("_DecoderLayer", layer) for layer in self.layers]


class _DecoderLayer(nn.Module):
    def __init__(self, settings: ModelSettings, mlp: nn.Module, init: _Init) -> None:
        super().__init__()
        self.self_attn = _Attention(settings, init)
        self.mlp = mlp
        self.input_layernorm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SC, sin_SC)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class _Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; biases on q, k and v as in Qwen2."""

    def __init__(self, settings: ModelSettings, init: _Init) -> None:
        super().__init__()
        self.channels = settings.dim // settings.heads
        kv_dim = settings.kv_heads * self.channels
        self.q_proj = init.linear(settings.dim, settings.dim, bias=True)
        self.k_proj = init.linear(settings.dim, kv_dim, bias=True)
        self.v_proj = init.linear(settings.dim, kv_dim, bias=True)
        self.o_proj = init.linear(settings.dim, settings.dim, to_residual=True)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        q_BASC, k_BASC, v_BASC = (
            projection(x_BSD).unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BASC = F.scaled_dot_product_attention(
            _rotate(q_BASC, cos_SC, sin_SC), _rotate(k_BASC, cos_SC, sin_SC), v_BASC, is_causal=True, enable_gqa=True
        )
        return self.o_proj(mixed_BASC.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, init: _Init) -> None:
        super().__init__()
        self.gate_proj = init.linear(dim, hidden)
        self.up_proj = init.linear(dim, hidden)
        self.down_proj = init.linear(hidden, dim, to_residual=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class _MixtureBlock(nn.Module):
    """Routed experts, plus the shared expert under a sigmoid gate: the floor when no routed one answers."""

    def __init__(self, settings: ModelSettings, routed: nn.Module, init: _Init) -> None:
        super().__init__()
        self.routed = routed
        self.has_shared = settings.shared_hidden > 0
        if self.has_shared:
            self.shared_expert = _SwiGLU(settings.dim, settings.shared_hidden, init)
            self.shared_expert_gate = init.linear(settings.dim, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        routed_BSD = self.routed(x_BSD)
        if not self.has_shared:
            return routed_BSD
        return routed_BSD + torch.sigmoid(self.shared_expert_gate(x_BSD)) * self.shared_expert(x_BSD)


def _rope(settings: ModelSettings) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, C) of RoFormer's angles, each frequency in both halves of the channels."""
    channels = settings.dim // settings.heads
    frequencies = 1.0 / settings.rope_theta ** (torch.arange(0, channels, 2, dtype=torch.float) / channels)
    angles = torch.outer(torch.arange(settings.context, dtype=torch.float), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x_BASC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    left, right = x_BASC.chunk(2, dim=-1)
    return x_BASC * cos_SC + torch.cat((-right, left), dim=-1) * sin_SC
