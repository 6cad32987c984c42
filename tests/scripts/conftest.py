"""A corpus, a tokenizer and a way to run commands in process; everything happens in a folder of the test's own."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataset.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from scripts.engine import cli
from scripts.train import diffusion, train_pretrain

os.environ["NANO_LLADA_PLOTS"] = "0"  # drawing takes longer than the runs that it is drawn for
NOUNS = ("the cat", "a small dog", "my old friend", "the river", "一只小猫", "老朋友", "那条河", "春天的风")
VERBS = ("sees", "likes", "follows", "remembers", "看见了", "喜欢", "跟着", "记得")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of one to nine bilingual sentences, no two alike."""
    draw = random.Random(seed)
    return [
        f"{number}: "
        + " ".join(
            f"{draw.choice(NOUNS)} {draw.choice(VERBS)} {draw.choice(NOUNS)}." for _ in range(draw.randint(1, 9))
        )
        for number in range(count)
    ]


def write_rows(path: Path | str, rows: Iterable[dict]) -> Path:
    """Write one object a line; return the path."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    return write_rows(path, ({field: text} for text in texts))


def without(argv: list[str], flag: str) -> list[str]:
    """Arguments less a flag and its value."""
    place = argv.index(flag)
    return [*argv[:place], *argv[place + 2 :]]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> str:
        """Standard error, less the note that a tiny model is used beyond the length that it was trained on."""
        return "".join(line for line in self.err.splitlines(keepends=True) if "was trained on at most" not in line)


def run_command(module, argv) -> Result:
    """Run a command's main as the command line would; an exception that would be a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(module.main, [str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def command():
    """command(module, argv) -> Result(code, out, err)."""
    return run_command


@pytest.fixture
def refused(command, workspace):
    """refused(module, argv, *words): exit code 2, one sentence on stderr holding every word, no file changed."""

    def check(module, argv, *words):
        before = snapshot(workspace)
        result = command(module, argv)
        assert result.code == 2, result
        # What was skipped or built on the way may be reported before it, but the mistake itself is one last line.
        lines = result.err.strip().splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], result.err
        for word in words:
            assert str(word) in lines[-1], (word, lines[-1])
        assert snapshot(workspace) == before
        return lines[-1]

    return check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything under `folder` but the cache of tokenised corpora, which a refused command may leave behind."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "dataset" not in path.relative_to(folder).parts[:1]
    }


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sentences(60)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, texts) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(texts, 380), directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def workspace(tmp_path, monkeypatch, texts) -> Path:
    """An empty folder with corpus.jsonl, in which the command runs: default paths lead nowhere else."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", texts)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """No file of a test has to survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def plots(monkeypatch):
    """Loss curves are drawn in this test."""
    monkeypatch.delenv("NANO_LLADA_PLOTS")


def flags_of_a_tiny_run(tokenizer_dir: Path) -> list[str]:
    """12 steps of a small shape on corpus.jsonl, with the intervals of logs, validations and saves all different."""
    return [
        *("--data", "corpus.jsonl", "--tokenizer-dir", str(tokenizer_dir), "--val-fraction", "0.2"),
        *("--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4", "--intermediate-size", "64"),
        *("--max-seq-len", "32", "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--warmup-steps", "2"),
        *("--max-iters", "12", "--log-interval", "5", "--eval-interval", "4", "--save-interval", "3"),
    ]


PRETRAIN = ("--run-name", "ar")
DIFFUSION = ("--run-name", "dm", "--train", "--use-tokenizer", "--max-new-tokens", "4", "--gen-steps", "2")


@pytest.fixture
def tiny_flags(workspace, tokenizer_dir) -> list[str]:
    """Flags that both training commands have."""
    return flags_of_a_tiny_run(tokenizer_dir)


@pytest.fixture
def pretrain_argv(tiny_flags):
    """Arguments of scripts.train.train_pretrain."""
    return [*tiny_flags, *PRETRAIN]


@pytest.fixture
def shapeless_argv(pretrain_argv):
    """Arguments of scripts.train.train_pretrain without a flag of the shape, for one step that changes nothing."""
    at = pretrain_argv.index("--hidden-size")
    return [*pretrain_argv[:at], *pretrain_argv[at + 8 :], "--lr", "1e-30", "--weight-decay", "0", "--max-iters", "1"]


@pytest.fixture
def diffusion_argv(tiny_flags):
    """Arguments of scripts.train.diffusion."""
    return [*tiny_flags, *DIFFUSION]


@pytest.fixture(scope="session")
def weights_of_one_step(tmp_path_factory, tokenizer_dir, texts) -> Path:
    """A save folder with the runs ar and dm, each of one step."""
    folder = tmp_path_factory.mktemp("trained")
    write_jsonl(folder / "corpus.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, flags in ((train_pretrain, PRETRAIN), (diffusion, DIFFUSION)):
            result = run_command(module, [*flags_of_a_tiny_run(tokenizer_dir), *flags, "--max-iters", "1"])
            assert result.code == 0, result.err
    return folder / "weights"


@pytest.fixture
def train_argv(pretrain_argv, diffusion_argv):
    """train_argv[name]: arguments of a training command that works."""
    return {"train_pretrain": pretrain_argv, "diffusion": diffusion_argv}


@pytest.fixture
def eval_argv(workspace, weights_of_one_step, tokenizer_dir):
    """eval_argv[name]: arguments of an evaluation that works, on corpus.jsonl."""
    shutil.copytree(weights_of_one_step, workspace / "weights")
    shared = ["--tokenizer-dir", str(tokenizer_dir), "--eval-data", "corpus.jsonl", "--dtype", "float32"]
    ar, dm = (["--checkpoint", f"weights/{run}_state_dict.pt", *shared] for run in ("ar", "dm"))
    return {"eval_minimind": ar, "eval_diffusion": [*dm, "--nmc", "1"], "likelihood": [*dm, "--nmc", "1"]}


@pytest.fixture
def prompting(eval_argv):
    """prompting[name]: arguments of an evaluation command, its file of text left out."""
    return {name: argv[: argv.index("--eval-data")] for name, argv in eval_argv.items()}


SFT = {"sft_ar": ("ar", ()), "sft_dm": ("dm", ("--eos-fill", "6"))}


def conversations(texts: list[str]) -> list[dict]:
    """Rows of all four formats, the first in each of them in turn; every seventh conversation has two exchanges."""
    rows = []
    for i, text in enumerate(texts):
        question, reply = text.split(": ")[0], text.split(": ")[1][:40]
        exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        rows.append(
            [
                {"conversations": exchange * (2 if i % 7 == 0 else 1)},
                {"messages": exchange},
                {"instruction": question, "input": "", "output": reply},
                {"prompt": question, "response": reply},
            ][i % 4]
        )
    return rows


@pytest.fixture
def sft_argv(workspace, weights_of_one_step, tokenizer_dir, texts):
    """sft_argv[name]: arguments of a fine-tuning of 12 steps on chats.jsonl, starting from a run in pretrained/."""
    write_rows(workspace / "chats.jsonl", conversations(texts))
    shutil.copytree(weights_of_one_step, workspace / "pretrained")
    flags = flags_of_a_tiny_run(tokenizer_dir)
    shape = flags.index("--hidden-size")
    flags = [*flags[:shape], *flags[shape + 8 :], "--data", "chats.jsonl", "--max-seq-len", "40", "--lr", "1e-2"]
    return {
        name: [*flags, "--run-name", name, "--load-from", f"pretrained/{start}_state_dict.pt", *extra]
        for name, (start, extra) in SFT.items()
    }
