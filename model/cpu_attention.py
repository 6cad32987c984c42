"""Attention of few keys on a CPU in bfloat16, computed explicitly: PyTorch's fused kernel has a slow backward pass.

Only `attend` in model/attention.py uses this file; nothing else depends on how the product is computed.
Shapes: B rows, H heads, L queries, K keys, D head_dim.
"""

import torch
from torch import Tensor

# Up to this many keys it beats the fused kernel, forward and backward; it keeps the L x K probabilities of every head.
EXPLICIT_ATTENTION_KEYS = 512
# Scores computed at a time: few enough to stay in the caches of a CPU from the first product to the second.
CHUNK_OF_SCORES = 2**19


def is_explicit(device: torch.device, dtype: torch.dtype, num_keys: int) -> bool:
    """Return whether `attend` computes queries and keys of this kind here."""
    return device.type == "cpu" and dtype == torch.bfloat16 and num_keys <= EXPLICIT_ATTENTION_KEYS


def attend_explicitly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q (B, H, L, D), k and v (B, H_kv, K, D) -> (B, H, L, D); bias (B or 1, 1, L or 1, K) is added to the scores."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if torch.is_grad_enabled():
        return explicit_attention(q, k, v, bias)[0]
    return _probabilities(q, k, bias) @ v


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) (B, H, L, K) in the dtype of q; the softmax itself is in float32."""
    scores = q @ k.transpose(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


# A custom operation, so that torch.compile leaves its loop over chunks alone.
@torch.library.custom_op("nano_llada::explicit_attention", mutates_args=())
def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (B, H, L, D), k and v (B, H, K, D) -> output (B, H, L, D) and, for the gradient, probabilities (B, H, L, K)."""
    probabilities = q.new_empty(*q.shape[:3], k.shape[2])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows in _chunks(probabilities):
        row_bias = bias if bias is None or len(bias) == 1 else bias[rows]
        probabilities[rows] = _probabilities(q[rows], k[rows], row_bias)
        out[rows] = probabilities[rows] @ v[rows]
    return out, probabilities


@explicit_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(*q.shape[:3], k.shape[2])


@torch.library.custom_op("nano_llada::explicit_attention_backward", mutates_args=())
def explicit_attention_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; upstream (B, H, L, D) is the one of the output."""
    by_q, by_k, by_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _chunks(probabilities):
        p, g = probabilities[rows], upstream[rows]
        # Through out = p v, p = softmax(scores), scores = q k^T / sqrt(D), from the last to the first.
        by_scores = torch.ops.aten._softmax_backward_data(g @ v[rows].transpose(-1, -2), p, -1, p.dtype)
        by_scores *= q.shape[-1] ** -0.5
        by_q[rows] = by_scores @ k[rows]
        by_k[rows] = by_scores.transpose(-1, -2) @ q[rows]
        by_v[rows] = p.transpose(-1, -2) @ g
    return by_q, by_k, by_v


@explicit_attention_backward.register_fake
def _(upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _chunks(scores: Tensor) -> list[slice]:
    """Return slices of the rows of scores (B, H, L, K) that are computed together."""
    size = max(1, CHUNK_OF_SCORES // max(scores[0].numel(), 1)) if len(scores) else 1
    return [slice(first, first + size) for first in range(0, len(scores), size)]


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *explicit_attention_backward(upstream, *ctx.saved_tensors), None


explicit_attention.register_autograd(_backward, setup_context=_save)
