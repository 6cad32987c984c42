"""Fair timings and their tables: the cases take turns, so that other work on the machine slows all of them alike."""

import gc
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Name = TypeVar("Name", bound=Hashable)
Line = TypeVar("Line")


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one case."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low) / 2 / self.median


def synchronise(device: torch.device | str = "cpu") -> None:
    """Wait until a GPU has finished; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    cases: Mapping[Name, Callable[[], Any]], rounds: int, warm_up: int = 1, device: torch.device | str = "cpu"
) -> dict[Name, Timing]:
    """Call every case `warm_up` times unmeasured, then once in each of `rounds` rounds, in the same order."""
    seconds: dict[Name, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()  # a collection would hit the case that happens to run
    try:
        for number in range(-warm_up, rounds):
            for name, case in cases.items():
                synchronise(device)
                began = time.perf_counter()
                case()
                synchronise(device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def markdown(rows: Iterable[Line], columns: Mapping[str, Callable[[Line], Any]]) -> str:
    """A Markdown table with a line for each row; columns: heading -> what is in the cell of a row."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[str(cell(row)) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
