"""Places where nothing can be written; runs that diverge; and what only looks like a mistake and trains."""

import json
from pathlib import Path

import pytest
import torch

from model.checkpoint import final_weights
from model.transformer import Transformer
from scripts.eval import eval_minimind, eval_sft, likelihood
from scripts.train import diffusion, train_pretrain
from tests.scripts.commands import TRAINS
from tests.scripts.conftest import without, write_jsonl


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize("save_dir", ["file", "file/below"])
def test_a_save_dir_that_is_a_file_is_refused_before_anything_is_computed(
    name, save_dir, train_argv, refused, workspace
):
    (workspace / "file").write_text("x")
    refused(TRAINS[name], [*train_argv[name], "--save-dir", save_dir], "--save-dir", save_dir)
    assert not (workspace / "dataset").exists(), "the corpus was tokenised first"


@pytest.mark.parametrize(
    "flag, path",
    [
        ("--weights-path", "corpus.jsonl"),
        ("--weights-path", "weights/ar_log.jsonl"),
        ("--weights-path", "weights/ar_loss.png"),
        ("--weights-path", "weights/other.lock"),
        ("--weights-path", "folder"),
        ("--cache-dir", "corpus.jsonl"),
    ],
)
def test_a_path_that_is_data_a_folder_or_what_a_run_writes_for_itself(flag, path, pretrain_argv, refused, workspace):
    (workspace / "folder").mkdir()
    refused(train_pretrain, [*pretrain_argv, flag, path], flag, path)


@pytest.mark.parametrize("path", ["corpus.jsonl/result.json", "weights"])
@pytest.mark.parametrize("module", [likelihood, eval_sft])
def test_a_result_that_cannot_be_written_is_refused_before_the_evaluation(
    module, path, eval_argv, refused, workspace, monkeypatch
):
    argv = eval_argv["likelihood"]
    if module is eval_sft:
        argv = ["--diffusion-checkpoint", *argv[1 : argv.index("--nmc")]]
    monkeypatch.setattr(Transformer, "forward", lambda *a, **more: pytest.fail("evaluated for nothing"))
    refused(module, [*argv, "--json", path], "--json", path)


# -- what is no mistake ------------------------------------------------------------------------------------------------


def test_a_folder_with_spaces_and_chinese_characters(train_argv, command, eval_argv):
    place = ["--save-dir", "我的 weights (2)", "--run-name", "运行 一"]
    argv = [*train_argv["train_pretrain"], *place, "--max-iters", "2"]
    assert command(train_pretrain, argv).code == 0
    argv = [*eval_argv["eval_minimind"], "--checkpoint", "我的 weights (2)/运行 一_state_dict.pt"]
    assert command(eval_minimind, argv).code == 0


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize(
    "rows, flags",
    [
        (1, []),  # no validation
        (2, []),
        (3, ["--batch-size", "100"]),
        (3, ["--no-packing"]),
        (60, ["--val-fraction", "0"]),
        (60, ["--max-seq-len", "2"]),
        (3, ["--max-seq-len", "512"]),
    ],
)
def test_small_and_odd_corpora_train(name, rows, flags, train_argv, command, workspace, texts):
    write_jsonl(workspace / "small.jsonl", texts[:rows])
    argv = [*train_argv[name], "--data", "small.jsonl", "--max-iters", "3", "--eval-interval", "1", *flags]
    if name == "diffusion" and "--max-seq-len" in flags:
        argv += ["--max-new-tokens", "1"]
    result = command(TRAINS[name], argv)
    assert result.code == 0, result.err
    assert_is_json(Path(f"weights/{argv[argv.index('--run-name') + 1]}_log.jsonl"))


def assert_is_json(log: Path) -> list[dict]:
    """The log, read as others read JSON: without Python's NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{log} holds {constant}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_step_without_anything_to_score_has_no_loss_rather_than_nan(train_argv, command):
    """Two tokens a row, a document a row: one of an odd length ends in a row of one token, which nothing predicts."""
    flags = ["--no-packing", "--max-seq-len", "2", "--batch-size", "1", "--log-interval", "1", "--max-iters", "100"]
    flags += ["--eval-interval", "100", "--save-interval", "100"]
    result = command(train_pretrain, [*train_argv["train_pretrain"], *flags])
    assert result.code == 0
    assert None in [row.get("loss") for row in assert_is_json(Path("weights/ar_log.jsonl"))[1:]]


def test_a_fraction_of_an_epoch_is_at_least_one_step(train_argv, command):
    result = command(train_pretrain, [*without(train_argv["train_pretrain"], "--max-iters"), "--epochs", "0.001"])
    assert result.code == 0 and "1 steps" in result.out


DIVERGING = ["--lr", "1e30", "--grad-clip", "0", "--warmup-steps", "0", "--max-iters", "60"]


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--eval-interval", "1"],  # a validation right after the step that went too far, before a gradient tells
        ["--eval-interval", "1", "--early-stop-patience", "1"],  # a loss of NaN is no reason to end well
        ["--log-interval", "1", "--save-interval", "50", "--eval-interval", "50"],
        ["--log-interval", "50", "--save-interval", "50", "--eval-interval", "50", "--max-iters", "20"],
        ["--grad-clip", "1", "--ema-decay", "0.9"],
    ],
)
def test_a_diverged_run_ends_with_a_sentence_and_keeps_its_last_sound_weights(name, flags, train_argv, command):
    """Weights of NaN are never what a later stage is given, and no log holds them."""
    result = command(TRAINS[name], [*train_argv[name], *DIVERGING, *flags])
    assert result.code == 2 and "--learning-rate" in result.err.splitlines()[-1], result
    run = {"train_pretrain": "ar", "diffusion": "dm"}[name]
    assert_is_json(Path(f"weights/{run}_log.jsonl"))
    files = list(Path("weights").glob("*.pt"))
    assert Path(f"weights/{run}_state_dict.pt") not in files
    for path in files:
        assert all(t.isfinite().all() for t in final_weights(torch.load(path, weights_only=True)).values()), path


def test_a_sample_that_cannot_fit_is_refused_before_the_training(diffusion_argv, refused):
    """Not after it: the error would come when hours have been spent, and the exit code say that they failed."""
    refused(diffusion, [*diffusion_argv, "--max-new-tokens", "32"], "--max-new-tokens 32", "--max-seq-len 32")


def test_the_default_sample_fits_every_sequence_length(diffusion_argv, command):
    """--max-seq-len 64 alone is no mistake of the user's, although 128 new tokens are the default."""
    result = command(diffusion, [*without(diffusion_argv, "--max-new-tokens"), "--max-iters", "1"])
    assert result.code == 0, result.err
