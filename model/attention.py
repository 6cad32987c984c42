"""softmax(q k^T / sqrt(D)) v, by whichever kernel suits the device, the precision and the length.

Shapes: B rows, H heads, L queries, K keys, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_mask import AttentionMask, BlockMask, block_causal_mask, flex_attend

# Up to this many keys, explicit attention beats PyTorch's fused CPU kernel in bfloat16, whose backward pass is slow;
# it keeps the L x K probabilities of every head.
EXPLICIT_ATTENTION_KEYS = 512
CHUNK_OF_SCORES = 2**19  # computed at a time: so few stay in a CPU's caches from the product to the softmax and on


def explicit(device: torch.device, dtype: torch.dtype, num_keys: int) -> bool:
    """Whether `attend` will compute queries and keys of this kind explicitly."""
    return device.type == "cpu" and dtype == torch.bfloat16 and num_keys <= EXPLICIT_ATTENTION_KEYS


def mask_of_pass(attn_mask: AttentionMask | None, is_causal: bool, x: Tensor) -> tuple[AttentionMask | None, bool]:
    """The mask as `attend` wants it in every layer of a pass over x (B, L, C): where that is explicit, 0 and -inf to be
    added to the scores, once for all layers and heads."""
    enabled = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if enabled else x.dtype
    if isinstance(attn_mask, BlockMask) or (attn_mask is None and not is_causal):
        return attn_mask, is_causal
    if not explicit(x.device, dtype, x.shape[1] if attn_mask is None else attn_mask.shape[-1]):
        return attn_mask, is_causal
    seen = block_causal_mask(x.shape[1], 1, x.device) if attn_mask is None else attn_mask
    return torch.zeros(seen.shape, dtype=dtype, device=x.device).masked_fill_(~seen, -math.inf), False


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: AttentionMask | None, is_causal: bool) -> Tensor:
    """q (B, H, L, D), k and v (B, H_kv, K, D) -> (B, H, L, D); attn_mask and is_causal from `mask_of_pass`."""
    if isinstance(attn_mask, BlockMask):
        return flex_attend(q, k, v, attn_mask)
    if explicit(q.device, q.dtype, k.shape[2]):
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if torch.is_grad_enabled():
            return explicit_attention(q, k, v, attn_mask)[0]
        return _probabilities(q, k, attn_mask) @ v
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=k.shape[1] != q.shape[1]
    )


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, L, K) in the dtype of q; the softmax is in float32. bias (B or 1, 1, L or 1, K)."""
    scores = q @ k.transpose(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


@torch.library.custom_op("nano_llada::explicit_attention", mutates_args=())
def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (B, H, L, D), k and v (B, H, K, D), bias (B or 1, 1, L or 1, K) -> (B, H, L, D), probabilities (B, H, L, K).

    An operation of its own, so that a compiler leaves it as it is: a chunk of rows at a time, in the caches.
    """
    probabilities = q.new_empty(*q.shape[:3], k.shape[2])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows in _chunks(probabilities):
        of_rows = bias if bias is None or len(bias) == 1 else bias[rows]
        probabilities[rows] = _probabilities(q[rows], k[rows], of_rows)
        out[rows] = probabilities[rows] @ v[rows]
    return out, probabilities


@explicit_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(*q.shape[:3], k.shape[2])


@torch.library.custom_op("nano_llada::explicit_attention_backward", mutates_args=())
def explicit_attention_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v; upstream (B, H, L, D), by the first output."""
    by_q, by_k, by_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _chunks(probabilities):
        p, g = probabilities[rows], upstream[rows]
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
    """Rows of scores (B, H, L, K) to be computed together."""
    size = max(1, CHUNK_OF_SCORES // max(scores[0].numel(), 1)) if len(scores) else 1
    return [slice(first, first + size) for first in range(0, len(scores), size)]


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *explicit_attention_backward(upstream, *ctx.saved_tensors), None


explicit_attention.register_autograd(_backward, setup_context=_keep)
