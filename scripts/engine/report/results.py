"""What the report says, computed from report.json alone: estimates, their errors, and paired differences."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scripts.engine.report.measure import ANSWERED, Section
from scripts.engine.report.metrics import (
    DISTINCT,
    EXACT,
    METRICS,
    REFERENCE_NATS,
    SECONDS,
    WRITING,
    Columns,
    Item,
    Metric,
    columns_of,
    quality_of,
)
from scripts.engine.statistics import difference_interval, distinct, ratio_error, resampled_sums, wilson

Report = dict[str, Any]
Models = Sequence[dict[str, Any]]  # as report.json describes them
Groups = dict[str, list[int]]  # name -> places of its items

AR, DIFFUSION = "AR", "diffusion"
DIRECTIONS = ("forward", "backward")
LANGUAGES = {"zh": "Chinese", "en": "English", "other": "English and other"}
GROUPS = (  # labels by which rows are grouped
    ("lang",),
    ("direction",),
    ("direction", "seen_in_pretrain"),
    ("split",),
    ("split", "lang"),
    ("kind",),
)
# Begins the names of groups by kind; there are many, so only a file's first metric has them, and those that ask for it.
KIND = "kind "


class Estimate(NamedTuple):
    """A value with its standard error or its 95 % interval, if it has one."""

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None


class Row(NamedTuple):
    """A metric of one group of a file's items."""

    metric: Metric
    group: str
    count: int  # items measured
    values: dict[str, Estimate]  # of each model
    differences: dict[str, Estimate]  # first AR model minus each of the others, by the latter's name

    def without_errors(self) -> "Row":
        values = {name: Estimate(estimate.value) for name, estimate in self.values.items()}
        differences = {name: Estimate(estimate.value) for name, estimate in self.differences.items()}
        return self._replace(values=values, differences=differences)


def is_bound(model: dict[str, Any]) -> bool:
    """Return whether a model's likelihoods are upper bounds; with blocks of one token they are exact."""
    return model["kind"] == DIFFUSION and model["block_size"] != 1


def pairs_of(models: Models) -> list[tuple[str, str]]:
    """The first AR model with each of the others."""
    first = next((model["name"] for model in models if model["kind"] == AR), None)
    return [(first, model["name"]) for model in models if first not in (None, model["name"])]


def titles_of(models: Models) -> dict[str, str]:
    """name -> what figures call the model: its kind, if it is the only one of that kind, else how it writes, if no
    other one does so, else its name."""
    joint = {model["sha256"] for model in models if model["attention"] == "joint"}

    def way(model: dict[str, Any]) -> str:
        if model["kind"] == AR:
            return "joint, as AR" if model["sha256"] in joint else AR
        in_blocks = {"joint": "joint, in blocks", "block": f"blocks of {model['block_size']}"}
        return in_blocks.get(model["attention"], "full attention")

    kinds, ways = [model["kind"] for model in models], [way(model) for model in models]
    titles = {}
    for model, kind, title in zip(models, kinds, ways, strict=True):
        titles[model["name"]] = kind if kinds.count(kind) == 1 else title if ways.count(title) == 1 else model["name"]
    return titles


# -- one estimate ------------------------------------------------------------------------------------------------------


def estimate(metric: Metric, columns: Columns) -> Estimate:
    measured = columns[columns[:, 1] > 0]
    totals, counts = measured.T
    ratio = float(totals.sum() / counts.sum())
    if metric.share:
        low, high = wilson(ratio, len(measured))
        return Estimate(ratio, None, max(low, 0.0), min(high, 1.0))
    value, error = ratio, ratio_error(totals, counts)
    if metric.exponential:
        value = math.exp(min(ratio, 700))
        error *= value  # delta method
    return Estimate(value, None if math.isnan(error) else error)


