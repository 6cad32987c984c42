"""The end of a quickstart: answers side by side, right answers, likelihoods, speed, and the files written."""

from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.report.figures import way_of_writing
from scripts.engine.report.page import read_report
from scripts.engine.report.results import (
    DIFFUSION,
    Estimate,
    Models,
    Report,
    Row,
    is_bound,
    points_of,
    rows_of,
    titles_of,
)
from scripts.engine.statistics import is_correct

KINDS = ("capital", "colour", "sum", "opposite", "reading", "identity")  # kinds of question, one of each per language
SPLITS = {  # of the bundled questions: the head of their column
    "seen": "told facts",
    "unseen sums": "sums never told",
    "reversed": "told the other way",
}
LEGEND = (
    "(facts are asked for in other words than those of training, which never tells 16 of the sums, and of 24 capitals\n"
    'says only "Brussels is the capital of Belgium": they are asked for by country)'
)
SMALL_TALK = (  # a model that holds 80 tokens, and was trained on short canvases
    "--max-seq-len 80 --max-new-tokens 48 --gen-remasking threshold --gen-temp 0 --gen-repeat-penalty 0"
)
COMPARED = "joint, as AR", "full attention", DIFFUSION  # with the first model
WIDTH, TITLES, SHARES = 38, 22, 24  # columns of an answer, of the title of a model, of a share


def summary(folder: Path, seconds: dict[str, float]) -> list[str]:
    """Lines on <folder>/report.json and the other files of a quickstart; seconds: of each stage."""
    report = read_report(folder / "report.json")
    titles, bounds = titles_of(report["models"]), {model["name"]: is_bound(model) for model in report["models"]}
    lines = []
    for section in report["sources"]:
        rows = {(row.metric.name, row.group): row for row in rows_of(section, report["models"])}
        if section["format"] == "questions":
            lines += [*answers(section, one_of_each_file(report["models"])), "", *right_answers(rows, titles)]
        elif section["format"] == "chat":  # documents are what the models before fine-tuning are for
            lines += ["", *likelihood(section, rows, titles, bounds)]
    lines += ["", *speed(report, titles)] if report["frontier"] else []
    total = sum(seconds.values())
    return [*lines, "", f"{total / 60:.1f} minutes in all. Written to {folder}:", *files(folder)]


def one_of_each_file(models: Models) -> dict[str, str]:
    """name -> title of the first use of each checkpoint: joint weights have two, whose answers are much alike."""
    files: dict[str, str] = {}
    for model in models:
        files.setdefault(model["sha256"], model["name"])
    return {name: title for name, title in titles_of(models).items() if name in files.values()}


