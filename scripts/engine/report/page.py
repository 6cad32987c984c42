"""report.md and its pictures, drawn from report.json alone: the same bytes every time."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

from model.likelihood import ENUMERATED
from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.files import write_bytes
from scripts.engine.report.couplets import DIRECTIONS, reversals_of
from scripts.engine.report.figures import draw_frontier, draw_likelihood, draw_quality
from scripts.engine.report.measure import ANSWERED, FORMS, Section
from scripts.engine.report.results import (
    DIFFUSION,
    DISTINCT,
    METRICS,
    Estimate,
    Metric,
    Point,
    Row,
    columns_of,
    is_bound,
    pairs_of,
    points_of,
    quality_of,
    rows_of,
)
from scripts.engine.report.sampling import CACHES, cap_of, sampler_of, sampling_of
from scripts.engine.report.schema import FACTS, check_schema
from scripts.engine.statistics import RESAMPLES

Report = dict[str, Any]
SAMPLES = 3  # answers shown of each split of the bundled questions
PICTURES = {
    "exact_match.png": "right answers",
    "likelihood.png": "likelihood",
    "frontier.png": "quality against cost",
}
FORMAT = 2  # of report.json
ENOUGH = 20  # rows; the bootstrap of fewer is too sure of itself


def read_report(path: Path) -> Report:
    """ValueError if the file is no report.json of this version, or not a whole one."""
    remedy = "give a report.json that this command wrote"
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON, or was cut; {remedy}") from None
    if not isinstance(report, dict) or report.get("report_format") != FORMAT:
        raise ValueError(f"{path} is no report of this version; {remedy}")
    try:
        check_schema(report)
    except ValueError as error:
        raise ValueError(f"{path} is not as it was written: {error}; {remedy}") from None
    return report


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def draw(report: Report, folder: Path, show: int | None) -> list[Path]:
    """Write report.md and the pictures; show: answers shown of each split (None: SAMPLES, of bundled questions)."""
    rows = {section["name"]: rows_of(section, report["models"]) for section in report["sources"]}
    frontier = points_of(report)
    pictures = {
        "exact_match.png": draw_quality(report, rows),
        "likelihood.png": draw_likelihood(report, rows),
        "frontier.png": draw_frontier(report, frontier),
    }
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    lines = [*_head(report), *_pictures(pictures)]
    for section in report["sources"]:
        lines += _section(report, section, rows[section["name"]], show)
    lines += _frontier(report, frontier) + _glossary(report)
    written = {"report.md": ("\n".join(lines) + "\n").encode(), **pictures}
    for name in PICTURES.keys() - pictures.keys():  # of an earlier report
        (folder / name).unlink(missing_ok=True)
    for name, content in written.items():
        write_bytes(folder / name, content)
    return [folder / name for name in written]


def _head(report: Report) -> list[str]:
    settings = report["settings"]
    lines = ["# Autoregressive and diffusion models on the same rows", ""]
    lines += ["| model | attention | checkpoint | trained by | asked | SHA-256 |", "|" + " --- |" * 6]
    for model in report["models"]:
        asked = "in the chat template" if model["chat_wrap"] else "as plain text"
        cells = (
            model["name"],
            _attention(model),
            f"`{model['checkpoint']}`",
            model["stage"],
            asked,
            f"`{model['sha256'][:12]}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | |", "| --- | --- |", f"| command | `{report['command']}` |"]
    lines += [f"| {name} | {report[name]} |" for name in FACTS]
    lines += [
        f"| seed | {settings['seed']} |",
        f"| rows | the same for all models, within {settings['max_seq_len']} tokens |",
    ]
    kinds = {model["kind"] for model in report["models"]}
    if DIFFUSION in kinds:
        lines.append(f"| diffusion likelihoods | {_masks(report)} |")
    if any(section["format"] in ANSWERED for section in report["sources"]):
        lines += _samplings(report)
    return [
        *lines,
        "",
        "Likelihoods are exact for an autoregressive (AR) model (chain rule). For a diffusion model they are an "
        "upper bound of its nats (LLaDA Eq. 6; in blocks, LLaDA 2.0 Eq. 1), marked <=, so that the model itself may be "
        "better than shown; where a bound is subtracted, so is its looseness. Shares have Wilson intervals, all else "
        "standard errors (+-), over rows; differences have intervals of a paired bootstrap over rows, "
        f"{RESAMPLES:,} resamples, and none where all resamples are equal, as those of answers that are all wrong. "
        f"Intervals are of 95 %. A difference is **bold** where its interval holds no 0, and rests on {ENOUGH} rows or "
        "more; of those that are nothing, one in twenty is bold by chance.",
        "",
    ]


def _samplings(report: Report) -> list[str]:
    """How answers were sampled: by kind, or by model where those of a kind differ."""
    found: dict[str, dict[str, str]] = {}
    for model in report["models"]:
        found.setdefault(model["kind"], {})[model["name"]] = sampling_of(report, model)
    some = [{kind: texts.popitem()[1]} if len(set(texts.values())) == 1 else texts for kind, texts in found.items()]
    return [f"| {name} answers | {text} |" for texts in some for name, text in texts.items()]


def _attention(model: dict[str, Any]) -> str:
    """Who sees whom."""
    return f"blocks of {model['block_size']}" if model["block_size"] else model["attention"]


def _masks(report: Report) -> str:
    """How many masks the diffusion models' likelihoods rest on."""
    sizes = [model["block_size"] for model in report["models"] if model["kind"] == DIFFUSION]
    small = [0 < size <= ENUMERATED for size in sizes]
    parts = [] if all(small) else [f"{report['settings']['num_samples']} masks drawn per row"]
    return "; ".join([*parts, f"all masks of blocks of up to {ENUMERATED} tokens"] if any(small) else parts)


