"""Preference tuning from the command line: where it starts, what it learns, how it resumes, and what it refuses."""

import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.corpus.bundled import preferences
from model import import_weights
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ModelConfig
from scripts.engine.files import read_log
from scripts.engine.training.trainer import Trainer
from scripts.train import train_dpo_diffusion, train_dpo_minimind
from tests.scripts.conftest import without, write_rows
from tests.scripts.training.conftest import assert_same_run, send

RUNS = {"dpo_ar": (train_dpo_minimind, "ar"), "dpo_dm": (train_dpo_diffusion, "dm")}
RUNS["dpo_block"] = train_dpo_diffusion, "block"


@pytest.fixture
def dpo_argv(workspace, weights_of_one_step, tokenizer_dir, texts):
    """dpo_argv[name]: arguments of a tuning of 12 steps on pairs.jsonl, starting from weights in pretrained/."""
    rows = [{"prompt": t.split(": ")[0], "chosen": t.split(": ")[1][:30], "rejected": t[-9:]} for t in texts]
    write_rows(workspace / "pairs.jsonl", rows)
    shutil.copytree(weights_of_one_step, workspace / "pretrained")
    payload = load_checkpoint(workspace / "pretrained" / "dm_state_dict.pt")
    named = {name: payload[name] for name in ("weights", "tokenizer", "stage")}
    for kind in ("block", "joint"):
        config = replace(ModelConfig(**payload["config"]), attention=kind, block_size=8)
        save_checkpoint(workspace / "pretrained" / f"{kind}_state_dict.pt", config, **named)
    flags = (
        "--data pairs.jsonl --max-seq-len 40 --batch-size 4 --val-fraction 0.2 --dtype float32 --device cpu --lr 3e-3"
    )
    flags += " --max-iters 12 --warmup-steps 2 --log-interval 5 --eval-interval 4 --save-interval 3 --tokenizer-dir"
    return {
        name: [*flags.split(), tokenizer_dir, "--run-name", name, "--load-from", f"pretrained/{start}_state_dict.pt"]
        + (["--dpo-num-masks", "2"] if start != "ar" else [])
        for name, (_, start) in RUNS.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_that_it_starts_from_are_read_once(name, dpo_argv, command, monkeypatch):
    """Although they are the reference, too."""
    paths, read = [], import_weights.read_archive
    monkeypatch.setattr(import_weights, "read_archive", lambda path: paths.append(path) or read(path))
    assert command(RUNS[name][0], [*dpo_argv[name], "--max-iters", "1"]).code == 0
    assert len(paths) == 1
    tuned = load_checkpoint(f"weights/{name}.pt")
    assert (tuned["chat"], tuned["unit"]) == (True, "per pair")


@pytest.mark.parametrize("name, attention", [("dpo_ar", "causal"), ("dpo_dm", "joint")])
def test_joint_weights_are_tuned_as_either_kind(name, attention, dpo_argv, command):
    argv = [*dpo_argv[name], "--load-from", "pretrained/joint_state_dict.pt", "--max-iters", "1"]
    result = command(RUNS[name][0], argv)
    assert result.code == 0, result.err
    assert load_checkpoint(f"weights/{name}.pt")["config"]["attention"] == attention


def logged(name, event):
    return [row for row in read_log(Path(f"weights/{name}_log.jsonl")) if row["event"] == event]


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_which_replies_are_chosen(name, dpo_argv, command):
    """The rejected ones are cut off before their beginning: a rule that holds for pairs never seen."""
    argv = [*dpo_argv[name], "--eval-interval", "12"]
    result = command(RUNS[name][0], argv)
    assert result.code == 0, result.err
    assert "val loss 0." in result.out and "per pair" in result.out
    (end,) = logged(name, "eval")
    assert end["loss"] < 0.65 and end["accuracy"] > 0.7 and end["margin"] > 0.1
    assert end["chosen_gain"] > end["rejected_gain"]
    tuned = load_checkpoint(f"weights/{name}_state_dict.pt")
    started = load_checkpoint(argv[argv.index("--load-from") + 1])
    assert tuned["config"] == started["config"] and "dpo" in tuned["stage"]


@pytest.mark.parametrize("name", ["dpo_ar", "dpo_block"])
def test_a_run_that_was_stopped_equals_the_run_that_was_not(name, dpo_argv, command, at):
    module, argv = RUNS[name][0], [*dpo_argv[name], "--accumulation-steps", "2", "--max-iters", "8", "--dropout", "0.1"]
    assert command(module, [*argv, "--save-dir", "whole"]).code == 0
    at("_train_step", [5], send(signal.SIGTERM))
    assert command(module, [*argv, "--save-dir", "parts"]).code == 143
    again = command(module, [*argv, "--save-dir", "parts", "--resume", "must"])
    assert again.code == 0, again.err
    assert_same_run(name)


def test_the_reference_is_another_where_asked_for_and_does_not_learn(dpo_argv, command, monkeypatch):
    seen = {}
    original = Trainer.fit

    def spying(self):
        before = {name: tensor.clone() for name, tensor in self.objective.reference.state_dict().items()}
        original(self)
        after = self.objective.reference.state_dict()
        seen.update(same=all(torch.equal(after[name], value) for name, value in before.items()), weights=before)

    monkeypatch.setattr(Trainer, "fit", spying)
    argv = [*dpo_argv["dpo_dm"], "--max-iters", "2"]
    assert command(train_dpo_diffusion, argv).code == 0
    other = [*argv, "--run-name", "two", "--load-from", "weights/dpo_dm.pt"]
    assert command(train_dpo_diffusion, [*other, "--reference-from", "pretrained/dm_state_dict.pt"]).code == 0
    reference = load_checkpoint("pretrained/dm_state_dict.pt")["weights"]
    assert seen["same"] and all(torch.equal(seen["weights"][name], value) for name, value in reference.items())
    digests = {row["data"]["reference_sha256"] for run in ("dpo_dm", "two") for row in logged(run, "start")}
    assert len(digests) == 1


@pytest.mark.parametrize("name", RUNS)
def test_looking_first_shows_both_replies_of_a_pair_and_trains_nothing(name, dpo_argv, command):
    result = command(RUNS[name][0], [*dpo_argv[name], "--show-batch", "--dry-run"])
    assert result.code == 0, result.err
    shown = [line.split(":")[0] for line in result.out.splitlines() if line.startswith("row ")]
    assert len(shown) == 8 and shown[:4] == shown[4:] and "nothing was trained" in result.out
    assert ("masked of" in result.out) == (name != "dpo_ar") and not Path("weights").exists()


def test_the_bundled_pairs_are_there_without_data(dpo_argv, command, monkeypatch):
    rows = preferences()[:150]
    monkeypatch.setattr("dataset.corpus.bundled.FILES", {"preferences": lambda: rows})
    argv = dpo_argv["dpo_dm"][2:]
    result = command(train_dpo_diffusion, [*argv, "--max-seq-len", "96", "--eval-interval", "12"])
    assert result.code == 0 and "no --data, so the bundled pairs are used" in result.out
    (end,) = logged("dpo_dm", "eval")
    assert end["loss"] < 0.69 and end["accuracy"] > 0.55


# -- refusals ------------------------------------------------------------------------------------------------------

DM, AR, BLOCK = (f"pretrained/{kind}_state_dict.pt" for kind in ("dm", "ar", "block"))
REFUSED = {
    "AR weights": ("dpo_dm", f"--load-from {AR}", f"{AR} is autoregressive, which scripts.train.train_dpo_minimind"),
    "diffusion weights": ("dpo_ar", f"--load-from {BLOCK}", "which scripts.train.train_dpo_diffusion tunes"),
    "AR reference": ("dpo_dm", f"--reference-from {AR}", f"{AR} is autoregressive"),
    "AR weights, diffusion reference": ("dpo_dm", f"--reference-from {DM} --load-from {AR}", "attention full"),
    "reference of blocks": ("dpo_dm", f"--reference-from {BLOCK}", "attention block (the weights to tune have full)"),
    "own file": ("dpo_dm", "--reference-from weights/dpo_dm_best.pt", "a file that the run itself writes"),
    "no reference": ("dpo_dm", "--reference-from nowhere.pt", "there is no checkpoint nowhere.pt"),
    "no pairs": ("dpo_ar", "--data corpus.jsonl", "corpus.jsonl, row 1: expected the fields of a pair"),
    "text": ("dpo_ar", "--data corpus.txt", "expected rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused(kind, dpo_argv, refused):
    name, flags, words = REFUSED[kind]
    refused(RUNS[name][0], [*dpo_argv[name], *flags.split()], words)


def test_tuning_random_weights_or_resuming_with_another_reference_is_refused(dpo_argv, command, refused):
    argv = [*dpo_argv["dpo_dm"], "--max-iters", "2"]
    refused(train_dpo_diffusion, without(argv, "--load-from"), "--load-from is missing")
    assert command(train_dpo_diffusion, argv).code == 0
    other = [*argv, "--max-iters", "4", "--resume", "must", "--load-from", "weights/dpo_dm_copy.pt"]
    shutil.copy("weights/dpo_dm_state_dict.pt", "weights/dpo_dm_copy.pt")
    refused(train_dpo_diffusion, other, "weights/dpo_dm.pt was tuned against another reference")
    shutil.copy("pretrained/dm_state_dict.pt", "moved.pt")
    kept = command(train_dpo_diffusion, [*other, "--reference-from", "moved.pt"])
    assert kept.code == 0 and "--load-from was" in kept.out and "--reference-from was" in kept.out


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_that_is_shown_has_both_replies_after_their_context(name, dpo_argv, command):
    pair = {
        "system": "the river",
        "history": [["the cat", "sees"]],
        "prompt": "老朋友",
        "chosen": "likes",
        "rejected": "a",
    }
    write_rows("pairs.jsonl", [pair])
    said = (
        command(RUNS[name][0], [*dpo_argv[name], "--show-batch", "--max-seq-len", "128"])
        .out.replace("[", "")
        .replace("]", "")
    )
    for side in ("chosen", "rejected"):
        assert re.search(rf"row 0: {side} .*\n\(.*the river.*the cat.*sees.*老朋友.*\){pair[side]}<\|im_end\|>", said)