def answers(section: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """One question of each of KINDS, then one of each harder split, in each language, with the answers of models."""
    wanted = [("seen", kind) for kind in KINDS] + [("unseen_sums", "sum"), ("reversed", "capital")]
    lines = ["Answers, unedited, to questions that were held out (+ right, - wrong):"]
    for lang in dict.fromkeys(item["lang"] for item in section["items"]):
        places: dict[tuple[str, str], int] = {}
        for place, item in enumerate(section["items"]):
            if item["lang"] == lang:
                places.setdefault((item["split"], item["kind"]), place)
        lines += ["", f"  {in_columns(titles.values())}"]
        for place in (places[pair] for pair in wanted if pair in places):
            item, cells = section["items"][place], []
            for name in titles:
                text = section["results"][name][place]["text"]
                cells.append(("+ " if is_correct(text, item["wanted"], item["question"]) else "- ") + on_screen(text))
            lines += [on_screen(item["question"]), f"  {in_columns(cells)}"]
    return lines


def in_columns(cells: Iterable[str], first: int = 0, width: int = WIDTH) -> str:
    """The cells, each padded to the width, the first one to `first` columns if that is not 0."""
    widths = chain([first or width], repeat(width))
    return "  ".join(cell + " " * (size - cell_len(cell)) for cell, size in zip(cells, widths, strict=False)).rstrip()


def right_answers(rows: dict[tuple[str, str], Row], titles: dict[str, str]) -> list[str]:
    """A line for each way of writing: the share of right answers in each split, with its interval; and two for what AR
    has more of them than another: joint weights in its own way of writing, and diffusion alone."""
    shown = [(row, head) for split, head in SPLITS.items() if (row := rows.get(("exact match", split)))]

    def line(title: str, estimates: Iterable[Estimate], sign: str = "") -> str:
        return in_columns([f"  {title}", *(percent(share, sign) for share in estimates)], TITLES, SHARES)

    lines = [in_columns(["Right answers, 95 %", *(f"{head} ({row.count})" for row, head in shown)], TITLES, SHARES)]
    lines += [line(title, (row.values[name] for row, _ in shown)) for name, title in titles.items()]
    first = next(iter(titles.values()))
    for name, title in titles.items():
        if title in COMPARED:
            lines.append(line(f"{first} - {title}", (row.differences[name] for row, _ in shown), sign="+"))
    return [*lines, LEGEND]


def percent(share: Estimate, sign: str = "") -> str:
    value = f"{100 * share.value:{sign}.1f} %"
    return value if share.low is None else f"{value} [{100 * share.low:{sign}.1f}, {100 * share.high:{sign}.1f}]"


def speed(report: Report, titles: dict[str, str]) -> list[str]:
    """A line for each way of writing on the frontier, as it is set in the rest of the report."""
    points = points_of(report)[1]
    frontier, threshold = report["frontier"], f"{report['settings']['gen_confidence_threshold']:g}"
    lines = [f"Speed, {frontier['items']} of the questions, {frontier['batch_size']} at a time:"]
    for point in points:
        if point.policy == "threshold" and point.setting != threshold:
            continue
        way, rate = way_of_writing(titles[point.model], point.policy), point.tokens_per_second
        way += f" {threshold}" if point.policy == "threshold" else ""
        cells = [f"  {way}", f"{rate:.0f} tokens/s", f"{point.passes.value:.1f} passes per answer"]
        if point is not points[0]:
            cells.append(f"{rate / points[0].tokens_per_second:.1f} times {titles[points[0].model]}")
        lines.append(in_columns(cells, 36, 22))
    return lines


def likelihood(
    section: dict[str, Any], rows: dict[tuple[str, str], Row], titles: dict[str, str], bounds: dict[str, bool]
) -> list[str]:
    nats, bits = rows["nats per token", "all"], rows["bits per byte", "all"]
    lines = [f"Likelihood, {section['name']} ({nats.count} rows; <= an upper bound, else exact):"]
    for name, title in titles.items():
        bound = "<= " if bounds[name] else ""
        token, byte = (
            f"{bound}{mean.value:.3f} +- {mean.error:.3f}" for mean in (nats.values[name], bits.values[name])
        )
        lines.append(in_columns([f"  {title}", f"{token} nats per token", f"{byte} bits per byte"], TITLES, 34))
    return lines


def files(folder: Path) -> list[str]:
    contents = {
        "report.md": "everything measured, with intervals and samples",
        "report.json": "the same, item by item",
        "exact_match.png": "right answers by group of questions",
        "frontier.png": "quality against the cost of every way of writing",
        "trace.html": "a story by AR and one by joint weights in blocks, step by step: open it in a browser",
        "*_loss.png": "loss curves",
        "*_state_dict.pt": "the models; talk to the joint one (/reset between questions):",
    }
    lines = []
    for pattern, content in contents.items():
        if paths := sorted(folder.glob(pattern)):
            lines.append(f"  {', '.join(path.name for path in paths)}: {content}")
    chat = f"--checkpoint {folder / 'joint_sft_state_dict.pt'}"
    if (folder / "tokenizer").exists():
        chat += f" --tokenizer-dir {folder / 'tokenizer'} {SMALL_TALK}"
    return [*lines, f"    uv run python -m scripts.chat {chat}"]
