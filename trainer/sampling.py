"""Text from a model, one byte after the other. Knows neither where the weights come from nor who answers."""

import torch
from torch import Tensor

from trainer.evaluate import EvalCalls, without_learning
from trainer.model import TransformerLM


def sample_text(
    model: TransformerLM,
    prompt: str,
    *,
    num_bytes: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int,
    eval_calls: EvalCalls,
) -> str:
    """The prompt and what follows it; bytes that are no UTF-8 become U+FFFD. The same arguments give the same text."""
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt.encode())
    context = list(text) or [ord("\n")]
    with without_learning(model):
        for _ in range(num_bytes):
            window = torch.tensor([context[-model.settings.context :]], device=model.lm_head.weight.device)
            with eval_calls():
                logits_V = model(window)[0, -1]
            byte = choose(logits_V.cpu(), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            context.append(byte)
            text.append(byte)
    return text.decode(errors="replace")


def choose(
    logits_V: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Draw one token. Temperature 0 takes the likeliest.

    `top_k` keeps that many of the likeliest, `top_p` the fewest of the likeliest that hold this share of the
    probability (nucleus sampling, Holtzman et al. 2019); the likeliest is always kept.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = (logits_V.double() / temperature).sort(descending=True, stable=True)
    probs_V = sorted_V.softmax(0)
    if top_k is not None:
        probs_V[max(1, top_k) :] = 0
    if top_p is not None:
        probs_V = probs_V / probs_V.sum()
        mass_before_V = probs_V.cumsum(0) - probs_V
        keep_V = mass_before_V < top_p
        keep_V[0] = True
        probs_V[~keep_V] = 0
    return int(order_V[torch.multinomial(probs_V, 1, generator=generator)])
