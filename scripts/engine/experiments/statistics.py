"""Means over seeds with their intervals, and paired differences: what an experiment's figure and summary show."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL = 1.96  # used beyond them; 4 % too narrow at most

UNNAMED = {"value", "minus", "mean", "low", "high", "n", "unit"}  # fields of a line that tell no cells apart

Record = dict[str, Any]


class Comparison(NamedTuple):
    """How an experiment's runs are compared."""

    by: tuple[str, ...]  # fields that tell its cells apart; within a cell only the seed differs
    values: tuple[str, ...]  # measured
    contrast: str  # of `by`: the field whose first level the others are compared with, all else equal


COMPARISONS = {
    "schedules": Comparison(("schedule",), ("nats_per_token", "judge_nats", "distinct_2"), "schedule"),
    "initialisation": Comparison(("budget", "ar_share"), ("nats_per_token",), "ar_share"),
    "repetition": Comparison(("weights", "repetitions", "kind"), ("nats_per_token",), "kind"),
}


def mean_interval(values: Sequence[float]) -> Record:
    """Mean and 95 % t interval, None where one value alone has none."""
    mean, number = fmean(values), len(values)
    if number < 2:
        return {"mean": mean, "low": None, "high": None, "n": number, "unit": "seeds"}
    quantile = STUDENT[number - 2] if number - 2 < len(STUDENT) else NORMAL
    half = quantile * stdev(values) / sqrt(number)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": number, "unit": "seeds"}


def summarise(runs: Sequence[Record], comparison: Comparison) -> list[Record]:
    """For every cell and value the mean over the seeds; for every cell but those of the first level of the contrast
    also, marked `minus`, the mean of the differences from that level, seed by seed."""
    cells: dict[tuple, list[Record]] = {}
    for run in runs:
        cells.setdefault(tuple(run[name] for name in comparison.by), []).append(run)
    place = comparison.by.index(comparison.contrast)
    first = next(iter(cells))[place]
    summary = []
    for value in comparison.values:
        for key, members in cells.items():
            cell = {"value": value, **dict(zip(comparison.by, key, strict=True))}
            summary.append(cell | mean_interval([run[value] for run in members]))
            if key[place] != first:
                others = {run["seed"]: run[value] for run in cells[(*key[:place], first, *key[place + 1 :])]}
                differences = [run[value] - others[run["seed"]] for run in members]
                summary.append(cell | {"minus": first} | mean_interval(differences))
    return summary


def lines(summary: Sequence[Record]) -> list[str]:
    """The summary for people."""
    told = []
    for row in summary:
        cell = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items() if key not in UNNAMED}
        name = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in cell.items())
        minus = f", minus that of {row['minus']}" if "minus" in row else ""
        spread = "" if row["low"] is None else f" ({row['low']:.4f} to {row['high']:.4f})"
        told.append(f"{row['value']}, {name}{minus}: {row['mean']:.4f}{spread}, {row['n']} {row['unit']}")
    return told