def difference(metric: Metric, first: Columns, second: Columns, sums: np.ndarray | None) -> Estimate:
    """First minus second, with the interval of a paired bootstrap whose sums (R, 4) are given.

    No interval if all resamples are equal: items that never differ do not show how often others would.
    """
    value = estimate(metric, first).value - estimate(metric, second).value
    if sums is None:
        return Estimate(value)
    low, high = difference_interval(sums, _exponential) if metric.exponential else difference_interval(sums)
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
        return Estimate(value)
    return Estimate(value, None, low, high)


def _exponential(ratio: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(ratio, 700))


# -- the tables of a file ----------------------------------------------------------------------------------------------


def rows_of(section: Section, models: Models) -> list[Row]:
    """Every metric of a file, for all items and for groups of them."""
    metrics = METRICS[section["format"]]
    rows = _rows(section, [metric for metric in metrics if not metric.cost], groups_of(section["items"]), models)
    if section["format"] in ANSWERED:
        languages = groups_of(section["items"], GROUPS[:1])
        writing = _rows(section, [metric for metric in metrics if metric.cost], languages, models)
        if section["batch_size"] > 1:  # the answers of a batch have equal shares of its time
            writing = [row.without_errors() if row.metric.name == SECONDS else row for row in writing]
        rows += writing + _distinct(section, languages, models)
    return rows


def groups_of(items: Sequence[Item], by: Sequence[tuple[str, ...]] = GROUPS) -> Groups:
    """ "all", and each combination of values of labels in which the items differ.

    A group whose name is taken by an earlier one has its labels before it.
    """
    groups = {"all": list(range(len(items)))}
    for labels in by:
        if any(len({item.get(label) for item in items}) < 2 for label in labels):
            continue
        members: Groups = {}
        for place, item in enumerate(items):
            if all(label in item for label in labels):
                members.setdefault(", ".join(_shown(label, item[label]) for label in labels), []).append(place)
        for name, places in sorted(members.items()):
            groups[f"{' and '.join(labels)} {name}" if name in groups else name] = places
    return groups


def _shown(label: str, value: str) -> str:
    if label == "seen_in_pretrain":
        return "seen in pretraining" if value == "True" else "not seen in pretraining"
    if label == "kind":
        return f"{KIND}{value}"
    return LANGUAGES.get(value, value) if label == "lang" else value.replace("_", " ")


def _rows(section: Section, metrics: Sequence[Metric], groups: Groups, models: Models) -> list[Row]:
    """Rows in the order of the metrics. All metrics of a group share its resamples."""
    names, pairs = [model["name"] for model in models], pairs_of(models)
    columns = {
        (metric.name, name): columns_of(metric, section["items"], section["results"][name])
        for metric in metrics
        for name in names
    }
    rows: dict[str, list[Row]] = {metric.name: [] for metric in metrics}
    for group, places in groups.items():
        members = {key: values[places] for key, values in columns.items()}
        sums = {}
        if pairs and len(places) > 1:
            resampled = resampled_sums(np.hstack(list(members.values())))
            sums = dict(zip(members, np.split(resampled, len(members), axis=1), strict=True))
        for metric in [m for m in metrics if m.by_kind or m is metrics[0]] if group.startswith(KIND) else metrics:
            counted = int((members[metric.name, names[0]][:, 1] > 0).sum())
            if not counted:
                continue
            values = {name: estimate(metric, members[metric.name, name]) for name in names}
            differences = {}
            for pair in pairs:
                first, second = ((metric.name, name) for name in pair)
                both = np.hstack([sums[first], sums[second]]) if sums else None
                differences[pair[1]] = difference(metric, members[first], members[second], both)
            rows[metric.name].append(Row(metric, group, counted, values, differences))
    return [row for metric in metrics for row in rows[metric.name]]


def _distinct(section: Section, groups: Groups, models: Models) -> list[Row]:
    rows = []
    for n, metric in enumerate(DISTINCT, start=1):
        for group, places in groups.items():
            values = {}
            for model in models:
                results = section["results"][model["name"]]
                values[model["name"]] = Estimate(distinct([results[place]["ids"] for place in places], n))
            rows.append(Row(metric, group, len(places), values, {}))
    return rows


