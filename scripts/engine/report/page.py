"""report.md and its figures, drawn from report.json alone: the same bytes every time."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from model.config import ModelConfig
from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from model.likelihood import ENUMERATED
from scripts.engine.decoding.samplers import ADAPTIVE
from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.files import write_bytes
from scripts.engine.flags import in_effect
from scripts.engine.report.figures import draw_frontier, draw_likelihood, draw_quality, png
from scripts.engine.report.frontier import number_of_steps
from scripts.engine.report.measure import ANSWERED, FORMS, Section
from scripts.engine.report.metrics import Metric, columns_of, quality_of
from scripts.engine.report.results import (
    DIFFUSION,
    DIRECTIONS,
    Estimate,
    Point,
    Report,
    Row,
    is_bound,
    pairs_of,
    points_of,
    reversals_of,
    rows_of,
)
from scripts.engine.statistics import RESAMPLES

FORMAT = 4  # of report.json
FACTS = ("commit", "device", "processor", "python", "torch", "transformers", "tokenizer")
NEEDED = {"command", "settings", "models", "sources", "frontier", *FACTS}
SAMPLES = 3  # answers shown of each split of the bundled questions
PICTURES = {
    "exact_match.png": "right answers",
    "likelihood.png": "likelihood",
    "frontier.png": "quality against cost",
}
ENOUGH = 20  # rows of a bold difference; the bootstrap of fewer gives too narrow intervals
ENDS = {"free": "like any token", "confidence": "after all other tokens of its block", "never": "never"}
CACHES = {
    "none": "nothing is kept from one forward pass to the next",
    "block": "keys and values of finished blocks are kept, which is exact",
    "prefix": "keys and values before a block are kept as they were in its first step, an approximation",
    "dual": "keys and values around a block are kept as they were in its first step, an approximation",
}


def read_report(path: Path) -> Report:
    """Raise ValueError if the file is not a report.json of this version, or was cut."""
    remedy = "give a report.json that scripts.eval.report wrote"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("report_format") != FORMAT or not report.keys() >= NEEDED:
        raise ValueError(f"{path} is not a report of this version (format {FORMAT}); {remedy}")
    return report


def draw(report: Report, folder: Path, show: int | None) -> list[Path]:
    """Write report.md and the figures; show: answers shown of each split (None: SAMPLES, of bundled questions)."""
    rows = {section["name"]: rows_of(section, report["models"]) for section in report["sources"]}
    points = points_of(report)
    figures = {
        "exact_match.png": draw_quality(report, rows),
        "likelihood.png": draw_likelihood(report, rows),
        "frontier.png": draw_frontier(report, points),
    }
    pictures = {name: png(figure) for name, figure in figures.items() if figure is not None}
    lines = [*_head(report), *(f"![{PICTURES[name]}]({name})" for name in pictures), ""]
    for section in report["sources"]:
        lines += _section(report, section, rows[section["name"]], show)
    lines += _frontier(report, *points) if points else []
    lines += _glossary(row.metric for section in report["sources"] for row in rows[section["name"]])
    contents = {"report.md": ("\n".join(lines) + "\n").encode(), **pictures}
    for name in PICTURES.keys() - pictures.keys():  # of an earlier report
        (folder / name).unlink(missing_ok=True)
    for name, content in contents.items():
        write_bytes(folder / name, content)
    return [folder / name for name in contents]


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(header), f"|{' --- |' * len(header)}", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(metric: Metric, estimate: Estimate, bound: bool = False) -> str:
    """The value with its interval or standard error; bound: of a model whose likelihoods are bounds."""
    if estimate.value is None:
        return "-"
    text = f"{'<= ' if metric.bound and bound else ''}{estimate.value:z.{metric.digits}f}"
    if estimate.low is not None:
        return f"{text} [{estimate.low:z.{metric.digits}f}, {estimate.high:z.{metric.digits}f}]"
    return text if estimate.error is None else f"{text} +- {estimate.error:z.{metric.digits}f}"


def _difference(metric: Metric, estimate: Estimate | None, count: int) -> str:
    """Write a difference with its interval; bold if that excludes 0 and rests on enough rows."""
    if estimate is None:
        return "-"
    value, low, high = estimate.value, estimate.low, estimate.high
    text = f"{value:+z.{metric.digits}f}"
    if low is None:
        return text
    text += f" [{low:+z.{metric.digits}f}, {high:+z.{metric.digits}f}]"
    return f"**{text}**" if count >= ENOUGH and (low > 0 or high < 0) else text


# -- head --------------------------------------------------------------------------------------------------------------


def _head(report: Report) -> list[str]:
    settings = report["settings"]
    models = [
        (
            model["name"],
            _attention(model),
            f"`{model['checkpoint']}`",
            model["stage"],
            "in the chat template" if model["chat_wrap"] else "as plain text",
            f"`{model['sha256'][:12]}`",
        )
        for model in report["models"]
    ]
    facts = {"command": f"`{report['command']}`", **{name: report[name] for name in FACTS}, "seed": settings["seed"]}
    facts["rows"] = f"the same for all models, within {settings['max_seq_len']} tokens"
    if DIFFUSION in {model["kind"] for model in report["models"]}:
        facts["diffusion likelihoods"] = _masks(report)
    told = {name for section in report["sources"] for name in section.get("documents_ends_given", ())}
    if told:
        facts["ends of documents"] = f"given to {', '.join(sorted(told))}, so that its bound there is too low"
    if any(section["format"] in ANSWERED for section in report["sources"]):
        facts |= _samplings(report)
    return [
        "# Autoregressive and diffusion models on the same rows",
        "",
        *_table(("model", "attention", "checkpoint", "trained by", "asked", "SHA-256"), models),
        "",
        "| | |",
        "| --- | --- |",
        *(_line((name, f"{fact}")) for name, fact in facts.items()),
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


def _attention(model: dict[str, Any]) -> str:
    return f"blocks of {model['block_size']}" if model["block_size"] else model["attention"]


def _masks(report: Report) -> str:
    """The masks that the diffusion models' likelihoods average over."""
    sizes = [model["block_size"] for model in report["models"] if model["kind"] == DIFFUSION]
    enumerated = [0 < size <= ENUMERATED for size in sizes]
    parts = [] if all(enumerated) else [f"{report['settings']['num_samples']} masks drawn per row"]
    parts += [f"all masks of blocks of up to {ENUMERATED} tokens"] if any(enumerated) else []
    return "; ".join(parts)


