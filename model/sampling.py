"""From logits to candidate tokens."""

import math

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """logits (..., V) -> tokens (...,) and the model's own probability of each (...,) float32.

    temperature 0 is argmax; otherwise Gumbel-max over the `top_k` likeliest (0 = all), in float64: lower precision
    truncates the tail of the distribution (arXiv:2409.02908). The probability is that of the plain softmax, at
    temperature 1.
    """
    if logits.device.type == "mps":  # has no float64
        return tuple(x.to(logits.device) for x in sample_tokens(logits.cpu(), temperature, top_k, generator))
    probabilities = logits.float().softmax(dim=-1)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        scaled = logits.double() / temperature
        if 0 < top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[..., -1:], -math.inf)
        uniform = torch.rand(scaled.shape, generator=generator, device=scaled.device, dtype=torch.float64)
        tokens = (scaled - torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))).argmax(dim=-1)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]
