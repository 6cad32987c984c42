"""How the cost of a training step grows with the length of its rows, their number, and the size of the model.

Rows are one random document each, and full; nothing is compiled, which would take longer than what is measured.
"""

import math
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.order import RowOrder
from model.config import ModelConfig
from model.transformer import Transformer
from scripts.engine.bench.timing import markdown, take_turns
from scripts.engine.bench.training import OURS, Case, Setting

LAYERS_PER_WIDTH = 8 / 512  # of the default shape, kept at every size
HEAD_DIM, WIDEST = 64, 2048
TOKENS_AT_LEAST = 2048  # in a batch, where lengths are compared


@dataclass(frozen=True)
class ScalingBenchmarkConfig:
    """Measuring growth."""

    scaling_lengths: Annotated[tuple[int, ...], "tokens per row", "at least 1"] = (128, 256, 512, 1024, 2048, 4096)
    scaling_batches: Annotated[tuple[int, ...], "rows per step, of the length of --max-seq-len", "at least 1"] = (
        1,
        2,
        4,
        8,
        16,
        32,
    )
    scaling_millions: Annotated[tuple[float, ...], "parameters, in millions", "above 0"] = (
        1.0,
        3.0,
        10.0,
        30.0,
        100.0,
        300.0,
    )


@dataclass(frozen=True)
class RandomRows:
    """Endless rows of random tokens, which no two have in common."""

    seq_len: int
    vocab_size: int
    real_token_share: float = 1.0

    def __len__(self) -> int:
        return 2**20

    def order(self, seed: int, rows_per_step: int) -> RowOrder:
        return RowOrder(len(self), seed)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        random = np.random.default_rng(indices)
        ids = torch.from_numpy(random.integers(4, self.vocab_size, (len(indices), self.seq_len)))
        return {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}


class Point(NamedTuple):
    """A shape, and the batches that it is trained on."""

    along: str  # what is varied: length, batch or parameters
    shape: ModelConfig
    length: int
    batch_size: int


def measure_scaling(setting: Setting, config: ScalingBenchmarkConfig) -> list[dict[str, Any]]:
    """A row for every kind of --kinds and every point along each of the three; the other two are the command line's."""
    length, batch_size, shape = setting.data.max_seq_len, setting.bench.batch_size, setting.shape
    points = [
        *(Point("length", shape, tokens, max(1, TOKENS_AT_LEAST // tokens)) for tokens in config.scaling_lengths),
        *(Point("batch", shape, length, rows) for rows in config.scaling_batches),
        *(Point("parameters", shape_of(number, shape), length, batch_size) for number in config.scaling_millions),
    ]
    return [_measured(setting, kind, point) for kind in setting.bench.kinds for point in points]


def _measured(setting: Setting, kind: str, point: Point) -> dict[str, Any]:
    """One case by itself: the largest ones leave no memory for another beside them."""
    shape, rounds = point.shape, setting.bench.rounds
    print(f"{kind}: {point.length} tokens, {point.batch_size} rows, width {shape.hidden_size}", file=sys.stderr)
    setting = replace(setting, shape=shape, bench=replace(setting.bench, batch_size=point.batch_size))
    case = Case(kind, replace(OURS, compiled=False), RandomRows(point.length, shape.vocab_size), setting)
    take_turns({kind: case.turn}, rounds, warm_up=0, device=setting.runtime.torch_device)
    return {
        "kind": kind,
        "along": point.along,
        "tokens_per_row": point.length,
        "rows": point.batch_size,
        "parameters": case.network.num_parameters(),
        "hidden_size": shape.hidden_size,
        "layers": shape.num_hidden_layers,
        **case.row(rounds),
    }


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
        )
        for width in range(HEAD_DIM, WIDEST + 1, HEAD_DIM)
    ]

    def excess(shape: ModelConfig) -> float:
        with torch.device("meta"):
            return math.log(Transformer(shape).num_parameters() / 1e6 / millions)

    first_larger = bisect_left(shapes, 0.0, key=excess)
    return min(shapes[max(0, first_larger - 1) : first_larger + 1], key=lambda shape: abs(excess(shape)))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for a point along length, batch or parameters, kinds side by side."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    points = zip(*([row for row in rows if row["kind"] == kind] for kind in kinds), strict=True)
    columns = {
        "along": lambda point: point[0]["along"],
        "parameters": lambda point: f"{point[0]['parameters'] / 1e6:.1f}M",
        "tokens per row": lambda point: point[0]["tokens_per_row"],
        "rows": lambda point: point[0]["rows"],
    }
    for number, kind in enumerate(kinds):
        columns |= {
            f"{kind} s per step": lambda point, at=number: f"{point[at]['seconds_per_step']:.3f}",
            f"{kind} tokens/s": lambda point, at=number: f"{point[at]['real_tokens_per_second']:,.0f}",
            f"{kind} GFLOP/s": lambda point, at=number: f"{point[at]['flops_per_second'] / 1e9:,.0f}",
        }
    return markdown(points, columns)
