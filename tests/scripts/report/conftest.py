"""One report of both kinds of models on a file of every format, for all tests of the report."""

import json
import shutil
from pathlib import Path

import pytest

from model.decoding.autoregressive import SamplingConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.loaded import load_for_use
from scripts.engine.report import page
from scripts.engine.report.results import rows_of, summary_of
from scripts.engine.runtime import RuntimeConfig
from scripts.eval import report
from tests.scripts.conftest import conversations, run_command, sentences, write_rows
from tests.scripts.models import ready, save

RUNTIME = RuntimeConfig(device="cpu", dtype="float32", seed=11)
SAMPLERS = {"causal": SamplingConfig(), "full": DenoisingConfig(gen_steps=4)}
AR, DM = "AR ar", "diffusion dm"
TEXTS = sentences(12, seed=3)
NEW_TOKENS, LENGTH = 6, 64


def question_rows() -> list[dict]:
    """What is asked for is a letter or a word that even a model of no training may write."""
    return [
        {"question": text.split(": ")[1][:20], "answer": "aeio猫"[i % 5], "lang": ("en", "zh")[i % 2]}
        | {"split": ("seen", "reversed")[i % 3 == 0], "kind": "ab"[i % 2]}
        for i, text in enumerate(TEXTS)
    ]


ROWS = {
    "text": [{"text": text[:40]} for text in TEXTS],
    "choices": [
        {"question": text[:12], "choices": ["the cat", "看见了", "a small dog"][: 2 + i % 2], "answer": i % 2}
        for i, text in enumerate(TEXTS)
    ],
    "poems": [
        {"prompt": line, "answer": other, "question": f"{line}?", "direction": way, "seen_in_pretrain": i % 3 == 0}
        for i, text in enumerate(TEXTS[:6])
        for line, other, way in ((text[3:9], text[9:15], "forward"), (text[9:15], text[3:9], "backward"))
    ],
    "open": [{"question": text[3:15], "reference": text[3:60]} for text in TEXTS],
    "questions": question_rows(),
    "chat": conversations(TEXTS),
}


def report_in(folder: Path | str) -> dict:
    return json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))


def sources_in(folder: Path | str) -> list[dict]:
    return report_in(folder)["sources"]


def write_files(folder: Path, order: int = 1) -> str:
    """A file of each format, as --eval-data takes them."""
    for form, rows in ROWS.items():
        write_rows(folder / f"{form}.jsonl", rows[::order])
    return ",".join(f"{form}.jsonl" for form in ROWS)


def write_checkpoints(folder: Path, tokenizer) -> None:
    """Models of no training, the autoregressive one for plain text, the other for conversations."""
    for name, kind, stage in (("ar", "causal", "pretrain"), ("dm", "full", "sft")):
        save(folder / f"{name}_state_dict.pt", ready(tokenizer, kind), stage)


def flags(tokenizer_dir: Path, *more: object, without: tuple[str, ...] = ()) -> list[str]:
    given = {
        **{"--tokenizer-dir": tokenizer_dir, "--dtype": "float32", "--device": "cpu", "--seed": 11},
        **{"--seq-len": LENGTH, "--max-new-tokens": NEW_TOKENS, "--nmc": 2, "--canvas": 12, "--gen-steps": 4},
    }
    pairs = [pair for pair in given.items() if pair[0] not in without]
    return [str(part) for part in (*(part for pair in pairs for part in pair), *more)]


BOTH = ("--minimind-checkpoint", "ar_state_dict.pt", "--diffusion-checkpoint", "dm_state_dict.pt")


@pytest.fixture(scope="session")
def made(tmp_path_factory, tokenizer, tokenizer_dir):
    """(folder with both checkpoints and all files, the report of them in report/)."""
    folder = tmp_path_factory.mktemp("report")
    write_checkpoints(folder, tokenizer)
    more = ["--eval-data", write_files(folder), "--out", "report", "--frontier-questions", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_command(report, [*BOTH, *flags(tokenizer_dir, *more), "--frontier-steps", "1,6"])
    assert result.code == 0, result.err
    return folder, report_in(folder / "report")


@pytest.fixture
def models(made, tokenizer):
    """name -> the model of the report."""
    files = {AR: made[0] / "ar_state_dict.pt", DM: made[0] / "dm_state_dict.pt"}
    return {name: load_for_use(path, tokenizer, LENGTH, RUNTIME) for name, path in files.items()}


@pytest.fixture
def undrawn(monkeypatch):
    """Nothing is drawn: it takes longer than what is measured."""
    monkeypatch.setattr(report, "draw", lambda *a: [])


@pytest.fixture
def no_figures(monkeypatch):
    """The page is drawn without its figures."""
    for name in ("draw_quality", "draw_likelihood", "draw_frontier"):
        monkeypatch.setattr(page, name, lambda *a: None)


@pytest.fixture(scope="session")
def sections(made):
    return {section["format"]: section for section in made[1]["sources"]}


@pytest.fixture(scope="session")
def tables(made):
    """file -> its rows."""
    return {section["name"]: rows_of(section, made[1]["models"]) for section in made[1]["sources"]}


@pytest.fixture(scope="session")
def rows(tables):
    """(file, metric, group) -> row."""
    return {(name, row.metric.name, row.group): row for name, table in tables.items() for row in table}


@pytest.fixture(scope="session")
def summary(made):
    return summary_of(made[1])


@pytest.fixture(scope="session")
def markdown(made):
    return (made[0] / "report" / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def place(made, workspace):
    """A folder with the checkpoints and files, in which the command runs."""
    shutil.copytree(made[0], workspace, dirs_exist_ok=True, ignore=shutil.ignore_patterns("report"))
    return workspace
