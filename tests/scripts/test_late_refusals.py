"""What a command refuses it refuses before it has written anything: late faults of one kind in one place."""

import shutil

import pytest
import torch

from model.checkpoint import load_checkpoint, write_archive
from scripts.engine.training.metrics import RunLog
from scripts.eval import likelihood
from scripts.train import train_pretrain, train_tokenizer


def test_a_tokenizer_is_not_trained_for_an_evaluation_that_cannot_be(refused, workspace):
    argv = ["--data", "corpus.jsonl", "--target-vocab-size", "300"]
    refused(train_tokenizer, [*argv, "--out", "tok", "--eval-data", "nowhere.jsonl"], "nowhere.jsonl")
    refused(train_tokenizer, [*argv, "--out", "corpus.jsonl/tok"], "--out")


def test_weights_to_start_from_are_not_deleted_by_overwrite(refused, workspace, pretrain_argv, weights_of_one_step):
    shutil.copytree(weights_of_one_step, workspace / "weights")
    source = ["--load-from", str(workspace / "weights" / "ar_state_dict.pt")]  # the same file by another path
    refused(train_pretrain, [*pretrain_argv, "--overwrite", *source], "--overwrite", "--run-name")


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda file: file["config"].pop("num_attention_heads"), "num_attention_heads is missing"),
        (lambda file: file["config"].update(hidden_act="tanh"), "--hidden-act must be one of"),
        (lambda file: file.update(average={}), "average"),
    ],
)
def test_a_checkpoint_that_leaves_things_open_is_refused(change, word, refused, eval_argv, workspace):
    path = workspace / "weights" / "dm_state_dict.pt"
    file = load_checkpoint(path)
    change(file)
    write_archive(path, file)
    refused(likelihood, eval_argv["likelihood"], word, path.name)


def test_foreign_weights_of_another_layout_are_refused(refused, workspace, pretrain_argv):
    torch.save({"decoder.embed_tokens.weight": torch.zeros(4, 4)}, "foreign.pt")
    refused(train_pretrain, [*pretrain_argv, "--load-from", "foreign.pt"], "foreign.pt", "embed_tokens")


def test_a_lost_log_is_not_counted_and_missed_aloud(tmp_path, capsys):
    """The next resume would otherwise keep lines of a future that was lost."""
    assert RunLog(tmp_path / "gone_log.jsonl", keep_lines=50).lines == 0
    assert "gone_log.jsonl has lost 50 of its 50 lines" in capsys.readouterr().err
    log = RunLog(tmp_path / "kept_log.jsonl")
    for step in range(3):
        log.write("train", step=step)
    assert RunLog(tmp_path / "kept_log.jsonl", keep_lines=2).lines == 2
    assert len((tmp_path / "kept_log.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err == ""
