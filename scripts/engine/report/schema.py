"""Whether a report.json has all that report.md and the pictures are drawn from."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.report.measure import ANSWERED, LABELS
from scripts.engine.report.sampling import sampler_of

Shape = Mapping[str, type | tuple[type, ...]]

NUMBER = (int, float)
FACTS = ("commit", "device", "processor", "python", "torch", "transformers", "tokenizer")
REPORT: Shape = {"command": str, "models": list, "settings": dict, "sources": list, "frontier": (dict, type(None))}
MODEL: Shape = dict.fromkeys(("name", "kind", "attention", "checkpoint", "sha256", "stage"), str) | {
    "block_size": int,
    "chat_wrap": bool,
}
SETTINGS: Shape = {"seed": int, "max_seq_len": int, "num_samples": int, "show": (int, type(None))}
SECTION: Shape = dict.fromkeys(("name", "path", "format", "split", "sha256"), str) | {
    "bundled": bool,
    "left_out": dict,
    "items": list,
    "results": dict,
}
ROW: Shape = {"key": str, "lang": str}
SCORED: Shape = {**ROW, "bytes": int, "tokens": int}
ASKED: Shape = {**ROW, "question": str, "reference": str, "reference_tokens": int}
ITEMS: Mapping[str, Shape] = {
    "text": SCORED,
    "chat": SCORED,
    "choices": {**ROW, "question": str, "choices": list, "answer": int},
    "open": ASKED,
    "questions": {**ASKED, "wanted": str},
    "poems": {**ASKED, "wanted": str, "direction": str},
}
NATS: Shape = {"nats": NUMBER}
ANSWER: Shape = {
    "text": str,
    "num_tokens": int,
    "ended": bool,
    "num_forward_passes": int,
    "seconds": NUMBER,
    "ids": list,
}
RESULTS: Mapping[str, Shape] = {
    **{"text": NATS, "chat": NATS, "choices": {"nats": list}},
    **dict.fromkeys(ANSWERED, ANSWER),
}
POINT: Shape = {"model": str, "policy": str, "setting": str, "results": list}


def check_schema(report: Mapping[str, Any]) -> None:
    """ValueError: what is missing or of another kind, and where."""
    _check(report, {**REPORT, **dict.fromkeys(FACTS, object)}, "it")
    _settings(report["settings"])
    _all(report["models"], MODEL, "models")
    if not report["models"]:
        raise ValueError("it holds no model")
    for model in report["models"]:
        sampler_of(report, model)
    names = [model["name"] for model in report["models"]]
    for number, section in enumerate(report["sources"]):
        _check(section, SECTION, f"sources[{number}]")
        _section(section, names)
    if report["frontier"]:
        _frontier(report["frontier"], {section["name"]: section for section in report["sources"]}, names)


def _settings(settings: Mapping[str, Any]) -> None:
    _check(settings, SETTINGS, "settings")
    for config in (ContinuationConfig, SamplingConfig, DenoisingConfig):
        kinds = get_type_hints(config)
        choices = {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}
        shape = {name: NUMBER if kind is float else get_args(kind) or kind for name, kind in kinds.items()}
        _check(settings, shape | dict.fromkeys(choices, str), "settings")
        for name, values in choices.items():
            if settings[name] not in values:
                raise ValueError(f"settings: {name!r} is {settings[name]!r}")
        config(**{name: settings[name] for name in kinds})


def _section(section: Mapping[str, Any], names: Sequence[str]) -> None:
    name, form = section["name"], section["format"]
    if form not in ITEMS:
        raise ValueError(f"{name}: format {form!r} is unknown")
    if form in ANSWERED:
        _check(section, {"batch_size": int}, name)
    _check(section["left_out"], dict.fromkeys(section["left_out"], int), f"{name}: left_out")
    _all(section["items"], ITEMS[form], f"{name}: items")
    if not section["items"]:
        raise ValueError(f"{name} has no items")
    for item in section["items"]:
        _check(item, {label: str for label in (*LABELS, "couplet") if label in item}, f"{name}: items")
    _check(section["results"], dict.fromkeys(names, list), f"{name}: results")
    for model in names:
        results = section["results"][model]
        _results(results, form, len(section["items"]), f"{name}: results of {model}")
        if form == "choices":
            for item, result in zip(section["items"], results, strict=True):
                numbers = [isinstance(nats, NUMBER) for nats in result["nats"]]
                choices = [isinstance(choice, str) for choice in item["choices"]]
                if not all(numbers + choices) or not 0 <= item["answer"] < len(choices) == len(numbers):
                    raise ValueError(f"{name}: {item['key']} has other choices than {model} has nats")
    given = ([bool(r.get("reference_likelihood")) for r in section["results"][model]] for model in names)
    if len(set(map(tuple, given))) > 1:
        raise ValueError(f"{name}: given answers are scored for some models alone")


def _frontier(frontier: Mapping[str, Any], sections: Mapping[str, Any], names: Sequence[str]) -> None:
    _check(frontier, {"source": str, "items": int, "batch_size": int, "points": list}, "frontier")
    section = sections.get(frontier["source"])
    if section is None or section["format"] not in ANSWERED or not 0 < frontier["items"] <= len(section["items"]):
        raise ValueError("its frontier is of no file that it holds")
    _all(frontier["points"], POINT, "frontier: points")
    for point in frontier["points"]:
        where = f"frontier: {point['policy']}, {point['setting']}"
        if point["model"] not in names:
            raise ValueError(f"{where}: model {point['model']!r} is not among its models")
        _results(point["results"], section["format"], frontier["items"], where)
        if not sum(result["seconds"] for result in point["results"]) > 0:
            raise ValueError(f"{where}: its answers took no time")


def _results(results: Sequence[Any], form: str, count: int, where: str) -> None:
    if len(results) != count:
        raise ValueError(f"{where}: {len(results)} rows, expected {count}")
    _all(results, RESULTS[form], where)
    for result in results:
        if not all(isinstance(token, int) for token in result.get("ids", [])):
            raise ValueError(f"{where}: 'ids' are no numbers")
        if result.get("reference_likelihood"):
            _check(result["reference_likelihood"], {"nats": NUMBER, "tokens": int}, where)


def _all(found: Sequence[Any], shape: Shape, where: str) -> None:
    for number, one in enumerate(found):
        _check(one, shape, f"{where}[{number}]")


def _check(found: Any, shape: Shape, where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no object")
    for name, kind in shape.items():
        if name not in found:
            raise ValueError(f"{where} has no {name!r}")
        if not isinstance(found[name], kind):
            raise ValueError(f"{where}: {name!r} is of another kind")
