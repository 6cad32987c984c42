"""What the report says, computed from report.json alone: estimates, their errors, and paired differences."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from scripts.engine.decoding.answers import Answer, is_premature
from scripts.engine.likelihood.choices import Question, outcome
from scripts.engine.report.measure import ANSWERED, Section, answer_in
from scripts.engine.statistics import (
    chrf,
    difference_interval,
    distinct,
    is_correct,
    longest_repeat,
    ratio_error,
    resampled_sums,
    wilson,
)

Item = dict[str, Any]
Columns = np.ndarray  # (N, 2): numerator and denominator of each item, 0 and 0 where it was not measured
LANGUAGES = {"zh": "Chinese", "en": "English", "other": "English and other"}
GROUPS = (  # which labels rows are told apart by
    ("lang",),
    ("direction",),
    ("direction", "seen_in_pretrain"),
    ("split",),
    ("split", "lang"),
    ("kind",),
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
AR, DIFFUSION = "AR", "diffusion"
SECONDS = "seconds"
KIND = "kind "  # begins the name of a group; there are many, so they are told of a file's first metric alone


class Metric(NamedTuple):
    """A ratio of sums over items; of a share or a mean every measured item counts 1."""

    name: str
    of: Callable[[Item, Item], tuple[float, float]]  # (item, result) -> numerator and denominator
    told: str
    share: bool = False  # of items, so that its interval is Wilson's; else it has a standard error
    bound: bool = False  # for a diffusion model an upper bound
    exponential: bool = False  # e to the ratio is shown
    digits: int = 3
    cost: bool = False  # of the writing, not of what is written


class Estimate(NamedTuple):
    """A value, with its standard error or its interval of 95 %, where there is one."""

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None


class Row(NamedTuple):
    metric: Metric
    group: str
    count: int  # items measured
    values: dict[str, Estimate]  # of each model
    differences: dict[str, Estimate]  # first AR model minus each diffusion model, by the latter's name


def _choice(place: int) -> Callable[[Item, Item], tuple[float, float]]:
    def right(item: Item, result: Item) -> tuple[float, float]:
        question = Question(item["question"], item["choices"], item["answer"], item["lang"])
        return float(outcome(question, np.array(result["nats"]))[place]), 1.0

    return right


def _reference_nats(item: Item, result: Item) -> tuple[float, float]:
    found = result.get("reference_likelihood")
    return (found["nats"], found["tokens"]) if found else (0.0, 0.0)


def _premature(item: Item, result: Item) -> tuple[float, float]:
    return float(is_premature(answer_in(result), Answer("", item["reference_tokens"], True))), 1.0


def is_right(item: Item, text: str) -> bool:
    """Whether an answer is the wanted one. A number that ends a worked answer must be the last number written: sums on
    the way to it hold many a number by chance."""
    if item["wanted"] == item["reference"].strip() or not NUMBER.fullmatch(item["wanted"]):
        return is_correct(text, item["wanted"])
    numbers = [float(number.replace(",", "")) for number in NUMBER.findall(text)]
    return numbers[-1:] == [float(item["wanted"].replace(",", ""))]


EXACT = Metric(
    "exact match",
    lambda i, r: (float(is_right(i, r["text"])), 1.0),
    "share of the answers that hold the wanted string as words of their own, whatever its case; where a worked answer "
    "ends with a number, share of those whose last number it is",
    share=True,
)
CHRF = Metric(
    "chrF",
    lambda i, r: (chrf(r["text"], i["reference"]), 1.0),
    "mean over answers of chrF2, 0 to 100: how far "
    "character 1- to 6-grams are those of the reference, recall counting twice",
    digits=1,
)
NATS = Metric(
    "nats per token", lambda i, r: (r["nats"], i["tokens"]), "-log p of all tokens / their number", bound=True
)
LIKELIHOOD = [
    NATS,
    NATS._replace(name="perplexity", told="e to the nats per token", exponential=True, digits=2),
    Metric(
        "bits per byte",
        lambda i, r: (r["nats"] / math.log(2), i["bytes"]),
        "-log2 p / UTF-8 bytes of the text, which does not depend on the tokenizer",
        bound=True,
    ),
]
REFERENCE_NATS = Metric(
    "nats per token of the given answer",
    _reference_nats,
    "-log p of the answer in the file, its question given / its "
    "tokens; EOS is not scored; only where it fits the context",
    bound=True,
)
WRITING = [
    Metric(
        "tokens",
        lambda i, r: (r["num_tokens"], 1.0),
        "tokens of an answer up to EOS, that included",
        digits=2,
        cost=True,
    ),
    Metric(
        "premature",
        _premature,
        "share of the answers that ended below a quarter of the reference's length",
        share=True,
        cost=True,
    ),
    Metric(
        "overrun",
        lambda i, r: (float(not r["ended"]), 1.0),
        "share of the answers without an end",
        share=True,
        cost=True,
    ),
    Metric(
        "longest repeat",
        lambda i, r: (longest_repeat(r["ids"]) / max(len(r["ids"]), 1), 1.0),
        "length of the longest token sequence that an answer contains twice, as a share of the answer",
        cost=True,
    ),
    Metric(
        "forward passes",
        lambda i, r: (r["num_forward_passes"], 1.0),
        "network calls per answer (NFE)",
        digits=2,
        cost=True,
    ),
    Metric(
        SECONDS,
        lambda i, r: (r["seconds"], 1.0),
        "wall-clock time per answer; that of a batch is shared by its answers and so has no error",
        digits=4,
        cost=True,
    ),
]
METRICS = {
    "text": LIKELIHOOD,
    "chat": LIKELIHOOD,
    "choices": [
        Metric("acc", _choice(1), "share of the questions whose right choice has the least nats", share=True),
        Metric("acc_norm", _choice(2), "the same by nats per UTF-8 byte of the choice", share=True),
        Metric(
            "nats of the right choice",
            lambda i, r: (r["nats"][i["answer"]], 1.0),
            "mean over questions of -log p of the right choice, its question given",
            bound=True,
            digits=2,
        ),
    ],
    "questions": [EXACT, *WRITING],
    "poems": [EXACT, REFERENCE_NATS, *WRITING],
    "open": [CHRF, REFERENCE_NATS, *WRITING],
}
DISTINCT = [
    Metric(
        f"distinct-{n}",
        lambda i, r: (0.0, 0.0),
        f"distinct token {n}-grams / all of them, over all answers together; "
        "a resample would hold answers twice, so it has no interval",
        cost=True,
    )
    for n in (1, 2)
]


def is_bound(model: dict[str, Any]) -> bool:
    """Whether its likelihoods are bounds: of blocks of one token they are exact."""
    return model["kind"] == DIFFUSION and model["block_size"] != 1


def quality_of(form: str) -> Metric:
    """What the frontier shows."""
    return METRICS[form][0]


def rows_of(section: Section, models: Sequence[dict[str, Any]]) -> list[Row]:
    """Every metric of a file, for all items and for groups of them."""
    metrics, names = METRICS[section["format"]], [model["name"] for model in models]
    columns = {
        (metric.name, name): columns_of(metric, section["items"], section["results"][name])
        for metric in metrics
        for name in names
    }
    groups = groups_of(section["items"])
    rows = _rows([metric for metric in metrics if not metric.cost], groups, columns, models)
    if section["format"] in ANSWERED:
        languages = groups_of(section["items"], GROUPS[:1])
        rows += _rows([metric for metric in metrics if metric.cost], languages, columns, models)
        rows += _distinct(section, languages, names)
        if section["batch_size"] > 1:
            rows = [_shared(row) if row.metric.name == SECONDS else row for row in rows]
    return rows


def _shared(row: Row) -> Row:
    """Without errors: the answers of a batch have its time in equal shares."""
    values, differences = (
        {name: Estimate(found.value) for name, found in some.items()} for some in (row.values, row.differences)
    )
    return row._replace(values=values, differences=differences)


def columns_of(metric: Metric, items: Iterable[Item], results: Iterable[Item]) -> Columns:
    return np.array([metric.of(item, result) for item, result in zip(items, results, strict=True)], dtype=float)


def groups_of(items: Sequence[Item], by: Sequence[tuple[str, ...]] = GROUPS) -> dict[str, list[int]]:
    """ "all", and each value or combination of values of the labels by which the items differ -> their places. A value
    that is called as an earlier group is has its label before it."""
    groups = {"all": list(range(len(items)))}
    for labels in by:
        if all(len({item.get(label) for item in items}) > 1 for label in labels):
            found: dict[str, list[int]] = {}
            for place, item in enumerate(items):
                if all(label in item for label in labels):
                    found.setdefault(", ".join(_shown(label, item[label]) for label in labels), []).append(place)
            for name, places in sorted(found.items()):
                groups[f"{' and '.join(labels)} {name}" if name in groups else name] = places
    return groups


def _shown(label: str, value: str) -> str:
    if label == "seen_in_pretrain":
        return "seen in pretraining" if value == "True" else "not seen in pretraining"
    if label == "kind":
        return f"{KIND}{value}"
    return LANGUAGES.get(value, value) if label == "lang" else value.replace("_", " ")


def pairs_of(models: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The first AR model with each diffusion model."""
    first = next((model["name"] for model in models if model["kind"] == AR), None)
    return [(first, model["name"]) for model in models if first is not None and model["kind"] == DIFFUSION]


