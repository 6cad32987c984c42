"""The experiments that are read off reports (`scripts.eval.report`), one for each seed: reversal, and quality against
cost. Items are the unit of their intervals: what several reports say of one fact or question is one cluster."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.engine.files import sha256_of
from scripts.engine.report.metrics import quality_of
from scripts.engine.report.page import read_report
from scripts.engine.report.results import AR, DIFFUSION
from scripts.engine.statistics import paired_interval, resampled_sums, wilson

Record = dict[str, Any]
Clusters = dict[Any, np.ndarray]  # fact or question -> (2,) right answers and answers
MEASURES = {"exact match": "questions", "multiple choice": "choices"}
SPLITS = ("seen", "reversed")
CELL = "kind", "policy", "setting"  # of the frontier
COSTS = {"passes": "num_forward_passes", "seconds": "seconds"}
REVERSED_KIND = "capital"  # of a country; "reversed": only ever told is which country a city is the capital of


def reversal(reports: dict[str, Any]) -> dict[str, Any]:
    """Right answers on facts told in this direction and on facts told in the other one alone, of the same kind.

    reports: path -> what it holds. Both phrasings of a question, and all reports, make one cluster per fact.
    """
    runs, pooled = [], {}
    for path, report in reports.items():
        names = model_names(path, report)
        for measure, form in MEASURES.items():
            found = sections(path, report, form)
            for kind, name in names.items():
                for split in SPLITS:
                    clusters = clusters_of(found, report, name, split)
                    if not clusters:
                        raise ValueError(f"{path} has no {form} of the split {split!r}; make it on the bundled ones")
                    cell = {"value": measure, "split": split, "kind": kind}
                    runs.append(cell | {"report": path, **counts(clusters)})
                    into = pooled.setdefault((measure, split, kind), {})
                    for key, pair in clusters.items():
                        into[key] = into.get(key, 0) + pair
    summary = []
    for (measure, split, kind), clusters in pooled.items():
        cell = {"value": measure, "split": split, "kind": kind}
        summary.append(cell | {"mean": share(clusters), **interval(clusters), "n": len(clusters), "unit": "facts"})
        if kind != AR and (measure, split, AR) in pooled:
            base = pooled[measure, split, AR]
            low, high = paired_interval(*(np.array([some[key] for key in sorted(base)]) for some in (clusters, base)))
            difference = {"minus": AR, "mean": share(clusters) - share(base), "low": low, "high": high}
            summary.append(cell | difference | {"n": len(base), "unit": "facts"})
    return {"runs": runs, "summary": summary}


def frontier(reports: dict[str, Any]) -> dict[str, Any]:
    """The share of right answers, forward passes and seconds of every policy and setting; questions are clusters."""
    runs, pooled, asked = [], {}, {}
    for path, report in reports.items():
        items, right = frontier_items(path, report)
        kinds = {name: kind for kind, name in model_names(path, report).items()}
        for point in report["frontier"]["points"]:
            key = kinds[point["model"]], point["policy"], point["setting"]
            pairs = list(zip(items, point["results"], strict=False))  # of the file the first items were asked
            cost = {name: np.mean([result[field] for _, result in pairs]) for name, field in COSTS.items()}
            own = {item["key"]: np.array(right(item, result)) for item, result in pairs}
            asked.setdefault(path, []).append((key, list(own)))
            clusters, costs = pooled.setdefault(key, ({}, []))
            costs.append(cost)
            for question, pair in own.items():
                clusters[question] = clusters.get(question, 0) + pair
            runs.append({**dict(zip(CELL, key, strict=True)), "report": path, **counts(own), **as_floats(cost)})
        if asked[path] != next(iter(asked.values())):
            raise ValueError(f"{path} has another frontier than {next(iter(asked))}: other questions or settings")
    summary = []
    for key, (clusters, costs) in pooled.items():
        cell = {"value": "right answers", **dict(zip(CELL, key, strict=True))}
        mean = as_floats({name: np.mean([cost[name] for cost in costs]) for name in COSTS})
        summary.append(cell | mean | {"mean": share(clusters), **interval(clusters)})
        summary[-1] |= {"n": len(clusters), "unit": "questions"}
    return {"runs": runs, "summary": summary}


def frontier_items(path: str, report: Any) -> tuple[list[Any], Callable[[Any, Any], tuple[float, float]]]:
    """The questions that the frontier begins with, and (question, answer) -> (right, 1)."""
    if not report["frontier"]:
        raise ValueError(f"{path} has no frontier; make it without --frontier-questions 0")
    source = report["frontier"]["source"]
    section = next(section for section in report["sources"] if section["name"] == source)
    if not quality_of(section["format"]).share:
        raise ValueError(f"{path}: its frontier is of {source}, which has no right and wrong answers")
    return section["items"], quality_of(section["format"]).of


def as_floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def read_reports(paths: str) -> dict[str, Any]:
    """path -> content of each of the comma-separated reports. ValueError: one is given twice, or is no report."""
    names = [name.strip() for name in paths.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"--reports {paths}: one is given twice")
    return {name: read_report(Path(name)) for name in names}


def origin(reports: dict[str, Any]) -> list[Record]:
    """Where the numbers come from, for the result's file."""
    known = "command", "models", "tokenizer", "commit", "torch", "device", "processor"
    told = {path: {name: report[name] for name in known} for path, report in reports.items()}
    return [{"path": path, "sha256": sha256_of(Path(path)), **facts} for path, facts in told.items()]


