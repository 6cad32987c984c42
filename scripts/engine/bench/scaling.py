"""How the cost of a training step grows with the length of its rows, their number, and the size of the model.

Rows are one random document each, and full; nothing is compiled, which would take longer than what is measured.
"""

import itertools
import math
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from dataset.order import RowOrder
from model.config import ModelConfig
from model.transformer import Transformer
from scripts.engine.bench.timing import Row, take_turns
from scripts.engine.bench.training import OURS, Case, Setting

LAYERS_PER_WIDTH = 8 / 512  # of the default shape, kept at every size
HEAD_DIM, WIDEST = 64, 2048
EAGER = replace(OURS, compiled=False)
TOKENS_AT_LEAST = 2048  # in a batch, where lengths are compared


@dataclass(frozen=True)
class ScalingBenchmarkConfig:
    """Measuring growth."""

    scaling_lengths: Annotated[tuple[int, ...], "tokens per row", "at least 1"] = (128, 256, 512, 1024, 2048, 4096)
    scaling_batches: Annotated[tuple[int, ...], "rows of --max-seq-len tokens", "at least 1"] = (1, 2, 4, 8, 16, 32)
    scaling_millions: Annotated[tuple[float, ...], "parameters / 1e6", "above 0"] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class RandomRows:
    """Endless rows of random tokens, which no two have in common."""

    seq_len: int
    vocab_size: int

    def order(self, seed: int, rows_per_step: int) -> RowOrder:
        return RowOrder(2**20, seed)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        random = np.random.default_rng(indices)
        ids = torch.from_numpy(random.integers(4, self.vocab_size, (len(indices), self.seq_len)))
        return {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}


def measure_scaling(setting: Setting, config: ScalingBenchmarkConfig) -> list[Row]:
    """A row for every kind of --kinds and every point along each of the three; the other two are the command line's."""
    length, batch_size, shape = setting.data.max_seq_len, setting.bench.batch_size, setting.shape
    points = [("length", shape, tokens, max(1, TOKENS_AT_LEAST // tokens)) for tokens in config.scaling_lengths]
    points += [("batch", shape, length, rows) for rows in config.scaling_batches]
    points += [("parameters", shape_of(number, shape), length, batch_size) for number in config.scaling_millions]
    rows = []
    for kind, (along, shape, length, batch_size) in itertools.product(setting.bench.kinds, points):
        print(f"{kind}: {length} tokens, {batch_size} rows, width {shape.hidden_size}", file=sys.stderr)
        bench = replace(setting.bench, batch_size=batch_size)
        # One case by itself: the largest ones leave no memory for another beside them.
        case = Case(kind, EAGER, RandomRows(length, shape.vocab_size), replace(setting, shape=shape, bench=bench))
        take_turns({kind: case.turn}, bench.rounds, 0, setting.runtime.torch_device)
        millions = case.network.num_parameters() / 1e6
        point = {"kind": kind, "along": along, "M parameters": millions, "tokens per row": length, "rows": batch_size}
        rows.append(point | case.row(bench.rounds))
    return rows


def shape_of(millions: float, like: ModelConfig) -> ModelConfig:
    """A shape of about so many parameters, as deep for its width as the default one."""
    shapes = [
        replace(
            like,
            hidden_size=width,
            num_hidden_layers=max(2, round(width * LAYERS_PER_WIDTH)),
            num_attention_heads=width // HEAD_DIM,
            num_key_value_heads=None,
            intermediate_size=None,
            head_dim=None,
        )
        for width in range(HEAD_DIM, WIDEST + 1, HEAD_DIM)
    ]

    def excess(shape: ModelConfig) -> float:
        with torch.device("meta"):
            return math.log(Transformer(shape).num_parameters() / 1e6 / millions)

    first_larger = bisect_left(shapes, 0.0, key=excess)
    return min(shapes[max(0, first_larger - 1) : first_larger + 1], key=lambda shape: abs(excess(shape)))
