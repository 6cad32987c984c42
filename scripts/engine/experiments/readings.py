"""The experiments that are read off reports of scripts.eval.report, one for each seed: reversal, and quality against
cost. Intervals are over items: what several reports say of one fact or question is one cluster."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.engine.files import sha256_of
from scripts.engine.report.measure import Section
from scripts.engine.report.metrics import Item, Metric, quality_of
from scripts.engine.report.page import read_report
from scripts.engine.report.results import AR, DIFFUSION, Report
from scripts.engine.statistics import paired_interval, resampled_sums, wilson

Record = dict[str, Any]
Clusters = dict[Any, np.ndarray]  # fact or question -> (2,) right answers and answers
MEASURES = {"exact match": "questions", "multiple choice": "choices"}  # and the format of their files
SPLITS = ("seen", "reversed")
CELL = "kind", "policy", "setting"  # of the frontier
COSTS = {"passes": "num_forward_passes", "seconds": "seconds"}
REVERSED_KIND = "capital"  # of a country; "reversed": training said only which country a city is the capital of
SOURCES = "command", "models", "tokenizer", "commit", "torch", "device", "processor"


def reversal(reports: Mapping[str, Report]) -> Record:
    """Right answers on facts that training stated in this direction, and on facts stated only in the other one.

    reports: path -> content. Both phrasings of a question, and all reports, make one cluster per fact.
    """
    runs, pooled = [], {}
    for path, report in reports.items():
        for measure, form in MEASURES.items():
            sections = _sections(path, report, form)
            for kind, name in _models(path, report).items():
                for split in SPLITS:
                    clusters = _facts(sections, report, name, split)
                    if not clusters:
                        raise ValueError(f"{path} has no {form} of the split {split!r}; make it on the bundled ones")
                    runs.append(
                        {"value": measure, "split": split, "kind": kind, "report": path, **_counts(clusters)},
                    )
                    _add(pooled.setdefault((measure, split, kind), {}), clusters)
    summary = []
    for (measure, split, kind), clusters in pooled.items():
        cell = {"value": measure, "split": split, "kind": kind}
        size = {"n": len(clusters), "unit": "facts"}
        summary.append(cell | {"mean": _share(clusters), **_interval(clusters), **size})
        base = pooled.get((measure, split, AR))
        if kind != AR and base:
            low, high = paired_interval(*(np.array([some[fact] for fact in sorted(base)]) for some in (clusters, base)))
            gap = {"minus": AR, "mean": _share(clusters) - _share(base), "low": low, "high": high}
            summary.append(cell | gap | size)
    return {"runs": runs, "summary": summary}


def frontier(reports: Mapping[str, Report]) -> Record:
    """The share of right answers, forward passes and seconds of every policy and setting of the first model of each
    kind; questions are clusters."""
    runs, pooled, costs = [], {}, {}
    ways: dict[str, list] = {}  # path -> what its frontier compares, and on which questions
    for path, report in reports.items():
        items, metric = _frontier_items(path, report)
        kinds = {name: kind for kind, name in _models(path, report).items()}
        ways[path] = []
        for point in (point for point in report["frontier"]["points"] if point["model"] in kinds):
            key = kinds[point["model"]], point["policy"], point["setting"]
            results = point["results"]
            questions = {item["key"]: _ratio(metric, item, result) for item, result in zip(items, results, strict=True)}
            cost = {name: float(np.mean([result[field] for result in results])) for name, field in COSTS.items()}
            ways[path].append((key, list(questions)))
            _add(pooled.setdefault(key, {}), questions)
            costs.setdefault(key, []).append(cost)
            runs.append({**dict(zip(CELL, key, strict=True)), "report": path, **_counts(questions), **cost})
        first = next(iter(ways))
        if ways[path] != ways[first]:
            raise ValueError(f"{path} has another frontier than {first}: other questions or settings")
    summary = []
    for key, clusters in pooled.items():
        cell = {"value": "right answers", **dict(zip(CELL, key, strict=True))}
        cell |= {name: float(np.mean([cost[name] for cost in costs[key]])) for name in COSTS}
        cell |= {"mean": _share(clusters), **_interval(clusters), "n": len(clusters), "unit": "questions"}
        summary.append(cell)
    return {"runs": runs, "summary": summary}


# -- reports -----------------------------------------------------------------------------------------------------------


def read_reports(paths: Sequence[Path]) -> dict[str, Report]:
    """path -> content of each report. Raise ValueError if one is given twice."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"--reports {','.join(map(str, paths))}: one is given twice")
    return {str(path): read_report(path) for path in paths}


