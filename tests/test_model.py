"""The trunk is Qwen2-MoE: same layout, same names, same numbers."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from peer.manifest import ModelSettings
from tests.tiny_trunk import NoExperts
from trainer.model import TransformerLM, dense_hidden

SETTINGS = ModelSettings(dim=32, layers=3, heads=4, kv_heads=2, context=24, vocab=64, shared_hidden=24)
MOE_LAYERS = 2
NUM_EXPERTS, TOP_K, HIDDEN = 4, 2, 16


class DenseExperts(nn.Module):
    """Every expert on every token, weighted by softmax probabilities of the chosen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_ED = nn.Parameter(torch.empty(NUM_EXPERTS, SETTINGS.dim))
        self.gate_up_EHD = nn.Parameter(torch.empty(NUM_EXPERTS, 2 * HIDDEN, SETTINGS.dim))
        self.down_EDH = nn.Parameter(torch.empty(NUM_EXPERTS, SETTINGS.dim, HIDDEN))

    def forward(self, x_BSD: Tensor) -> Tensor:
        probs_BSE = (x_BSD @ self.gate_ED.T).softmax(-1)
        chosen_BSE = torch.zeros_like(probs_BSE).scatter(-1, probs_BSE.topk(TOP_K).indices, 1.0)
        gate, up = torch.einsum("bsd,ehd->bseh", x_BSD, self.gate_up_EHD).chunk(2, -1)
        out = torch.einsum("bseh,edh->bsed", nn.functional.silu(gate) * up, self.down_EDH)
        return torch.einsum("bse,bsed->bsd", probs_BSE * chosen_BSE, out)


def build(settings: ModelSettings = SETTINGS, *, seed: int = 0) -> TransformerLM:
    return TransformerLM(settings, moe_layers=MOE_LAYERS, make_moe=lambda _: NoExperts(), seed=seed)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(SETTINGS.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def qwen2_moe() -> Qwen2MoeForCausalLM:
    config = Qwen2MoeConfig(
        vocab_size=SETTINGS.vocab,
        hidden_size=SETTINGS.dim,
        intermediate_size=dense_hidden(SETTINGS.dim),
        num_hidden_layers=SETTINGS.layers,
        num_attention_heads=SETTINGS.heads,
        num_key_value_heads=SETTINGS.kv_heads,
        max_position_embeddings=SETTINGS.context,
        rms_norm_eps=SETTINGS.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": SETTINGS.rope_theta},
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=SETTINGS.shared_hidden,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        mlp_only_layers=list(range(SETTINGS.layers - MOE_LAYERS)),
    )
    theirs = Qwen2MoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in theirs.parameters():  # norms and biases too, so that each of them shows in the logits
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return theirs


OUR_NAMES = {
    "mlp.gate.weight": "mlp.routed.gate_ED",
    "mlp.experts.gate_up_proj": "mlp.routed.gate_up_EHD",
    "mlp.experts.down_proj": "mlp.routed.down_EDH",
}


def test_logits_and_gradients_are_those_of_transformers() -> None:
    theirs = qwen2_moe()
    ours = TransformerLM(SETTINGS, moe_layers=MOE_LAYERS, make_moe=lambda _: DenseExperts(), seed=0)
    weights = theirs.state_dict()
    for their_name, our_name in OUR_NAMES.items():
        weights = {name.replace(their_name, our_name): value for name, value in weights.items()}
    ours.load_state_dict(weights, strict=True)
    batch = tokens(3, SETTINGS.context)

    ours_BSV, theirs_BSV = ours(batch), theirs(batch).logits
    ours_BSV.square().mean().backward()
    theirs_BSV.square().mean().backward()

    torch.testing.assert_close(ours_BSV, theirs_BSV, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4
    )


def test_a_token_sees_nothing_after_it() -> None:
    model = build()
    before = tokens(1, 16)
    after = before.clone()
    after[0, 9:] = (after[0, 9:] + 1) % SETTINGS.vocab

    with torch.no_grad():
        logits_before, logits_after = model(before), model(after)

    torch.testing.assert_close(logits_before[0, :9], logits_after[0, :9])
    assert not torch.allclose(logits_before[0, 9:], logits_after[0, 9:])


def test_the_same_seed_makes_the_same_trunk_and_leaves_the_global_generator_alone() -> None:
    global_state = torch.get_rng_state()

    first, again, other = build(seed=5), build(seed=5), build(seed=6)

    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_the_last_layers_are_mixtures_numbered_from_zero() -> None:
    asked: list[int] = []

    def make_moe(index: int) -> nn.Module:
        asked.append(index)
        return NoExperts()

    model = TransformerLM(SETTINGS, moe_layers=MOE_LAYERS, make_moe=make_moe, seed=0)

    assert asked == [0, 1]
    assert len(model.moe_modules()) == 2
    assert "model.layers.0.mlp.down_proj.weight" in model.state_dict()
    assert "model.layers.1.mlp.shared_expert.down_proj.weight" in model.state_dict()


def test_router_parameters_are_exactly_those_that_came_with_the_mixtures() -> None:
    model = TransformerLM(SETTINGS, moe_layers=MOE_LAYERS, make_moe=lambda _: DenseExperts(), seed=0)

    names = model.router_parameters().keys()

    assert names == {f"model.layers.{layer}.{name}" for layer in (1, 2) for name in OUR_NAMES.values()}


def test_without_answers_the_shared_expert_still_learns() -> None:
    model = build()
    batch = tokens(2, 9)

    loss, _ = model.loss_sum(batch[:, :-1], batch[:, 1:])
    loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.model.layers[1].mlp.shared_expert.down_proj.weight.grad.abs().sum() > 0


def test_a_model_without_a_shared_expert_has_none() -> None:
    model = build(SETTINGS.model_copy(update={"shared_hidden": 0}))

    logits = model(tokens(1, 4))

    assert logits.isfinite().all()
    assert not any("shared" in name for name in model.state_dict())


def test_a_fresh_model_knows_nothing_and_is_hardly_surer_than_a_fair_die() -> None:
    batch = tokens(8, 17)

    loss, num_tokens = build().loss_sum(batch[:, :-1], batch[:, 1:])

    assert num_tokens == 8 * 16
    assert loss.item() / num_tokens == pytest.approx(math.log(SETTINGS.vocab) + 0.5, abs=0.4)


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        build()(tokens(1, 25))
