"""Tensors to nats; no sampling, no model call. Shapes: N scored positions, V vocabulary."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forbid(logits: Tensor, token_id: int) -> Tensor:
    """logits (..., V) with one token made impossible, in place: [MASK] is never predicted, nor decoded."""
    logits[..., token_id] = -math.inf
    return logits


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (N, V), targets (N,) -> cross-entropy (N,) in nats, computed in float32 whatever the logits' dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """logits (N, V), -inf allowed -> entropy (N,) in nats, in float32."""
    log_p = logits.float().log_softmax(dim=-1)
    # 0 log 0 is 0, and so must its gradient be.
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


def sum_by_row(values: Tensor, positions: Tensor, num_rows: int, length: int) -> Tensor:
    """values (N,) at flat positions (N,) of a (num_rows, length) batch -> (num_rows,) sums."""
    return values.new_zeros(num_rows).index_add(0, positions // length, values)


def unlikelihood(logits: Tensor, unwanted: Tensor) -> Tensor:
    """-log(1 - p(unwanted)) (N,), Welleck et al. 2020 Eq. 3; logits (N, V), unwanted (N,) token ids."""
    p = logits.float().softmax(dim=-1).gather(-1, unwanted[:, None])[:, 0]
    return -torch.log1p(-p.clamp(max=1 - 1e-6))


def run_lengths(ids: Tensor) -> Tensor:
    """ids (B, L) -> int64 (B, L): how many equal tokens end at each position, itself included."""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    new_run = torch.ones_like(ids, dtype=torch.bool)
    new_run[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return index - torch.where(new_run, index, 0).cummax(dim=1).values + 1