def origin(reports: Mapping[str, Report]) -> list[Record]:
    """Return the source of the numbers, for the result's file."""
    return [
        {"path": path, "sha256": sha256_of(Path(path)), **{name: report[name] for name in SOURCES}}
        for path, report in reports.items()
    ]


def _models(path: str, report: Report) -> dict[str, str]:
    """kind -> name of the first model of each kind."""
    first: dict[str, str] = {}
    for model in report["models"]:
        first.setdefault(model["kind"], model["name"])
    if set(first) != {AR, DIFFUSION}:
        raise ValueError(f"{path} has {' and '.join(first)} models only; both kinds are compared")
    return first


def _sections(path: str, report: Report, form: str) -> list[Section]:
    sections = [section for section in report["sources"] if section["format"] == form]
    if not sections:
        raise ValueError(f"{path} has no file of {form}; make it on the bundled questions, without --eval-data")
    return sections


def _frontier_items(path: str, report: Report) -> tuple[list[Item], Metric]:
    """The questions of the frontier, and its measure of quality."""
    frontier = report["frontier"]
    if not frontier:
        raise ValueError(f"{path} has no frontier; make it without --frontier-questions 0")
    section = next(section for section in report["sources"] if section["name"] == frontier["source"])
    metric = quality_of(section["format"])
    if not metric.share:
        raise ValueError(f"{path}: its frontier is of {section['name']}, which has no right and wrong answers")
    return section["items"][: frontier["items"]], metric


# -- clusters ----------------------------------------------------------------------------------------------------------


def _facts(sections: Sequence[Section], report: Report, name: str, split: str) -> Clusters:
    """fact -> right answers and answers of a model on one split.

    A fact is known by its language and the wanted answer, which a question with choices has in the file of questions.
    """
    items = [item for section in report["sources"] for item in section["items"]]
    wanted = {item["question"]: item["wanted"] for item in items if "wanted" in item}
    clusters: Clusters = {}
    for section in sections:
        metric = quality_of(section["format"])
        for item, result in zip(section["items"], section["results"][name], strict=True):
            if item.get("split") == split and item.get("kind") == REVERSED_KIND:
                fact = item["lang"], wanted.get(item["question"], item["question"])
                _add(clusters, {fact: _ratio(metric, item, result)})
    return clusters


def _ratio(metric: Metric, item: Item, result: Record) -> np.ndarray:
    return np.array(metric.of(item, result))


def _add(total: Clusters, clusters: Clusters) -> None:
    for key, ratio in clusters.items():
        total[key] = total.get(key, 0) + ratio


def _counts(clusters: Clusters) -> Record:
    right, answers = sum(clusters.values())
    return {"right": int(right), "asked": int(answers)}


def _share(clusters: Clusters) -> float:
    right, answers = sum(clusters.values())
    return float(right / answers)


def _interval(clusters: Clusters) -> Record:
    """95 % by a bootstrap over clusters; if all answers are right, or none, Wilson's of as many clusters."""
    ratios, share = np.array([clusters[key] for key in sorted(clusters)]), _share(clusters)
    if share in (0, 1):
        low, high = wilson(share, len(ratios))
    else:
        sums = resampled_sums(ratios)
        low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5]).tolist()
    return {"low": low, "high": high}


READINGS: dict[str, Callable[[Mapping[str, Report]], Record]] = {"reversal": reversal, "frontier": frontier}
