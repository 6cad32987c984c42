"""Every file of a result says what it depends on, and truly; it appears whole; the same command writes it again."""

import functools
import hashlib
import importlib.metadata
import io
import json
import math
import operator
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.tokenizer import fingerprint
from model.checkpoint import load_checkpoint
from scripts import chat
from scripts.engine import files, runtime
from scripts.engine.bench import flops
from scripts.engine.decoding.trace_files import load_traces
from scripts.engine.files import read_log
from scripts.engine.runtime import RuntimeConfig
from scripts.eval import (
    benchmark,
    eval_diffusion,
    eval_minimind,
    eval_sft,
    eval_sft_one_prompt,
    experiments,
    likelihood,
    report,
    schedule_variance,
)
from scripts.train import train_pretrain
from tests.scripts.conftest import conversations, flags_of_a_tiny_run, write_rows

AR, DM = "weights/ar_state_dict.pt", "weights/dm_state_dict.pt"
BOTH = ["--minimind-checkpoint", AR, "--diffusion-checkpoint", DM]
WRITING = ["--max-new-tokens", "5", "--gen-seed", "3"]
SAMPLER = ["--gen-steps", "3", "--gen-temp", "0.7"]
FEW = ["--max-new-tokens", "30", "--prompts-per-language", "1", "--show", "0"]
DATA = ["--eval-data", "corpus.jsonl"]
COMMON = ["--seed", "7", "--dtype", "float32", "--device", "cpu"]
PROMPT = ["--prompt", "a", *WRITING]
ONE_PROMPT = [*BOTH, *PROMPT, *SAMPLER, "--no-chat-wrap"]
AR_JSON = ["--checkpoint", AR, *DATA, *PROMPT, "--json"]
DM_JSON = ["--checkpoint", DM, *DATA, "--nmc", "1", *PROMPT, *SAMPLER, "--json"]
CHATS_JSON = [*BOTH, "--eval-data", "chats.jsonl", "--judge", AR, *FEW, *SAMPLER, "--json", "a.json"]
COMMANDS = {  # module, flags, checkpoints judged, file of data, where the record is
    "eval_minimind": (eval_minimind, AR_JSON, [AR], "stdout"),
    "eval_diffusion": (eval_diffusion, DM_JSON, [DM], "stdout"),
    "likelihood": (likelihood, ["--checkpoint", DM, *DATA, "--nmc", "1", "--json", "new/a.json"], [DM], "new/a.json"),
    "one prompt": (eval_sft_one_prompt, [*ONE_PROMPT, "--json"], [AR, DM], "stdout"),
    "trace": (eval_sft_one_prompt, [*ONE_PROMPT, "--trace", "a.json"], [AR, DM], "a.json"),
    "eval_sft": (eval_sft, CHATS_JSON, [AR, DM, AR], "a.json"),
    "schedule_variance": (
        schedule_variance,
        ["--checkpoint", DM, "--data", "corpus.jsonl", "--num-draws", "2", "--max-seq-len", "32", "--json", "a.json"],
        [DM],
        "a.json",
    ),
    "report": (
        report,
        [*BOTH, "--eval-data", "corpus.jsonl,chats.jsonl", "--nmc", "1", "--max-rows", "4", "--out", "out"],
        [AR, DM],
        "out/report.json",
    ),
    "benchmark": (benchmark, ["--parts", "peak", "--data", "corpus.jsonl", "--json", "a.json"], [], "a.json"),
    "chat": (chat, ["--checkpoint", DM, *WRITING, *SAMPLER], [DM], "c.json"),
}
VERSIONS = "torch", "transformers", "tokenizers", "numpy"


@pytest.fixture
def place(workspace, weights_of_one_step, texts, monkeypatch):
    """A folder with weights and data, in which commands run."""
    shutil.copytree(weights_of_one_step, workspace / "weights")
    write_rows("chats.jsonl", conversations(texts[:12]))
    monkeypatch.setattr(report, "draw", lambda *a: [])
    monkeypatch.setattr(flops, "SHAPES", {"cpu": ((64, 64, 64),)})
    return workspace