def _samplings(report: Report) -> dict[str, str]:
    """Describe how answers were sampled: by kind, or by model if those of a kind differ."""
    kinds: dict[str, dict[str, str]] = {}
    for model in report["models"]:
        kinds.setdefault(model["kind"], {})[model["name"]] = sampling_of(report, model)
    words = {}
    for kind, texts in kinds.items():
        shared = len(set(texts.values())) == 1
        named = {kind: next(iter(texts.values()))} if shared else texts
        words |= {f"{name} answers": text for name, text in named.items()}
    return words


def sampling_of(report: Report, model: dict[str, Any]) -> str:
    """Describe how the answers of a model were drawn."""
    length, config = _config(report, ContinuationConfig).max_new_tokens, _sampler(report, model)
    if isinstance(config, SamplingConfig):
        return "; ".join(["one token after the other", *_draw(config), f"at most {length} new tokens"])
    policy, block = config.gen_remasking, config.gen_block_size or length
    settings = in_effect(config)
    bounds = [
        settings[name] for name in ("gen_confidence_threshold", "gen_factor", "gen_entropy_bound") if name in settings
    ]
    grid = " (and those that complete its last block)" if model["block_size"] else ""
    parts = [
        " ".join([f"policy {policy}", *(f"{value:g}" for value in bounds)]),
        _cap(config, min(block, length)) if "gen_cap_end_ratio" in settings else "",
        number_of_steps(policy, config.gen_steps) if policy not in ADAPTIVE else "",
        "one block" if block >= length and not grid else f"blocks of {block} tokens from left to right",
        f"canvas of {length} masked tokens{grid}, as many as may be written",
        *_draw(config),
        f"EOS kept {ENDS[config.gen_eos]}",
        CACHES[config.gen_cache],
    ]
    parts += [f"classifier-free guidance {config.gen_cfg_scale:g}"] if config.gen_cfg_scale else []
    return "; ".join(filter(None, parts))