# -- poems in both directions ------------------------------------------------------------------------------------------


class Reversal(NamedTuple):
    """A metric of one model in either direction of the same couplets."""

    metric: Metric
    model: str
    count: int  # couplets measured in both directions
    forward: float
    backward: float
    difference: Estimate  # forward minus backward; the bootstrap draws couplets


def reversals_of(section: Section, models: Models) -> list[Reversal]:
    """Right answers and nats of the given answers by direction; none if no couplet is asked in both directions."""
    if section["format"] != "poems":
        return []
    couplets: dict[str, dict[str, list[int]]] = {}
    for place, item in enumerate(section["items"]):
        couplets.setdefault(item["couplet"], {}).setdefault(item["direction"], []).append(place)
    both = [couplet for couplet in couplets.values() if len(couplet) == len(DIRECTIONS)]
    reversals = []
    for metric in (EXACT, REFERENCE_NATS) if both else ():
        for model in models:
            columns = columns_of(metric, section["items"], section["results"][model["name"]])
            sums = np.array(
                [[columns[couplet[way]].sum(axis=0) for way in DIRECTIONS] for couplet in both]
            )  # (C, 2, 2)
            measured = sums[(sums[:, :, 1] > 0).all(axis=1)]
            if len(measured):
                reversals.append(_reversal(metric, model["name"], measured[:, 0], measured[:, 1]))
    return reversals


def _reversal(metric: Metric, model: str, forward: Columns, backward: Columns) -> Reversal:
    """forward, backward: (C, 2), sums over the rows of each couplet."""
    sums = resampled_sums(np.hstack([forward, backward])) if len(forward) > 1 else None
    ratios = (float(columns[:, 0].sum() / columns[:, 1].sum()) for columns in (forward, backward))
    return Reversal(metric, model, len(forward), *ratios, difference(metric, forward, backward, sums))


# -- quality against cost ----------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A way of decoding."""

    model: str
    policy: str
    setting: str
    quality: Estimate
    passes: Estimate
    seconds: Estimate
    tokens_per_second: float
    difference: Estimate | None  # in quality: AR with the settings of the command minus this


def points_of(report: Report) -> tuple[Metric, list[Point]] | None:
    """The measure of quality and the points of the frontier; None if there is none."""
    frontier = report["frontier"]
    if not frontier:
        return None
    section = next(section for section in report["sources"] if section["name"] == frontier["source"])
    items, metric = section["items"][: frontier["items"]], quality_of(section["format"])
    costs = {cost.name: cost for cost in WRITING}
    baseline, points = None, []
    for point in frontier["points"]:
        results, gap = point["results"], None
        columns = columns_of(metric, items, results)
        if baseline is not None:
            sums = resampled_sums(np.hstack([baseline, columns])) if len(items) > 1 else None
            gap = difference(metric, baseline, columns, sums)
        elif point["policy"] == AR:
            baseline = columns
        passes, seconds = (
            estimate(costs[name], columns_of(costs[name], items, results)) for name in ("forward passes", SECONDS)
        )
        speed = sum(result["num_tokens"] for result in results) / sum(result["seconds"] for result in results)
        way = point["model"], point["policy"], point["setting"]
        points.append(Point(*way, estimate(metric, columns), passes, seconds, speed, gap))
    return metric, points


def summary_of(report: Report) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """file -> metric -> group -> {"count", "models": {name: value}, "differences": {name: (value, low, high)}}."""
    summary: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for section in report["sources"]:
        for row in rows_of(section, report["models"]):
            summary.setdefault(section["name"], {}).setdefault(row.metric.name, {})[row.group] = {
                "count": row.count,
                "models": {name: estimate.value for name, estimate in row.values.items()},
                "differences": {name: (gap.value, gap.low, gap.high) for name, gap in row.differences.items()},
            }
    return summary