@pytest.fixture
def run(place, command, tokenizer_dir, monkeypatch):
    """run(name) -> (the arguments of a command, the JSON that it wrote)."""

    def start(name):
        module, argv, _, where = COMMANDS[name]
        argv = [*argv, "--tokenizer-dir", str(tokenizer_dir), *COMMON]
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n/trace c.json\n"))
        result = command(module, argv)
        assert result.code == 0, result.err
        return argv, json.loads(result.out if where == "stdout" else Path(where).read_text(encoding="utf-8"))

    return start


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def commit():
    """That of the code under test; "unknown" if there is no repository."""
    line = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(line, cwd=Path(files.__file__).parent, capture_output=True, text=True)
    return head.stdout.strip() if head.returncode == 0 else "unknown"


def assert_provenance(record, seed):
    assert {name: record[name] for name in VERSIONS} == {name: importlib.metadata.version(name) for name in VERSIONS}
    assert record["python"] == platform.python_version() and record["processor"]
    assert record["device"].startswith("cpu (") and record["dtype"] == "float32" and record["seed"] == seed
    assert commit().startswith(record["commit"].rstrip("+"))


def test_the_processor_is_named_if_the_system_names_it():
    names = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    if "model name" not in names:
        pytest.skip("this system names no model")
    assert f": {runtime.provenance(RuntimeConfig(device='cpu'))['processor']}\n" in names


def test_the_commit_is_that_of_the_projects_own_repository_and_marked_where_code_differs(tmp_path):
    def git(*args):
        who = "-c", "user.name=a", "-c", "user.email=a@b"
        return subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    if not shutil.which("git"):
        pytest.skip("no git")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.py").write_text("a")
    assert runtime._commit(tmp_path) == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    (tmp_path / "weights.json").touch()
    assert runtime._commit(tmp_path) == head
    assert runtime._commit(tmp_path / "model") == "unknown", "inside another repository"
    (tmp_path / "model" / "b.py").touch()
    assert runtime._commit(tmp_path) == head + "+"
    (tmp_path / "model" / "b.py").unlink()
    (tmp_path / "model" / "a.py").write_text("b")
    assert runtime._commit(tmp_path) == head + "+"


TIMED = "seconds", "tokens_per_second"


