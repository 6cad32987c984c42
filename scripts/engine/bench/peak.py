"""The most that this device makes of a matrix product, against which a step is measured."""

from typing import Any

import torch

from scripts.engine.bench.timing import interleave

# (rows, inner, columns): squares, and products as long as a batch and as wide as a layer. The best counts.
SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 2816), (4096, 1024, 1024)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
DTYPES = ("float32", "bfloat16")
ROUNDS = 7


def measure_peak(device: torch.device) -> list[dict[str, Any]]:
    """Operations per second, a multiply and an add being two, of every shape in both precisions: medians."""
    shapes = SHAPES.get(device.type, SHAPES["cpu"])
    cases = {(dtype, shape): _product(device, getattr(torch, dtype), *shape) for dtype in DTYPES for shape in shapes}
    timings = interleave(cases, ROUNDS, 2, device)
    return [
        {
            "dtype": dtype,
            "shape": "x".join(map(str, shape)),
            "flops_per_second": 2 * shape[0] * shape[1] * shape[2] / timing.median,
            "spread": timing.spread,
        }
        for (dtype, shape), timing in timings.items()
    ]


def _product(device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int) -> Any:
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, inner), (columns, inner)))
    out = torch.empty(rows, columns, device=device, dtype=dtype)  # memory that is new to the system is slow to write
    return lambda: torch.mm(a, b.T, out=out)


def best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Operations per second by dtype."""
    return {dtype: max(row["flops_per_second"] for row in rows if row["dtype"] == dtype) for dtype in DTYPES}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| precision | product | GFLOP/s |", "|---|---|---|"]
    lines += [
        f"| {row['dtype']} | {row['shape']} | {row['flops_per_second'] / 1e9:,.0f} +- {row['spread']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)