def _rows(
    metrics: Sequence[Metric],
    groups: dict[str, list[int]],
    columns: dict[tuple[str, str], Columns],
    models: Sequence[dict[str, Any]],
) -> list[Row]:
    """All metrics of a group share its resamples."""
    pairs, names = pairs_of(models), [model["name"] for model in models]
    made: dict[tuple[str, str], Row] = {}
    for group, places in groups.items():
        keys = [(metric.name, name) for metric in metrics for name in names]
        values = {key: columns[key][places] for key in keys}
        sums = resampled_sums(np.hstack([values[key] for key in keys])) if pairs and len(places) > 1 else None
        for metric in metrics[: 1 if group.startswith(KIND) else None]:
            counted = int((values[metric.name, names[0]][:, 1] > 0).sum())
            if not counted:
                continue
            differences = {
                second: difference(
                    metric,
                    values[metric.name, first],
                    values[metric.name, second],
                    None if sums is None else sums[:, _places(keys, metric.name, first, second)],
                )
                for first, second in pairs
            }
            found = {name: estimate(metric, values[metric.name, name]) for name in names}
            made[metric.name, group] = Row(metric, group, counted, found, differences)
    return [made[metric.name, group] for metric in metrics for group in groups if (metric.name, group) in made]


def _places(keys: list[tuple[str, str]], metric: str, first: str, second: str) -> list[int]:
    a, b = keys.index((metric, first)), keys.index((metric, second))
    return [2 * a, 2 * a + 1, 2 * b, 2 * b + 1]