def _pictures(pictures: dict[str, bytes]) -> list[str]:
    return [f"![{PICTURES[name]}]({name})" for name in pictures] + [""]


def _section(report: Report, section: Section, rows: list[Row], show: int | None) -> list[str]:
    split = ", of which those that training held out" if section["split"] == "validation" else ""
    left = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in section["left_out"].items() if count)
    lines = [
        f"## {section['name']}",
        "",
        f"`{section['path']}`{split} (SHA-256 `{section['sha256'][:12]}`): {len(section['items']):,} rows, "
        f"{FORMS[section['format']].told}." + (f" Left out: {left}." if left else "") + _chance(section),
        "",
        *_table(report, [row for row in rows if not row.metric.cost]),
        *_reversals(report, section),
    ]
    if section["format"] in ANSWERED:
        lines += ["Endings, repetition and cost:", "", *_table(report, [row for row in rows if row.metric.cost])]
        count = show if show is not None else SAMPLES if section["bundled"] else 0
        lines += _samples(report, section, count) if count else []
    return lines


def _chance(section: Section) -> str:
    if section["format"] != "choices":
        return ""
    return f" Chance: {fmean(1 / len(item['choices']) for item in section['items']):.3f}."


def _table(report: Report, rows: list[Row]) -> list[str]:
    names, pairs = [model["name"] for model in report["models"]], pairs_of(report["models"])
    bounds = {model["name"]: is_bound(model) for model in report["models"]}
    header = ["metric", "rows of", "number", *names, *(f"{first} - {second}" for first, second in pairs)]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        cells = [row.metric.name, row.group, f"{row.count:,}"]
        cells += [_value(row.metric, row.values[name], bounds[name]) for name in names]
        cells += [_difference(row.metric, row.differences.get(second), row.count) for _, second in pairs]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _reversals(report: Report, section: Section) -> list[str]:
    """Each model's answers in one direction against those in the other."""
    rows = reversals_of(section, report["models"])
    if not rows:
        return []
    bounds = {model["name"]: is_bound(model) for model in report["models"]}
    header = ["metric", "model", "couplets", *DIRECTIONS, " - ".join(DIRECTIONS)]
    lines = ["Forward against backward, paired by couplet, the couplets being drawn again:", ""]
    lines += [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        ways = (_value(row.metric, Estimate(value), bounds[row.model]) for value in (row.forward, row.backward))
        cells = [row.metric.name, row.model, f"{row.count:,}", *ways]
        lines.append(f"| {' | '.join([*cells, _difference(row.metric, row.difference, row.count)])} |")
    return [*lines, ""]


def _value(metric: Metric, found: Estimate, bound: bool = False) -> str:
    if found.value is None:
        return "-"
    sign, digits = "<= " if metric.bound and bound else "", metric.digits
    if found.low is not None:
        return f"{sign}{found.value:z.{digits}f} [{found.low:z.{digits}f}, {found.high:z.{digits}f}]"
    return f"{sign}{found.value:z.{digits}f}" + ("" if found.error is None else f" +- {found.error:z.{digits}f}")


def _difference(metric: Metric, found: Estimate | None, count: int) -> str:
    if found is None:
        return "-"
    text = f"{found.value:+z.{metric.digits}f}"
    if found.low is None:
        return text
    text += f" [{found.low:+z.{metric.digits}f}, {found.high:+z.{metric.digits}f}]"
    return f"**{text}**" if count >= ENOUGH and (found.low > 0 or found.high < 0) else text


def _samples(report: Report, section: Section, count: int) -> list[str]:
    """The first answers of each split and language, unedited."""
    names, chosen = [model["name"] for model in report["models"]], {}
    for place, item in enumerate(section["items"]):
        group = tuple(item.get(label, "") for label in ("split", "direction", "lang"))
        chosen.setdefault(group, []).append(place)
    lines = ['Answers, unedited (" / " is a line break; in bold the right ones):', ""]
    lines += [f"| question | expected | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 2)]
    metric = quality_of(section["format"])
    right = {name: columns_of(metric, section["items"], section["results"][name])[:, 0] for name in names}
    for group in sorted(chosen):
        for place in chosen[group][:count]:
            item = section["items"][place]
            cells = [_cell(item["question"]), _cell(item.get("wanted", item["reference"]))]
            for name in names:
                result = section["results"][name][place]
                text = _cell(result["text"]) or "(nothing)"
                text += "" if result["ended"] else " [no EOS]"
                cells.append(f"**{text}**" if metric.share and right[name][place] else text)
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """A text within a table."""
    return " / ".join(on_screen(text).split("\n")).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").strip()


def _frontier(report: Report, found: tuple[Metric, list[Point]] | None) -> list[str]:
    if found is None:
        return []
    metric, points = found
    frontier, settings = report["frontier"], report["settings"]
    capped = (
        ""
        if len(points) <= 2
        else f" Policies without a schedule (threshold, factor) keep {cap_of(settings)} (`--gen-cap-start-ratio`, "
        "`--gen-cap-end-ratio`, `--gen-max-decode-per-step`)."
    )
    lines = [
        "## Quality against cost",
        "",
        f"{frontier['items']:,} rows of {frontier['source']}, {frontier['batch_size']} at a time; quality is "
        f"{metric.name}. AR has a key/value cache{_caches(report)}.{capped}",
        "",
        "| model | policy | setting | quality | first line - this | forward passes | seconds/answer | tokens/s |",
        "|" + " --- |" * 8,
    ]
    for point in points:
        cells = [point.model, point.policy, point.setting, _value(metric, point.quality)]
        cells += [
            _difference(metric, point.difference, frontier["items"]),
            f"{point.passes.value:.1f} +- {point.passes.error or 0:.1f}",
        ]
        cells += [f"{point.seconds.value:.4f} +- {point.seconds.error or 0:.4f}", f"{point.tokens_per_second:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _caches(report: Report) -> str:
    """What the diffusion models of the frontier keep between their steps."""
    shown = {point["model"] for point in report["frontier"]["points"]}
    models = [model for model in report["models"] if model["kind"] == DIFFUSION and model["name"] in shown]
    found = {_attention(model): CACHES[sampler_of(report, model).gen_cache] for model in models}
    return "".join(f"; diffusion ({attention}): {words}" for attention, words in found.items())


def _glossary(report: Report) -> list[str]:
    """A line for each metric that the report shows."""
    forms = dict.fromkeys(section["format"] for section in report["sources"])
    told = {metric.name: metric.told for form in forms for metric in METRICS[form]}
    told |= {metric.name: metric.told for metric in DISTINCT} if set(forms) & set(ANSWERED) else {}
    return ["## Metrics", "", *(f"- {name}: {text}" for name, text in told.items())]