def model_names(path: str, report: Any) -> dict[str, str]:
    """kind -> name of the first model of each kind in a report."""
    first = {}
    for model in report["models"]:
        first.setdefault(model["kind"], model["name"])
    if set(first) != {AR, DIFFUSION}:
        raise ValueError(f"{path} has {' and '.join(first)} models only; both kinds are compared")
    return first


def sections(path: str, report: Any, form: str) -> list[Any]:
    found = [section for section in report["sources"] if section["format"] == form]
    if not found:
        raise ValueError(f"{path} has no file of {form}; make it on the bundled questions, without --eval-data")
    return found


def clusters_of(found: Sequence[Any], report: Any, name: str, split: str) -> Clusters:
    """fact -> right answers and answers of a model on one split."""
    fact = fact_of(report)
    clusters: Clusters = {}
    for section in found:
        right = quality_of(section["format"]).of
        for item, result in zip(section["items"], section["results"][name], strict=True):
            if item.get("split") == split and item.get("kind") == REVERSED_KIND:
                key = item["lang"], fact(item)
                clusters[key] = clusters.get(key, 0) + np.array(right(item, result))
    return clusters


def fact_of(report: Any) -> Callable[[Any], str]:
    """item -> what tells its fact: the answer wanted, which a question with choices has in the file of questions."""

    def wanted() -> Iterator[tuple[str, str]]:
        for section in report["sources"]:
            yield from ((item["question"], item["wanted"]) for item in section["items"] if "wanted" in item)

    known = dict(wanted())
    return lambda item: known.get(item["question"], item["question"])


def counts(clusters: Clusters) -> Record:
    right, asked = sum(clusters.values())
    return {"right": int(right), "asked": int(asked)}


def share(clusters: Clusters) -> float:
    right, asked = sum(clusters.values())
    return float(right / asked)


def interval(clusters: Clusters) -> Record:
    """95 % by drawing clusters anew; where all answers are right, or none, Wilson's of so many clusters."""
    pairs = np.array([clusters[key] for key in sorted(clusters)])
    if share(clusters) in (0, 1):
        low, high = wilson(share(clusters), len(pairs))
    else:
        sums = resampled_sums(pairs)
        low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5]).tolist()
    return {"low": low, "high": high}


READINGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"reversal": reversal, "frontier": frontier}
