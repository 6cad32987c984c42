"""Bad data, tokenizers and checkpoints: one sentence that names the file, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest

from dataset.tokenizer import save_tokenizer, train_bpe
from model.checkpoint import load_checkpoint
from scripts.engine.files import read_log
from scripts.eval import likelihood
from scripts.train import diffusion, train_pretrain, train_sft_diffusion, train_sft_minimind, train_tokenizer
from tests.scripts.commands import EVALS, TRAINS
from tests.scripts.conftest import without

BAD_FILES = {  # more kinds, for every reader, are in tests/dataset/test_jsonl.py
    "missing": (None, "does not exist"),
    "empty": (b"", "has no rows"),
    "wrong field": (b'{"text": "a"}\n{"content": "b"}\n', 'row 2: field "text" is missing; fields present: content'),
    "malformed": (b'{"text": "a"}\n{"text": "b\n', "row 2: not valid JSON"),
    "not UTF-8": (b'{"text": "a"}\n\n{"text": "\xff\xfe"}\n', "row 3: not UTF-8"),
}


@pytest.fixture(params=BAD_FILES)
def words(request, workspace):
    """Words of the error for bad.jsonl, a file of each kind in turn."""
    content, words = BAD_FILES[request.param]
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    return words


@pytest.mark.parametrize("name", TRAINS)
def test_training_on_a_bad_file(name, words, train_argv, refused):
    refused(TRAINS[name], [*train_argv[name], "--data", "bad.jsonl"], "bad.jsonl", words)


def test_evaluating_a_bad_file(words, eval_argv, refused):
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], "--eval-data", "bad.jsonl"], "bad.jsonl", words)


def test_character_mode_and_tokenizer_training_on_a_bad_file(words, refused, workspace):
    refused(train_tokenizer, ["--data", "bad.jsonl", "--target-vocab-size", "300"], words)
    refused(diffusion, ["--train", "--data", "bad.jsonl", "--run-name", "x"], words)


# -- bad rows that are skipped -----------------------------------------------------------------------------------------

SKIP = ["--on-bad-row", "skip"]
DAMAGED = {  # rows 1 and 3 of a file are bad, and another one is sound
    "text": (b'{\n{"text": "the cat sees"}\n{"text": 5}\n', {"text": "the cat sees"}),
    "chat": (b'{\n{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', {"prompt": "a", "response": "b"}),
}
SKIPPED = "2 bad rows skipped: row 1: not valid JSON", "row 3: "


TRAINED = {  # module, and the arguments it begins with
    "train_pretrain": (train_pretrain, "train_pretrain", []),
    "diffusion": (diffusion, "diffusion", []),
    "characters": (diffusion, "diffusion", ["--no-use-tokenizer"]),
    "sft_ar": (train_sft_minimind, "sft_ar", []),
    "sft_dm": (train_sft_diffusion, "sft_dm", []),
    "stream": (train_sft_minimind, "sft_ar", ["--streaming", "--steps-per-epoch", "4"]),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_without_the_bad_rows(name, train_argv, sft_argv, command, workspace):
    """They are reported on the screen, in the log and in the checkpoint; the rest is trained on as if it were alone."""
    module, like, flags = TRAINED[name]
    argv = [*(train_argv | sft_argv)[like], *flags]
    if name == "characters":
        argv = without(argv, "--tokenizer-dir")
    kind, source = ("chat", "chats.jsonl") if like in sft_argv else ("text", "corpus.jsonl")
    source = workspace / source
    rows = source.read_bytes()
    run = argv[argv.index("--run-name") + 1]
    losses = []
    for spoiled in (False, True):
        bad, sound = DAMAGED[kind]
        source.write_bytes((bad if spoiled else json.dumps(sound).encode() + b"\n") + rows)
        skip = [*SKIP, "--overwrite"] if spoiled else []
        result = command(module, [*argv, *skip, "--max-iters", "2", "--log-interval", "1"])
        assert result.code == 0, result.err
        losses.append([e["loss"] for e in read_log(Path(f"weights/{run}_log.jsonl")) if e["event"] == "train"])
    assert losses[0] == losses[1]
    assert all(word in result.out for word in SKIPPED), result.out
    (start,) = (e for e in read_log(Path(f"weights/{run}_log.jsonl")) if e["event"] == "start")
    for data in (start["data"], load_checkpoint(f"weights/{run}.pt")["data"]):
        assert data["skipped_rows"] == 2 and data["skipped_first"][0].startswith("row 1: not valid JSON")


@pytest.mark.parametrize("name", EVALS)
def test_evaluating_without_the_bad_rows(name, eval_argv, command, workspace):
    results = []
    for data, flags in ((DAMAGED["text"][0], SKIP), (json.dumps(DAMAGED["text"][1]).encode(), [])):
        (workspace / "few.jsonl").write_bytes(data)
        results.append(command(EVALS[name], [*eval_argv[name], "--eval-data", "few.jsonl", *flags]))
        assert results[-1].code == 0, results[-1].err
    assert results[0].out == results[1].out
    assert all(word in results[0].err for word in SKIPPED)


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_record_of_a_likelihood_holds_the_bad_rows(kind, eval_argv, command, workspace):
    (workspace / "few.jsonl").write_bytes(DAMAGED[kind][0])
    argv = [*eval_argv["likelihood"], "--eval-data", "few.jsonl", *SKIP, "--json", "a.json"]
    assert command(likelihood, argv).code == 0
    record = json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert record["skipped_rows"] == 2 and record["skipped_first"][1].startswith("row 3: ")


def test_a_tokenizer_is_trained_without_the_bad_rows(command, workspace):
    sound = (workspace / "corpus.jsonl").read_bytes()
    tokenizers = []
    for data, flags in ((sound, []), (b'{"text": null}\n' + sound + b"[]\n", SKIP)):
        (workspace / "corpus.jsonl").write_bytes(data)
        argv = ["--data", "corpus.jsonl", "--target-vocab-size", "300", "--overwrite", "--eval-data", "corpus.jsonl"]
        result = command(train_tokenizer, [*argv, *flags])
        assert result.code == 0, result.err
        tokenizers.append(Path("weights/tokenizer/tokenizer.json").read_bytes())
    assert tokenizers[0] == tokenizers[1]
    assert result.out.count('2 bad rows skipped: row 1: field "text" is null') == 2


def test_bad_rows_have_labels_too(command, workspace):
    """Else every label behind them would be that of another row."""
    (workspace / "corpus.jsonl").write_text('{"text": "aaaa aaaa"}\n[]\n{"text": "bbbb bbbb"}\n' * 9)
    (workspace / "labels.txt").write_text("a\nb\nb\n" * 9)
    argv = ["--data", "corpus.jsonl", "--target-vocab-size", "273", "--sources", "labels.txt", "--keep-sources", "b"]
    assert command(train_tokenizer, [*argv, *SKIP]).code == 0
    merges = json.loads(Path("weights/tokenizer/tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["b", "b"]]


# -- other files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words", [("data.xlsx", ".jsonl"), ("folder.jsonl", "folder"), ("data.jsonl.gz", "gzip")]
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


BAD_TOKENIZERS = {  # files to write over those of a good directory, or to delete (None); more are in tests/dataset
    "missing": (None, "does not exist"),
    "empty": ({"tokenizer.json": None, "tokenizer_config.json": None}, "holds no tokenizer.json"),
    "not JSON": ({"tokenizer.json": lambda good: b"hello"}, "tokenizer.json is not JSON"),
    "no EOS": ({"tokenizer_config.json": lambda good: good.replace(b'"eos_token"', b'"other"')}, "eos_token"),
}


@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_a_bad_tokenizer_directory(kind, tokenizer_dir, workspace, train_argv, eval_argv, refused):
    changes, words = BAD_TOKENIZERS[kind]
    if changes is not None:
        shutil.copytree(tokenizer_dir, "bad")
        for name, change in changes.items():
            path = workspace / "bad" / name
            path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    for commands, argv in ((TRAINS, train_argv), (EVALS, eval_argv)):
        for name, module in commands.items():
            run = ["--run-name", "new"] if commands is TRAINS else []
            refused(module, [*argv[name], *run, "--tokenizer-dir", workspace / "bad"], "bad", words)


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


@pytest.mark.parametrize("kind", ["missing", "cut in half"])
def test_a_bad_checkpoint(kind, train_argv, eval_argv, refused):
    """More kinds, for every reader, are in training/test_checkpoint_damage.py."""
    if kind == "cut in half":
        good = Path("weights/ar_state_dict.pt").read_bytes()
        for path in ("bad.pt", "weights/ar.pt"):
            Path(path).write_bytes(good[: len(good) // 2])
        for resume in ("must", "auto"):
            refused(train_pretrain, [*train_argv["train_pretrain"], "--resume", resume], "weights/ar.pt")
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], "--checkpoint", "bad.pt"], "bad.pt")
    for name, module in TRAINS.items():
        refused(module, [*train_argv[name], "--run-name", "new", "--load-from", "bad.pt"], "bad.pt")


def test_generating_without_a_trained_run(refused, tokenizer_dir, train_argv, command):
    argv = ["--use-tokenizer", "--tokenizer-dir", tokenizer_dir, "--run-name", "none"]
    refused(diffusion, argv, "weights/none_state_dict.pt")
    refused(diffusion, ["--run-name", "none"], "none_tokenizer")