def _sampler(report: Report, model: dict[str, Any]) -> SamplingConfig | DenoisingConfig:
    """The settings that a model of the report answered with."""
    decoding = ModelConfig(attention=model["attention"], block_size=model["block_size"])
    if decoding.autoregressive:
        return _config(report, SamplingConfig)
    return _config(report, DenoisingConfig).fitted(decoding)


def _config(report: Report, kind: type) -> Any:
    return kind(**{field.name: report["settings"][field.name] for field in fields(kind)})


def _cap(config: DenoisingConfig, block: float) -> str:
    """Describe the most that a step of a policy without a schedule keeps of a block, if it is ever less than all."""
    first, last, number = config.gen_cap_start_ratio, config.gen_cap_end_ratio, config.gen_max_decode_per_step
    share = f"{first:g} of a block's masked tokens"
    if first != last:
        share += f", {last:g} after the block's part of {number_of_steps('', config.gen_steps)}"
    bounds = [share] if min(first, last) < 1 else []
    bounds += [f"{number} tokens"] if number and number < block else []
    return f"a step keeps at most {', and '.join(bounds)}" if bounds else ""


def _draw(config: SamplingConfig | DenoisingConfig) -> list[str]:
    """Describe how a token is drawn from its distribution."""
    draw = config.draw
    words = f"temperature {draw.temperature:g}" if draw.temperature else "the likeliest token (temperature 0)"
    if draw.temperature:
        words += f", top-k {draw.top_k}" if draw.top_k else ""
        words += f", top-p {draw.top_p:g}" if draw.top_p < 1 else ""
    if not draw.repeat_penalty:
        return [words, "no repetition penalty"]
    return [words, f"repetition penalty {draw.repeat_penalty:g} within {draw.repeat_window} tokens"]


# -- a file ------------------------------------------------------------------------------------------------------------


def _section(report: Report, section: Section, rows: list[Row], show: int | None) -> list[str]:
    split = ", of which those that training held out" if section["split"] == "validation" else ""
    left = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in section["left_out"].items() if count)
    chance = ""
    if section["format"] == "choices":
        chance = f" Chance: {fmean(1 / len(item['choices']) for item in section['items']):.3f}."
    lines = [
        f"## {section['name']}",
        "",
        f"`{section['path']}`{split} (SHA-256 `{section['sha256'][:12]}`): {len(section['items']):,} rows, "
        f"{FORMS[section['format']].description}." + (f" Left out: {left}." if left else "") + chance,
        "",
        *_metrics(report, [row for row in rows if not row.metric.cost]),
        *_reversals(report, section),
    ]
    if section["format"] in ANSWERED:
        costs = [row for row in rows if row.metric.cost]
        lines += ["Endings, repetition and cost:", "", *_metrics(report, costs)]
        count = show if show is not None else SAMPLES if section["bundled"] else 0
        lines += _samples(report, section, count) if count else []
    return lines


def _metrics(report: Report, rows: list[Row]) -> list[str]:
    """Every model's values, and the differences."""
    bounds = {model["name"]: is_bound(model) for model in report["models"]}
    pairs = pairs_of(report["models"])
    lines = []
    for row in rows:
        values = [_value(row.metric, row.values[name], bound) for name, bound in bounds.items()]
        gaps = [_difference(row.metric, row.differences.get(second), row.count) for _, second in pairs]
        lines.append([row.metric.name, row.group, f"{row.count:,}", *values, *gaps])
    header = ["metric", "rows of", "number", *bounds, *(f"{first} - {second}" for first, second in pairs)]
    return [*_table(header, lines), ""]


