"""From logits to candidate tokens. Shapes: N positions, V vocabulary."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS, STRIDE = 4, 64  # of `_argmax`


class Draw(NamedTuple):
    """How a token is drawn from its logits."""

    temperature: float  # 0 = the likeliest token
    top_k: int  # among the k likeliest (0 = all)
    top_p: float  # among the fewest whose probabilities, tempered, add up to p
    repeat_penalty: float  # logit taken off for each earlier occurrence nearby (0 = none)
    repeat_window: int  # positions that are nearby


def require_draw(draw: Draw, prefix: str, temperature: str) -> None:
    """ValueError for an impossible number; flags are `prefix` and the field, but for the name of the temperature."""
    values = {temperature: draw.temperature, "top-k": draw.top_k, "repeat-penalty": draw.repeat_penalty}
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{prefix}{name} must not be negative, not {value}")
    if not 0 < draw.top_p <= 1:
        raise ValueError(f"{prefix}top-p must be in (0, 1], not {draw.top_p}")
    if not 1 <= draw.repeat_window < 2**31:
        raise ValueError(f"{prefix}repeat-window must be at least 1, not {draw.repeat_window}")


def sample_tokens(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits (N, V) -> tokens (N,) and the probability of each under these logits (N,) float32.

    temperature 0 is argmax; otherwise Gumbel-max with the float64 noise `uniform` (N, noise_width(...)) in [0, 1), over
    the `top_k` likeliest and of these the fewest that hold `top_p` of the tempered mass: lower precision truncates the
    tail of the distribution (arXiv:2409.02908). The noise owes nothing to the logits, so that it is drawn for the
    `top_k` alone changes no distribution. The probability is that of the plain softmax: temperature 1, all tokens.
    """
    if logits.device.type == "mps":  # has no float64
        return tuple(x.to(logits.device) for x in sample_tokens(logits.cpu(), temperature, top_k, top_p, uniform))
    probabilities = logits.float().softmax(dim=-1)
    if temperature == 0:
        return _argmax(logits), probabilities.amax(dim=-1)
    size, kept = logits.shape[-1], None
    scaled = logits - logits.amax(dim=-1, keepdim=True)  # the largest is 0: no overflow
    if top_p < 1 or 0 < top_k < size:
        scaled, kept = scaled.topk(min(top_k or size, size), dim=-1)
    scaled = scaled.double() / temperature
    if top_p < 1:
        mass_before = F.pad(scaled.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))
        scaled = scaled.masked_fill(mass_before >= top_p, -math.inf)
    tokens = _gumbel_argmax(scaled, uniform)
    tokens = tokens if kept is None else kept.gather(-1, tokens)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0]


def noise_width(vocab_size: int, top_k: int) -> int:
    """How many numbers a token is drawn with."""
    return min(top_k or vocab_size, vocab_size)


def _argmax(logits: Tensor) -> Tensor:
    """argmax of (N, V), the first of equals. In two stages on a CPU, where torch vectorises the maximum, but not the
    search for its place (64 x 4096, one core: 0.18 ms, in one stage 0.50)."""
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


def penalise_repeats(
    logits: Tensor, ids: Tensor, written: Tensor, columns: Tensor, penalty: float, window: int, exempt: int
) -> Tensor:
    """logits (N, V), each token's lowered by `penalty` for every time it was written near the position.

    The position is columns[i] of the row ids[i], ids (N, L); what counts are the `written` (N, L) positions at most
    `window` away. The token `exempt`, EOS, keeps its logit.
    """
    near = written & ((torch.arange(ids.shape[1], device=ids.device) - columns[:, None]).abs() <= window)
    counts = torch.zeros_like(logits).scatter_add_(1, ids, near.to(logits.dtype))
    counts[:, exempt] = 0
    return logits - penalty * counts
