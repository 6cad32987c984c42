"""Floating-point operations that a training step needs, counted from what is in it; a multiply and an add are two.

"Needs" is strict: no padding, no pair of positions of which one does not see the other, no logits nor last layer where
nothing is scored, nothing computed twice. A backward pass is two forward ones, by inputs and by weights. Norms, softmax
and other elementwise work is left out, as is usual; so is the embedding, which only copies.
"""

from typing import Any

import torch
from torch import Tensor

from model.attention_mask import block_causal_mask, block_diffusion_mask, document_mask
from model.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def step_flops(config: ModelConfig, prepared: dict[str, Any]) -> int:
    """Of one forward and backward pass over a batch as `prepare` of NextToken or MaskedDiffusion made it."""
    seen, scored = visible_keys(prepared), scored_queries(prepared)
    kv_size = config.num_key_value_heads * config.head_dim
    keys_and_values = 2 * config.hidden_size * kv_size
    rest = 2 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size  # Q, O, MLP
    positions, wanted = int((seen > 0).sum()), int(scored.sum())
    inner = config.num_hidden_layers - 1
    weights = positions * (inner + 1) * keys_and_values + (inner * positions + wanted) * rest
    head = wanted * config.hidden_size * config.vocab_size
    pairs = inner * int(seen.sum()) + int(seen[scored].sum())
    return FORWARD_AND_BACKWARD * (2 * (weights + head) + 4 * config.hidden_size * pairs)


def visible_keys(prepared: dict[str, Any]) -> Tensor:
    """int64 (B, L), or (B, 2L) for [x_t, x_0]: how many positions each one sees; 0 on padding."""
    ids, size = prepared["input_ids"], prepared.get("block_size", 0)
    documents = prepared.get("document_ids", torch.zeros_like(ids))
    if "noised_ids" not in prepared:
        mask = document_mask(documents) & block_causal_mask(ids.shape[1], 1)
    elif 0 < size < ids.shape[1]:
        mask = block_diffusion_mask(documents, size)
        documents = documents.repeat(1, 2)
    else:
        mask = document_mask(documents)
    return mask[:, 0].sum(dim=-1).expand(documents.shape) * (documents >= 0)


def scored_queries(prepared: dict[str, Any]) -> Tensor:
    """bool, of the shape of `visible_keys`: where the head is applied."""
    rows, length = prepared["input_ids"].shape
    halves = 2 if 0 < prepared.get("block_size", 0) < length else 1
    scored = torch.zeros(rows, halves * length, dtype=torch.bool)
    scored[prepared["positions"] // length, prepared["positions"] % length] = True
    return scored
