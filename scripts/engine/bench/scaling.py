"""How the cost of a training step grows with the length of its rows, their number, and the size of the model.

Rows are one random document each, and full; nothing is compiled, which would take longer than what is measured.
"""

import math
import sys
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from dataset.order import RowOrder
from model.config import ModelConfig
from model.transformer import Transformer
from scripts.engine.bench.training import OURS, Case, Setting

LAYERS_PER_WIDTH = 8 / 512  # of the default shape, kept at every size
HEAD_DIM, WIDEST = 64, 2048
TOKENS_AT_LEAST = 2048  # in a batch, where lengths are compared


@dataclass(frozen=True)
class ScalingBenchmarkConfig:
    """Measuring growth."""

    scaling_lengths: Annotated[tuple[int, ...], "tokens per row"] = (128, 256, 512, 1024, 2048, 4096)
    scaling_batches: Annotated[tuple[int, ...], "rows per step, of the length of --max-seq-len"] = (1, 2, 4, 8, 16, 32)
    scaling_millions: Annotated[tuple[float, ...], "parameters, in millions"] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

    def __post_init__(self):
        for name in ("scaling_lengths", "scaling_batches", "scaling_millions"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected positive numbers")


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


def measure_scaling(setting: Setting, config: ScalingBenchmarkConfig) -> list[dict[str, Any]]:
    """Every kind of --kinds along each of the three, the other two being those of the command line."""
    length, batch, shape = setting.data.max_seq_len, setting.bench.batch_size, setting.shape
    points = [
        *(("length", shape, n, max(1, TOKENS_AT_LEAST // n)) for n in config.scaling_lengths),
        *(("batch", shape, length, rows) for rows in config.scaling_batches),
        *(("parameters", shape_of(millions, shape), length, batch) for millions in config.scaling_millions),
    ]
    return list(chain.from_iterable(_measured(setting, kind, points) for kind in setting.bench.kinds))


def _measured(setting: Setting, kind: str, points: list[tuple]) -> list[dict[str, Any]]:
    rows = []
    for along, shape, length, batch in points:
        print(f"{kind}: {length} tokens, {batch} rows, width {shape.hidden_size}", file=sys.stderr)
        bench = replace(setting.bench, batch_size=batch)
        source = RandomRows(length, shape.vocab_size)
        case = Case(kind, replace(OURS, compiled=False), shape, source, bench, setting.runtime)
        for _ in range(bench.rounds):
            case.turn()
        rows.append(
            {
                "kind": kind,
                "along": along,
                "tokens_per_row": length,
                "rows": batch,
                "parameters": case.network.num_parameters(),
                "hidden_size": shape.hidden_size,
                "layers": shape.num_hidden_layers,
                **case.row(bench.rounds),
            }
        )
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
        )
        for width in range(HEAD_DIM, WIDEST + 1, HEAD_DIM)
    ]
    with torch.device("meta"):
        return min(shapes, key=lambda shape: abs(math.log(Transformer(shape).num_parameters() / 1e6 / millions)))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for a point along length, batch or parameters, kinds side by side."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    heads = "".join(f" {kind} s per step | {kind} tokens/s | {kind} GFLOP/s |" for kind in kinds)
    head = f"| along | parameters | tokens per row | rows |{heads}"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for i, row in enumerate(of_kind := [row for row in rows if row["kind"] == kinds[0]]):
        cells = [row["along"], f"{row['parameters'] / 1e6:.1f}M", str(row["tokens_per_row"]), str(row["rows"])]
        for n in range(len(kinds)):
            here = rows[n * len(of_kind) + i]
            cells += [f"{here['seconds_per_step']:.3f}", f"{here['real_tokens_per_second']:,.0f}"]
            cells.append(f"{here['flops_per_second'] / 1e9:,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
