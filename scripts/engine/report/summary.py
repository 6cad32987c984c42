"""The end of a quickstart: answers side by side, right answers, likelihoods, speed, and the files written."""

from pathlib import Path
from typing import Any

from rich.cells import cell_len

from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.report.page import read_report
from scripts.engine.report.results import Estimate, Row, rows_of
from scripts.engine.statistics import is_correct

KINDS = ("capital", "colour", "sum", "opposite", "reading", "identity")  # kinds of question, one of each per language
SPLITS = {  # of the bundled questions, and what they ask
    "seen": "questions on facts told in training, in other words",
    "unseen sums": "questions on 16 sums that were never told",
    "reversed": "questions on 24 capitals told in the other direction only",
}
SMALL_TALK = (  # a model that holds 80 tokens, and was trained on short canvases
    "--max-seq-len 80 --max-new-tokens 48 --gen-remasking factor --gen-block-size 0 --gen-temp 0 --gen-repeat-penalty 0"
)
WIDTH = 38  # columns of an answer


def summary(folder: Path, seconds: dict[str, float]) -> list[str]:
    """Lines on <folder>/report.json and the other files of a quickstart; seconds: of each stage."""
    report = read_report(folder / "report.json")
    names = {model["name"]: model["kind"] for model in report["models"]}
    lines = []
    for section in report["sources"]:
        rows = {(row.metric.name, row.group): row for row in rows_of(section, report["models"])}
        if section["format"] == "questions":
            lines += [*answers(section, names), "", *right_answers(rows, names)]
            lines += ["", *speed(rows, names)]
        elif section["format"] == "chat":  # documents are what the models before fine-tuning are for
            lines += ["", *likelihood(section, rows, names)]
    total = sum(seconds.values())
    return [*lines, "", f"{total / 60:.1f} minutes in all. Written to {folder}:", *files(folder)]


def answers(section: dict[str, Any], names: dict[str, str]) -> list[str]:
    """One question of each of KINDS, then one of each harder split, in each language, with every model's answer."""
    wanted = [("seen", kind) for kind in KINDS] + [("unseen_sums", "sum"), ("reversed", "capital")]
    lines = ["Answers, unedited, to questions that were held out (+ right, - wrong):"]
    for lang in dict.fromkeys(item["lang"] for item in section["items"]):
        places: dict[tuple[str, str], int] = {}
        for place, item in enumerate(section["items"]):
            if item["lang"] == lang:
                places.setdefault((item["split"], item["kind"]), place)
        lines += ["", in_columns(["question", *names.values()])]
        for place in (places[pair] for pair in wanted if pair in places):
            item, cells = section["items"][place], []
            for name in names:
                text = section["results"][name][place]["text"]
                cells.append(("+ " if is_correct(text, item["wanted"], item["question"]) else "- ") + on_screen(text))
            lines.append(in_columns([on_screen(item["question"]), *cells]))
    return lines


def in_columns(cells: list[str]) -> str:
    return "  ".join(cell + " " * (WIDTH - cell_len(cell)) for cell in cells).rstrip()


def right_answers(rows: dict[tuple[str, str], Row], names: dict[str, str]) -> list[str]:
    """Share of right answers for each split, with intervals, and the difference of the two models."""
    lines = ["Right answers (95 % intervals):"]
    for split, description in SPLITS.items():
        row = rows.get(("exact match", split))
        if row is None:
            continue
        shares = [f"{kind} {percent(row.values[name])}" for name, kind in names.items()]
        shares += [f"difference {percent(difference, sign='+')}" for difference in row.differences.values()]
        lines += [f"  {row.count} {description}", f"    {'   '.join(shares)}"]
    return lines


def percent(share: Estimate, sign: str = "") -> str:
    value = f"{100 * share.value:{sign}.1f} %"
    return value if share.low is None else f"{value} [{100 * share.low:{sign}.1f}, {100 * share.high:{sign}.1f}]"


def speed(rows: dict[tuple[str, str], Row], names: dict[str, str]) -> list[str]:
    """Cost per answer; the answers of a batch share its time."""
    tokens, passes, seconds = (rows[metric, "all"].values for metric in ("tokens", "forward passes", "seconds"))
    return [
        "Speed, questions in batches:",
        *(
            f"  {kind}: {tokens[name].value / seconds[name].value:.0f} tokens/s, "
            f"{tokens[name].value / passes[name].value:.2f} tokens per forward pass"
            for name, kind in names.items()
        ),
    ]


def likelihood(section: dict[str, Any], rows: dict[tuple[str, str], Row], names: dict[str, str]) -> list[str]:
    nats, bits = rows["nats per token", "all"], rows["bits per byte", "all"]
    lines = [f"Likelihood, {section['name']} ({nats.count} rows; exact for AR, an upper bound for diffusion):"]
    for name, kind in names.items():
        token, byte = (f"{mean.value:.3f} +- {mean.error:.3f}" for mean in (nats.values[name], bits.values[name]))
        lines.append(f"  {kind}: {token} nats per token, {byte} bits per byte")
    return lines


def files(folder: Path) -> list[str]:
    contents = {
        "report.md": "everything measured, with intervals and samples",
        "report.json": "the same, item by item",
        "exact_match.png": "right answers by group of questions",
        "trace.html": "both models writing a story, step by step: open it in a browser",
        "*_loss.png": "loss curves",
        "*_state_dict.pt": "the models; talk to one (/reset between questions):",
    }
    lines = []
    for pattern, content in contents.items():
        if paths := sorted(folder.glob(pattern)):
            lines.append(f"  {', '.join(path.name for path in paths)}: {content}")
    chat = f"--checkpoint {folder / 'diffusion_sft_state_dict.pt'}"
    if (folder / "tokenizer").exists():
        chat += f" --tokenizer-dir {folder / 'tokenizer'} {SMALL_TALK}"
    return [*lines, f"    uv run python -m scripts.chat {chat}"]
