"""Cross-entropies and other losses in nats; no sampling, no model call.

Shapes: N scored positions, flat over B rows of L tokens; C hidden_size; V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def forbid(logits: Tensor, token_id: int) -> Tensor:
    """Make one token impossible in logits (..., V), in place: [MASK] is never predicted, nor decoded."""
    logits[..., token_id] = -math.inf
    return logits


# Logits in float32 at a time: on a CPU few enough to stay in its caches, on a GPU enough to keep it busy.
# Other devices take the value between.
CHUNK_OF_LOGITS = {"cpu": 2**22, "cuda": 2**25}


def linear_nats(hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: int | None = None) -> Tensor:
    """Return token_nats(forbid(hidden @ weight.T, forbidden), targets), (N,) float32, in a fifth of the memory.

    hidden (N, C), weight (V, C), targets (N,) int64. Softmax and its gradient are computed in float32 from logits of
    the autocast dtype, a chunk of rows at a time. Only p - onehot(target), the gradient by the logits, is kept of all
    rows, in that dtype: 2 bytes an entry in bfloat16, and autograd would keep 10. The gradients are those of autograd
    up to the rounding of p to that dtype.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearNats.apply(hidden, weight, targets, forbidden)


def linear_confidence(hidden: Tensor, weight: Tensor, forbidden: int) -> Tensor:
    """Return the largest probability (N,) float32 of each row of forbid(hidden @ weight.T, forbidden), computed as in
    `linear_nats`."""
    parts = hidden.split(_rows_at_a_time(hidden, weight))
    return torch.cat([forbid(F.linear(rows, weight).float(), forbidden).softmax(dim=-1).amax(dim=-1) for rows in parts])


def _rows_at_a_time(hidden: Tensor, weight: Tensor) -> int:
    return max(1, CHUNK_OF_LOGITS.get(hidden.device.type, 2**24) // len(weight))


class _LinearNats(torch.autograd.Function):
    """The operation of `linear_nats`, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: int | None) -> Tensor:
        nats = hidden.new_empty(len(hidden), dtype=torch.float32)
        chunk = _rows_at_a_time(hidden, weight)
        gradient = None
        if any(ctx.needs_input_grad[:2]):
            # Whole chunks on a CPU: the allocator reuses memory of a size that it has seen before.
            room = -(-len(hidden) // chunk) * chunk if hidden.device.type == "cpu" else len(hidden)
            gradient = hidden.new_empty(room, len(weight))[: len(hidden)]
        for first in range(0, len(hidden), chunk):
            # 1. log p (chunk, V) in float32.
            rows, target = slice(first, first + chunk), targets[first : first + chunk, None]
            logits = F.linear(hidden[rows], weight).float()
            log_p = (logits if forbidden is None else forbid(logits, forbidden)).log_softmax(dim=-1)
            # 2. -log p(target), and in place of log p the gradient by the logits.
            nats[rows] = -log_p.gather(1, target)[:, 0]
            if gradient is not None:
                gradient[rows] = log_p.exp_().scatter_add_(1, target, log_p.new_full((), -1.0).expand(target.shape))
        ctx.save_for_backward(hidden, weight, gradient)
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, gradient = ctx.saved_tensors
        # The scale of a row of the logits' gradient may be applied on the cheaper side of the product.
        scale = upstream[:, None]
        by_hidden = (scale * (gradient @ weight)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        by_weight = gradient.T @ (scale * hidden).to(hidden.dtype) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, None, None


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (N, V), targets (N,) -> cross-entropy (N,) in nats, computed in float32 whatever the logits' dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """logits (N, V), -inf allowed -> entropy (N,) in nats, in float32."""
    log_p = logits.float().log_softmax(dim=-1)
    # 0 log 0 is 0, and its gradient must be 0, not NaN.
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


def sum_by_row(values: Tensor, positions: Tensor, num_rows: int, length: int) -> Tensor:
    """values (N,) at flat positions (N,) of a (num_rows, length) batch -> (num_rows,) sums."""
    return values.new_zeros(num_rows).index_add(0, positions // length, values)


def unlikelihood(logits: Tensor, unwanted: Tensor) -> Tensor:
    """-log(1 - p(unwanted)) (N,), Welleck et al. 2020 Eq. 3; logits (N, V), unwanted (N,) token ids."""
    p = logits.float().softmax(dim=-1).gather(-1, unwanted[:, None])[:, 0]
    return -torch.log1p(-p.clamp(max=1 - 1e-6))


def run_lengths(ids: Tensor) -> Tensor:
    """ids (B, L) -> int64 (B, L): the number of equal tokens in a row that end at each position, itself included."""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    new_run = torch.ones_like(ids, dtype=torch.bool)
    new_run[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return index - torch.where(new_run, index, 0).cummax(dim=1).values + 1
