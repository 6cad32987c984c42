"""From logits to candidate tokens. Shapes: N positions, V vocabulary."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS, STRIDE = 4, 64  # `_argmax` takes two stages from FEW_ROWS rows on, the first over STRIDE tokens


class Draw(NamedTuple):
    """How a token is drawn from its logits."""

    temperature: float  # 0 = the likeliest token
    top_k: int  # among the k likeliest (0 = all)
    top_p: float  # among the fewest whose probabilities, tempered, add up to p
    repeat_penalty: float  # logit taken off for each earlier occurrence nearby (0 = none)
    repeat_window: int  # positions that are nearby


def sample_tokens(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits (N, V) -> tokens (N,) and the probability of each under these logits (N,) float32.

    temperature 0 is argmax; otherwise Gumbel-max with the float64 noise `uniform` (N, noise_width(...)) in [0, 1), over
    the `top_k` likeliest tokens and of these the fewest that hold `top_p` of the tempered mass. The probability is that
    of the plain softmax: temperature 1, all tokens.
    """
    if logits.device.type == "mps":  # has no float64
        return tuple(x.to(logits.device) for x in sample_tokens(logits.cpu(), temperature, top_k, top_p, uniform))
    probabilities = logits.float().softmax(dim=-1)
    if temperature == 0:
        return _argmax(logits), probabilities.amax(dim=-1)
    # 1. The largest logit becomes 0, so that no temperature makes the others overflow: (N, V).
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    # 2. top-k, (N, K), from the likeliest down: no noise is needed for the rest, as it does not depend on the logits.
    size, kept = logits.shape[-1], None
    if top_p < 1 or 0 < top_k < size:
        scaled, kept = scaled.topk(min(top_k or size, size), dim=-1)
    # 3. Temperature, in float64: lower precision would cut off the distribution's tail (arXiv:2409.02908).
    scaled = scaled.double() / temperature
    # 4. top-p: a token stays if those before it hold less than the mass.
    if top_p < 1:
        mass_before = F.pad(scaled.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))
        scaled = scaled.masked_fill(mass_before >= top_p, -math.inf)
    # 5. One draw each, (N, 1), back among all V tokens.
    tokens = _gumbel_argmax(scaled, uniform)
    tokens = tokens if kept is None else kept.gather(-1, tokens)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0]


def noise_width(vocab_size: int, top_k: int) -> int:
    """Return the number of random numbers that a token is drawn with."""
    return min(top_k or vocab_size, vocab_size)


def _argmax(logits: Tensor) -> Tensor:
    """argmax of (N, V), the first of equals. In two stages on a CPU, because torch vectorises the maximum there but not
    the search for its place (64 x 4096 on one core: 0.18 ms; in one stage 0.50 ms)."""
    number, size = logits.shape
    if logits.device.type != "cpu" or number < FEW_ROWS or size % STRIDE:
        return logits.argmax(dim=-1)
    parts = logits.view(number, -1, STRIDE)
    part = parts.amax(dim=-1).argmax(dim=-1)
    return part * STRIDE + parts[torch.arange(number), part].argmax(dim=-1)


def _gumbel_argmax(logits: Tensor, uniform: Tensor) -> Tensor:
    """(N, 1): distributed as the softmax of logits (N, V) if the noise (N, V) is uniform."""
    noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
    return (logits + noise).argmax(dim=-1, keepdim=True)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Logits of p(.|prompt)^(1+w) / p(.)^w, up to a constant, w = `scale`: unsupervised classifier-free guidance
    (LLaDA Eq. 16)."""
    return (1 + scale) * conditional - scale * unconditional


def penalise_repeats(logits: Tensor, ids: Tensor, written: Tensor, columns: Tensor, draw: Draw, exempt: int) -> Tensor:
    """logits (N, V), each token's lowered by draw.repeat_penalty for every time it was written near the position.

    The i-th position is column columns[i] of the row ids[i], ids (N, L). Tokens count if they are `written` (N, L) at
    most draw.repeat_window columns away, in others than its own. The token `exempt`, EOS, keeps its logit.
    """
    distance = (torch.arange(ids.shape[1], device=ids.device) - columns[:, None]).abs()
    near = written & (distance > 0) & (distance <= draw.repeat_window)
    counts = torch.zeros_like(logits).scatter_add_(1, ids, near.to(logits.dtype))
    counts[:, exempt] = 0
    return logits - draw.repeat_penalty * counts