def without_seconds(value):
    if isinstance(value, dict):
        return {name: without_seconds(entry) for name, entry in value.items() if name not in TIMED}
    return [without_seconds(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_says_what_it_depends_on_and_comes_again_to_the_last_digit(name, run, tokenizer):
    module, _, judged, _ = COMMANDS[name]
    argv, written = run(name)
    if name not in ("likelihood", "one prompt", "benchmark", "chat"):
        assert without_seconds(run(name)[1]) == without_seconds(written)
    record = written["traces"][-1]["info"]["record"] if name in ("trace", "chat") else written
    assert_provenance(record, 7)
    assert shlex.split(record["command"]) == ["uv", "run", "python", "-m", module.__name__, *argv]
    assert record["tokenizer"] == fingerprint(tokenizer)
    stages = {path: load_checkpoint(Path(path))["stage"] for path in judged}
    expected = [{"checkpoint": path, "sha256": sha256(path), "stage": stages[path]} for path in judged]
    assert record["checkpoints"] == expected
    data = {part: sha256(part) for arg in argv for part in arg.split(",") if part in ("corpus.jsonl", "chats.jsonl")}
    assert record["data_sha256"] == (data if name == "report" else next(iter(data.values()), None))
    settings = record["settings"]
    assert settings["seed"] == 7 and settings["dtype"] == "float32" and settings["device"] == "cpu"
    if "--gen-seed" in argv:
        assert (settings["gen_seed"], settings["max_new_tokens"]) == (3, 5)
    for (command, *way), expected in SAMPLED.items():
        if command == name:
            assert expected.items() <= functools.reduce(operator.getitem, way, written).items()


DIFFUSION = {"gen_steps": 3, "gen_temp": 0.7, "gen_block_size": 8, "gen_cache": "none"}
SAMPLED = {  # a command and the way to an entry of what it writes: settings, also those left to the checkpoint
    ("eval_diffusion", "settings"): DIFFUSION,
    ("one prompt", "settings"): DIFFUSION | {"ar_temperature": 0.8},
    ("eval_sft", "samplers", "AR"): {"ar_temperature": 0.8},
    ("eval_sft", "samplers", "low_confidence, 3 steps"): {"gen_temp": 0.7},
    ("chat", "traces", 0, "info"): {"prompt": "b", "gen_steps": 3, "gen_temp": 0.7, "gen_seed": 4},  # the reply
}


def test_a_page_holds_the_record_and_shows_it_to_nobody(place, command, tokenizer_dir):
    argv = ["--checkpoint", AR, "--tokenizer-dir", str(tokenizer_dir), *COMMON, "--prompt", "a", "--trace"]
    for target in ("a.html", "a.json"):
        assert command(eval_minimind, [*argv, target]).code == 0
    (trace,) = load_traces("a.json")
    page = Path("a.html").read_text(encoding="utf-8")
    assert trace.info["record"]["checkpoints"][0]["sha256"] in page and '["record"' not in page


def test_a_run_says_in_its_log_and_checkpoint_what_it_depends_on(workspace, command, tokenizer, tokenizer_dir):
    argv = [*flags_of_a_tiny_run(tokenizer_dir), "--run-name", "new", "--max-iters", "2", "--seed", "9"]
    assert command(train_pretrain, argv).code == 0
    start = read_log(Path("weights/new_log.jsonl"))[0]
    for record in (start, *(load_checkpoint(Path(f"weights/new{end}.pt")) for end in ("", "_state_dict"))):
        assert_provenance(record["provenance"], 9)
        assert record["stage"] == "scripts.train.train_pretrain" and record["settings"]["seed"] == 9
        assert record["data"]["data_sha256"] and record["command"]
        assert record["tokenizer"] == fingerprint(tokenizer)


TOKENIZER = "--tokenizer-dir", "t"
OVERWRITTEN = {  # a command and its flags, of which the last one names a file that it reads
    "data": (likelihood, ["--checkpoint", DM, *DATA, "--json", "corpus.jsonl"]),
    "a checkpoint": (likelihood, ["--checkpoint", DM, *DATA, "--json", DM]),
    "a tokenizer": (likelihood, ["--checkpoint", DM, *DATA, "--json", "t/../t/tokenizer.json"]),
    "a link": (likelihood, ["--checkpoint", DM, *DATA, "--json", "link.json"]),
    "conversations": (eval_sft, [*BOTH, "--eval-data", "chats.jsonl", "--json", "chats.jsonl"]),
    "a judge": (eval_sft, ["--minimind-checkpoint", AR, "--judge", DM, "--eval-data", "chats.jsonl", "--json", DM]),
    "schedules": (schedule_variance, ["--checkpoint", DM, "--data", "corpus.jsonl", "--json", "corpus.jsonl"]),
    "benchmark": (benchmark, ["--parts", "peak", "--data", "corpus.jsonl", "--json", "corpus.jsonl"]),
    "AR trace": (eval_minimind, ["--checkpoint", AR, "--prompt", "a", "--trace", "t/tokenizer.json"]),
    "dLM trace": (eval_diffusion, ["--checkpoint", DM, "--prompt", "a", "--trace", "t/tokenizer.json"]),
    "trace": (eval_sft_one_prompt, [*BOTH, "--prompt", "a", "--trace", "t/tokenizer_config.json"]),
    "report": (report, ["--minimind-checkpoint", "t/report.json", *DATA, "--out", "t"]),
    "drawing": (report, ["--from", "t/report.md", "--out", "t"]),
    "experiments": (experiments, ["--data", "corpus.jsonl", "--experiments", "schedules", "--out", "t"]),
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_no_result_is_written_over_what_its_command_reads(name, place, tokenizer_dir, refused):
    module, argv = OVERWRITTEN[name]
    shutil.copytree(tokenizer_dir, "t")
    Path("link.json").symlink_to("corpus.jsonl")
    Path("t/schedules.json").hardlink_to("corpus.jsonl")
    for copy in ("t/report.json", "t/report.md"):
        shutil.copy(AR, copy)
    flag, path = argv[-2:]
    refused(module, [*argv, *(() if name == "drawing" else TOKENIZER)], flag, path, "reads")


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    """And nothing is left behind; its folder is made."""
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"a": 1})
    assert path.read_bytes() == b'{\n "a": 1\n}\n'

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.files.os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"b": 2})
    assert [file.name for file in path.parent.iterdir()] == ["a.json"] and json.loads(path.read_text()) == {"a": 1}


def test_what_no_json_holds_costs_no_result(tmp_path):
    """Half of a surrogate pair, as in the name of a file that is no UTF-8, reads back; what is no number is null."""
    value = {"command": "a\udcff", "nats": [1.5, math.nan, -math.inf], "deep": {"error": (math.inf, 0)}}
    files.write_json(tmp_path / "a.json", value)
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert written == {"command": "a\udcff", "nats": [1.5, None, None], "deep": {"error": [None, 0]}}
