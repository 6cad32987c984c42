"""Fair timings: the cases take turns, so that whatever else the machine does slows all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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
    """Wait until a GPU has done what it was told; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Timing]:
    """Call every case `warm_up` times unmeasured, then once in each of `rounds` rounds, in the same order."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()  # a collection would hit whichever case is running
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
