"""Bad data, tokenizers and checkpoints: one sentence that names the file, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest
import torch

from dataset.tokenizer import save_tokenizer, train_bpe
from scripts.eval import eval_diffusion, eval_minimind, likelihood
from scripts.train import diffusion, train_pretrain, train_tokenizer
from tests.scripts.commands import EVALS, TRAINS

BAD_FILES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "has no rows"),
    "blank": (b"\n \n\n", "has no rows"),
    "wrong field": (b'{"text": "a"}\n{"content": "b"}\n', 'row 2: field "text" is missing; fields present: content'),
    "not a string": (b'{"text": 5}\n', 'row 1: field "text" is a number'),
    "null": (b'{"text": null}\n', 'row 1: field "text" is null'),
    "malformed": (b'{"text": "a"}\n{"text": "b\n', "row 2: not valid JSON"),
    "not an object": (b'["text"]\n', "row 1: expected an object"),
    "not UTF-8": (b'{"text": "a"}\n\n{"text": "\xff\xfe"}\n', "row 3: not UTF-8"),
    "half a pair": (b'{"text": "\\ud83d"}\n', "row 1"),
    "gzip by content": (b"\x1f\x8b\x08 and more\n", "gzip"),
    "only empty texts": (b'{"text": ""}\n{"text": ""}\n', "empty"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", TRAINS)
def test_training_on_a_bad_file(name, kind, train_argv, refused, workspace):
    content, words = BAD_FILES[kind]
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    refused(TRAINS[name], [*train_argv[name], "--data", "bad.jsonl"], "bad.jsonl", words)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_evaluating_a_bad_file(kind, eval_argv, refused, workspace):
    content, words = BAD_FILES[kind]
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], "--eval-data", "bad.jsonl"], "bad.jsonl", words)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_character_mode_and_tokenizer_training_on_a_bad_file(kind, refused, workspace, train_argv):
    content, words = BAD_FILES[kind]
    if kind == "only empty texts":
        words = "no text"
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    refused(train_tokenizer, ["--data", "bad.jsonl", "--target-vocab-size", "300"], words)
    refused(diffusion, ["--train", "--data", "bad.jsonl", "--run-name", "x"], words)


@pytest.mark.parametrize(
    "name, words", [("data.csv", ".jsonl or .txt"), ("folder.jsonl", "directory"), ("data.jsonl.gz", "gzip")]
)
def test_another_kind_of_file(name, words, train_argv, eval_argv, refused, workspace):
    if name.startswith("folder"):
        (workspace / name).mkdir()
    else:
        (workspace / name).write_text('{"text": "a"}\n')
    refused(train_pretrain, [*train_argv["train_pretrain"], "--data", name, "--run-name", "new"], name, words)
    refused(likelihood, [*eval_argv["likelihood"], "--eval-data", name], name, words)


@pytest.mark.parametrize("name", TRAINS)
def test_everything_held_out_for_validation(name, train_argv, refused):
    refused(TRAINS[name], [*train_argv[name], "--val-fraction", "0.99999"], "--val-fraction")


# -- tokenizers --------------------------------------------------------------------------------------------------------


BAD_TOKENIZERS = {
    "missing": "does not exist",
    "empty": "holds no tokenizer.json",
    "no config": "holds no tokenizer_config.json",
    "not JSON": "tokenizer.json is not JSON",
    "cut short": "tokenizer.json is not JSON",
    "not a tokenizer": "tokenizer.json is not a tokenizer",
    "not UTF-8": "tokenizer_config.json is not JSON",
    "no EOS": "eos_token",
}


@pytest.fixture
def bad_tokenizer(workspace, tokenizer_dir):
    def make(kind):
        directory = workspace / "bad"
        if kind == "missing":
            return directory
        directory.mkdir()
        if kind == "empty":
            return directory
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((tokenizer_dir / name).read_bytes())
        main, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
        if kind == "no config":
            config.unlink()
        elif kind == "not JSON":
            main.write_text("hello")
        elif kind == "cut short":
            main.write_bytes(main.read_bytes()[:500])
        elif kind == "not a tokenizer":
            main.write_text('{"a": 1}')
        elif kind == "not UTF-8":
            config.write_bytes(b"\xff\xfe")
        else:
            config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
        return directory

    return make


@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_a_bad_tokenizer_directory(kind, bad_tokenizer, train_argv, eval_argv, refused):
    flags = ["--tokenizer-dir", bad_tokenizer(kind)]
    for name, module in TRAINS.items():
        refused(module, [*train_argv[name], "--run-name", "new", *flags], "bad", BAD_TOKENIZERS[kind])
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], *flags], "bad", BAD_TOKENIZERS[kind])


def test_another_tokenizer_than_the_one_trained_with(texts, workspace, train_argv, eval_argv, refused):
    save_tokenizer(train_bpe(texts[::2] * 2, 380), workspace / "other")
    flags = ["--tokenizer-dir", "other"]
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], *flags], "another tokenizer", "--tokenizer-dir")
    for name, module in TRAINS.items():
        start = [*train_argv[name], "--run-name", "new", "--load-from", "weights/ar_state_dict.pt", *flags]
        refused(module, start, "another tokenizer", "--tokenizer-dir")
        refused(module, [*train_argv[name], "--max-iters", "1", "--resume", "must", *flags], "another tokenizer")


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


BAD_CHECKPOINTS = {
    "missing": None,
    "zero bytes": lambda good: b"",
    "text": lambda good: b"hello\n",
    "first half": lambda good: good[: len(good) // 2],
    "all but the end": lambda good: good[:-100],
    "code": lambda good: _file(Trap()),
    "tensor": lambda good: _file(torch.zeros(3)),
    "foreign dict": lambda good: _file({"epoch": 3, "note": "x"}),
}


def _file(value) -> bytes:
    torch.save(value, "made.tmp")
    content = Path("made.tmp").read_bytes()
    Path("made.tmp").unlink()
    return content


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint(kind, train_argv, eval_argv, refused, workspace):
    make = BAD_CHECKPOINTS[kind]
    if make is not None:
        (workspace / "bad.pt").write_bytes(make(Path("weights/ar_state_dict.pt").read_bytes()))
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], "--checkpoint", "bad.pt"], "bad.pt")
    for name, module in TRAINS.items():
        refused(module, [*train_argv[name], "--run-name", "new", "--load-from", "bad.pt"], "bad.pt")
    if make is not None:
        Path("weights/ar.pt").write_bytes((workspace / "bad.pt").read_bytes())
        for resume in ("must", "auto"):
            refused(train_pretrain, [*train_argv["train_pretrain"], "--resume", resume], "weights/ar.pt")
    assert not Path("sprung").exists()


def test_the_other_kind_of_checkpoint_names_the_command_for_it(eval_argv, refused):
    ar, dm = ["--checkpoint", "weights/ar_state_dict.pt"], ["--checkpoint", "weights/dm_state_dict.pt"]
    refused(eval_diffusion, [*eval_argv["eval_diffusion"], *ar], "ar_state_dict.pt", "scripts.eval.eval_minimind")
    refused(eval_minimind, [*eval_argv["eval_minimind"], *dm], "dm_state_dict.pt", "scripts.eval.eval_diffusion")


def test_generating_without_a_trained_run(refused, tokenizer_dir, train_argv, command):
    argv = ["--use-tokenizer", "--tokenizer-dir", tokenizer_dir, "--run-name", "none"]
    refused(diffusion, argv, "weights/none_state_dict.pt")
    refused(diffusion, ["--run-name", "none"], "none_tokenizer")
