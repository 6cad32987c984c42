"""Fair timings and their tables: the cases take turns, so that other work on the machine slows all of them alike."""

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

Name = TypeVar("Name", bound=Hashable)
Row = dict[str, Any]  # of a table: heading -> value


@dataclass
class Timing:
    """Seconds of each round of one case, and what its last call returned."""

    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low) / 2 / self.median


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    cases: Mapping[Name, Callable[[], Any]], rounds: int, warm_up: int, device: torch.device
) -> dict[Name, Timing]:
    """Call every case `warm_up` times unmeasured, then once in each of `rounds` rounds, in the same order."""
    timings = {name: Timing() for name in cases}
    gc.collect()
    gc.disable()  # a collection would hit the case that happens to run
    try:
        for number in range(-warm_up, rounds):
            for name, case in cases.items():
                synchronise(device)
                began = time.perf_counter()
                timings[name].result = case()
                synchronise(device)
                if number >= 0:
                    timings[name].seconds.append(time.perf_counter() - began)
    finally:
        gc.enable()
    return timings


def markdown(rows: list[Row]) -> str:
    """Markdown tables, one for all rows that have the same entries, whose names are its headings."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        tables.setdefault(tuple(row), []).append([cell(value) for value in row.values()])
    lines = [[headings, ["---"] * len(headings), *cells] for headings, cells in tables.items()]
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in lines)


def cell(value: float | str | None) -> str:
    """Three significant digits, and all those before the point; a dash for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