def _reversals(report: Report, section: Section) -> list[str]:
    """Each model's answers in one direction against those in the other."""
    rows = reversals_of(section, report["models"])
    if not rows:
        return []
    bounds = {model["name"]: is_bound(model) for model in report["models"]}
    lines = []
    for row in rows:
        values = [_value(row.metric, Estimate(value), bounds[row.model]) for value in (row.forward, row.backward)]
        gap = _difference(row.metric, row.difference, row.count)
        lines.append([row.metric.name, row.model, f"{row.count:,}", *values, gap])
    header = ["metric", "model", "couplets", *DIRECTIONS, " - ".join(DIRECTIONS)]
    caption = "Forward against backward, paired by couplet, the couplets being drawn again:"
    return [caption, "", *_table(header, lines), ""]


def _samples(report: Report, section: Section, count: int) -> list[str]:
    """The first answers of each split and language, unedited."""
    names, groups = [model["name"] for model in report["models"]], {}
    for place, item in enumerate(section["items"]):
        groups.setdefault(tuple(item.get(label, "") for label in ("split", "direction", "lang")), []).append(place)
    metric, results = quality_of(section["format"]), section["results"]
    right = {name: columns_of(metric, section["items"], results[name])[:, 0] for name in names}
    lines = []
    for place in (place for group in sorted(groups) for place in groups[group][:count]):
        item = section["items"][place]
        cells = [_cell(item["question"]), _cell(item.get("wanted", item["reference"]))]
        for name in names:
            text = _cell(results[name][place]["text"]) or "(nothing)"
            text += "" if results[name][place]["ended"] else " [no EOS]"
            cells.append(f"**{text}**" if metric.share and right[name][place] else text)
        lines.append(cells)
    caption = 'Answers, unedited (" / " is a line break; in bold the right ones):'
    return [caption, "", *_table(["question", "expected", *names], lines), ""]


def _cell(text: str) -> str:
    """A text within a table."""
    return " / ".join(on_screen(text).split("\n")).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").strip()


# -- frontier and glossary ---------------------------------------------------------------------------------------------


def _frontier(report: Report, metric: Metric, points: list[Point]) -> list[str]:
    frontier = report["frontier"]
    cap = _cap(_config(report, DenoisingConfig), math.inf)
    capped = f" Of threshold and factor {cap}." if cap else ""
    lines = [
        (
            *(point.model, point.policy, point.setting, _value(metric, point.quality)),
            _difference(metric, point.difference, frontier["items"]),
            f"{point.passes.value:.1f} +- {point.passes.error or 0:.1f}",
            f"{point.seconds.value:.4f} +- {point.seconds.error or 0:.4f}",
            f"{point.tokens_per_second:.0f}",
        )
        for point in points
    ]
    header = ["model", "policy", "setting", "quality", "first line - this"]
    header += ["forward passes", "seconds/answer", "tokens/s"]
    return [
        "## Quality against cost",
        "",
        f"{frontier['items']:,} rows of {frontier['source']}, {frontier['batch_size']} at a time; quality is "
        f"{metric.name}. AR has a key/value cache{_caches(report)}.{capped if len(points) > 2 else ''}",
        "",
        *_table(header, lines),
        "",
    ]


def _caches(report: Report) -> str:
    """Name the caches of the frontier's diffusion models."""
    shown = {point["model"] for point in report["frontier"]["points"]}
    models = [model for model in report["models"] if model["kind"] == DIFFUSION and model["name"] in shown]
    kept = {_attention(model): CACHES[_sampler(report, model).gen_cache] for model in models}
    return "".join(f"; diffusion ({attention}): {words}" for attention, words in kept.items())


def _glossary(metrics: Iterable[Metric]) -> list[str]:
    """A line for each metric that the report shows."""
    descriptions = {metric.name: metric.description for metric in metrics}
    return ["## Metrics", "", *(f"- {name}: {description}" for name, description in descriptions.items())]