def estimate(metric: Metric, columns: Columns) -> Estimate:
    measured = columns[columns[:, 1] > 0]
    totals, counts = measured.T
    ratio = float(totals.sum() / counts.sum())
    if metric.share:
        low, high = wilson(ratio, len(measured))
        return Estimate(ratio, None, max(low, 0.0), min(high, 1.0))
    error = ratio_error(totals, counts)
    value = math.exp(min(ratio, 700)) if metric.exponential else ratio
    error = error * value if metric.exponential else error  # delta method
    return Estimate(value, None if math.isnan(error) else error)


def difference(metric: Metric, first: Columns, second: Columns, sums: np.ndarray | None) -> Estimate:
    """First minus second, with the interval of a paired bootstrap whose sums (R, 4) are given. None where all
    resamples are equal: items that never differ say nothing of how often others would."""
    values = [estimate(metric, columns).value for columns in (first, second)]
    interval = (None, None)
    if sums is not None:
        interval = difference_interval(
            sums, lambda ratio: np.exp(np.minimum(ratio, 700)) if metric.exponential else ratio
        )
        interval = (None, None) if math.isclose(*interval, rel_tol=1e-9, abs_tol=1e-12) else interval
    return Estimate(values[0] - values[1], None, *interval)


def _distinct(section: Section, groups: dict[str, list[int]], names: Sequence[str]) -> list[Row]:
    made = []
    for n, metric in enumerate(DISTINCT, start=1):
        for group, places in groups.items():
            values = {
                name: Estimate(distinct([section["results"][name][place]["ids"] for place in places], n))
                for name in names
            }
            made.append(Row(metric, group, len(places), values, {}))
    return made


class Point(NamedTuple):
    """A way of decoding."""

    model: str
    policy: str
    setting: str
    quality: Estimate
    passes: Estimate
    seconds: Estimate
    tokens_per_second: float
    difference: Estimate | None  # in quality, of AR as it is set minus this


def points_of(report: dict[str, Any]) -> tuple[Metric, list[Point]] | None:
    """The frontier: what its quality is, and its points; None if there is none."""
    if not report["frontier"]:
        return None
    frontier = report["frontier"]
    section = next(section for section in report["sources"] if section["name"] == frontier["source"])
    items, metric = section["items"][: frontier["items"]], quality_of(section["format"])
    by_name = {metric.name: metric for metric in WRITING}
    first, points = None, []
    for point in frontier["points"]:
        results, columns = point["results"], columns_of(metric, items, point["results"])
        first = columns if first is None and point["policy"] == AR else first
        passes, seconds = (
            estimate(m, columns_of(m, items, results)) for m in (by_name["forward passes"], by_name[SECONDS])
        )
        tokens, spent = (sum(result[name] for result in results) for name in ("num_tokens", "seconds"))
        against = None
        if first is not None and first is not columns:
            sums = resampled_sums(np.hstack([first, columns])) if len(items) > 1 else None
            against = difference(metric, first, columns, sums)
        place = point["model"], point["policy"], point["setting"]
        points.append(Point(*place, estimate(metric, columns), passes, seconds, tokens / spent, against))
    return metric, points


def summary_of(report: dict[str, Any]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """file -> metric -> group -> {"count", "models": {name: value}, "differences": {name: (value, low, high)}}."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for section in report["sources"]:
        for row in rows_of(section, report["models"]):
            found.setdefault(section["name"], {}).setdefault(row.metric.name, {})[row.group] = {
                "count": row.count,
                "models": {name: value.value for name, value in row.values.items()},
                "differences": {name: (d.value, d.low, d.high) for name, d in row.differences.items()},
            }
    return found
