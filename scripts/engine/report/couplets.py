"""Poems forward and backward: what a model answers to one line of a couplet and to the other, paired by couplet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scripts.engine.report.measure import Section
from scripts.engine.report.results import EXACT, REFERENCE_NATS, Columns, Estimate, Metric, columns_of, difference
from scripts.engine.statistics import resampled_sums

DIRECTIONS = ("forward", "backward")


class Reversal(NamedTuple):
    """A metric of a model in either direction of the same couplets."""

    metric: Metric
    model: str
    count: int  # couplets measured in both directions
    forward: float
    backward: float
    difference: Estimate  # forward minus backward, the couplets being drawn again


def reversals_of(section: Section, models: Sequence[dict[str, Any]]) -> list[Reversal]:
    """Every model's right answers and nats of the given answers; none where no couplet is asked in both directions."""
    couplets: dict[str, dict[str, list[int]]] = {}
    for place, item in enumerate(section["items"]):
        if section["format"] == "poems" and "couplet" in item:
            couplets.setdefault(item["couplet"], {}).setdefault(item["direction"], []).append(place)
    pairs = [[found[way] for way in DIRECTIONS] for found in couplets.values() if found.keys() >= set(DIRECTIONS)]
    made = []
    for metric in (EXACT, REFERENCE_NATS) if pairs else ():
        for model in models:
            columns = columns_of(metric, section["items"], section["results"][model["name"]])
            if row := _reversal(metric, model["name"], columns, pairs):
                made.append(row)
    return made


def _reversal(metric: Metric, model: str, columns: Columns, pairs: list[list[list[int]]]) -> Reversal | None:
    """columns: (N, 2); pairs: of each couplet the places of its rows forward and backward."""
    sums = np.array([[columns[places].sum(axis=0) for places in pair] for pair in pairs]).reshape(-1, 2, 2)
    sums = sums[(sums[:, :, 1] > 0).all(axis=1)]
    if not len(sums):
        return None
    first, second = sums[:, 0], sums[:, 1]
    drawn = resampled_sums(np.hstack([first, second])) if len(sums) > 1 else None
    forward, backward = (float(some[:, 0].sum() / some[:, 1].sum()) for some in (first, second))
    return Reversal(metric, model, len(sums), forward, backward, difference(metric, first, second, drawn))
