"""Floating-point operations: those that a training step needs, and the most of them that this device makes of a matrix
product. A multiply and an add are two.

"Needs" is strict: no padding, no pair of positions of which one does not see the other, no logits nor last layer where
nothing is scored, nothing computed twice. A backward pass is two forward passes, by inputs and by weights. Norms,
softmax and other elementwise work is left out, as is usual; so is the embedding, which only copies.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.attention import block_causal_mask, document_mask
from model.block_diffusion import block_diffusion_mask
from model.config import ModelConfig
from scripts.engine.bench.timing import Row, take_turns

FORWARD_AND_BACKWARD = 3
# (rows, inner, columns): squares, and products as long as a batch and as wide as a layer. The best counts.
SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 2816), (4096, 1024, 1024)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
DTYPES = ("float32", "bfloat16")
ROUNDS, WARM_UP = 7, 2


def step_flops(config: ModelConfig, prepared: dict[str, Any]) -> int:
    """Count the operations of a forward and backward pass over a batch that an objective has prepared."""
    keys, (rows, columns) = visible_keys(prepared), scored_places(prepared)
    num_positions, num_scored = int((keys > 0).sum()), len(rows)
    width, inner_layers = config.hidden_size, config.num_hidden_layers - 1
    queries = config.num_attention_heads * config.head_dim
    # Weights that every position meets in a layer, and those that the last layer applies at scored ones only.
    keys_and_values = 2 * width * config.num_key_value_heads * config.head_dim
    queries_output_mlp = 2 * width * queries + 3 * width * config.intermediate_size
    weights = num_positions * (inner_layers + 1) * keys_and_values
    weights += (inner_layers * num_positions + num_scored) * queries_output_mlp
    weights += num_scored * width * config.vocab_size  # the head
    # Each pair of a query and a key: a product of queries and keys, and one of probabilities and values.
    pairs = inner_layers * int(keys.sum()) + int(keys[rows, columns].sum())
    return FORWARD_AND_BACKWARD * (2 * weights + 4 * queries * pairs)


def scored_places(prepared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Row and column, as in `visible_keys`, of each position from which a token is predicted."""
    length, places = prepared["input_ids"].shape[1], prepared["positions"]
    rows, columns = places // length, places % length
    if prepared.get("joint"):  # the next tokens, from the second half
        places = prepared["next_positions"]
        rows, columns = torch.cat([rows, places // length]), torch.cat([columns, places % length + length])
    return rows, columns


def visible_keys(prepared: dict[str, Any]) -> Tensor:
    """int64 (B, L), or (B, 2L) for [x_t, x_0]: how many positions each one sees; 0 on padding."""
    ids, size = prepared["input_ids"], prepared.get("block_size", 0)
    documents = prepared.get("document_ids", torch.zeros_like(ids))
    if "noised_ids" not in prepared:
        mask = document_mask(documents) & block_causal_mask(ids.shape[1], 1)
    elif prepared["joint"] or 0 < size < ids.shape[1]:
        mask = block_diffusion_mask(documents, size, prepared["joint"])
        documents = documents.repeat(1, 2)
    else:
        mask = document_mask(documents)
    return mask[:, 0].sum(dim=-1).expand(documents.shape) * (documents >= 0)


def measure_peak(device: torch.device) -> list[Row]:
    """The median operations per second of every shape in both precisions."""
    shapes = SHAPES.get(device.type, SHAPES["cpu"])
    cases = {(dtype, shape): _product(device, getattr(torch, dtype), *shape) for dtype in DTYPES for shape in shapes}
    timings = take_turns(cases, ROUNDS, WARM_UP, device)
    return [
        {
            "precision": dtype,
            "product": "x".join(map(str, shape)),
            "GFLOP/s": 2 * math.prod(shape) / timing.median / 1e9,
            "spread": timing.spread,
        }
        for (dtype, shape), timing in timings.items()
    ]


def _product(device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int) -> Callable[[], Tensor]:
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, inner), (columns, inner)))
    out = torch.empty(rows, columns, device=device, dtype=dtype)  # memory that is new to the system is slow to write
    return lambda: torch.mm(a, b.T, out=out)


def best(rows: list[Row]) -> dict[str, float]:
    """The most GFLOP/s of each precision."""
    return {dtype: max(row["GFLOP/s"] for row in rows if row["precision"] == dtype) for dtype in DTYPES}
