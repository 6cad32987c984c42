"""Every evaluation with every kind of checkpoint: it works, or the refusal holds a command or a flag that does."""

import io
import json
import re
import shlex
import shutil
import sys
from importlib import import_module

import pytest

from scripts import chat
from scripts.eval import (
    eval_diffusion,
    eval_minimind,
    eval_sft,
    eval_sft_one_prompt,
    likelihood,
    report,
    schedule_variance,
)
from scripts.train import train_dpo_minimind, train_pretrain, train_sft_minimind
from tests.scripts.conftest import write_rows
from tests.scripts.decoding.test_prompts_are_data import FILES
from tests.scripts.models import ready, save

KINDS = {"ar": "causal", "full": "full", "blocks": "block 3", "joint": "joint 3"}
STAGES = {
    "ar": ("train_pretrain", "train_sft_minimind", "train_dpo_minimind"),
    "full": ("diffusion", "train_sft_diffusion", "train_dpo_diffusion"),
    "blocks": ("diffusion", "train_sft_diffusion", "train_dpo_diffusion"),
    "joint": ("diffusion", "train_sft_diffusion", "train_dpo_diffusion"),
}
MODELS = [(kind, stage) for kind, stages in STAGES.items() for stage in stages]
SHORT = ["--max-new-tokens", "4"]
PROMPT, TEXT = ["--prompt", "a", *SHORT], ["--eval-data", "text.jsonl"]
CHATS = ["--eval-data", "chat.jsonl", "--max-new-tokens", "90"]
TAKES = {  # module, flag of the checkpoint, what else it needs, kinds that it works with
    "eval_minimind": (eval_minimind, "--checkpoint", PROMPT, ("ar", "joint")),
    "eval_diffusion": (eval_diffusion, "--checkpoint", PROMPT, ("full", "blocks", "joint")),
    "likelihood": (likelihood, "--checkpoint", TEXT, tuple(KINDS)),
    "chat": (chat, "--checkpoint", SHORT, tuple(KINDS)),
    "one prompt, AR": (eval_sft_one_prompt, "--minimind-checkpoint", PROMPT, ("ar", "joint")),
    "one prompt, diffusion": (eval_sft_one_prompt, "--diffusion-checkpoint", PROMPT, ("full", "blocks", "joint")),
    "eval_sft, AR": (eval_sft, "--minimind-checkpoint", CHATS, ("ar", "joint")),
    "report, diffusion": (report, "--diffusion-checkpoint", TEXT, ("full", "blocks", "joint")),
}


@pytest.fixture
def tried(workspace, tokenizer, tokenizer_dir, command, monkeypatch):
    """tried(module, argv) -> the result, with the flags that all commands have."""
    for form in ("text", "chat"):
        write_rows(f"{form}.jsonl", [FILES[form]])
    monkeypatch.setattr(report, "draw", lambda *a: [])

    def run(module, argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
        return command(module, [*argv, "--tokenizer-dir", str(tokenizer_dir), "--dtype", "float32", "--device", "cpu"])

    return run


@pytest.fixture
def made(tokenizer):
    """made(kind, stage) -> a file of such weights, whose name a shell wants quoted."""

    def build(kind, stage):
        path = f"weights/{kind} {stage}.pt"
        save(path, ready(tokenizer, KINDS[kind]), f"scripts.train.{stage}")
        return path

    return build


def named(complaint):
    """Module and flags of the command that a refusal holds."""
    found = re.search(r"uv run python -m (\S+) (.*)", complaint)
    return import_module(found[1]), shlex.split(found[2])


@pytest.mark.parametrize("kind, stage", MODELS)
@pytest.mark.parametrize("name", TAKES)
def test_a_checkpoint_is_used_or_the_refusal_says_how(name, kind, stage, tried, made):
    module, flag, more, kinds = TAKES[name]
    path = made(kind, stage)
    result = tried(module, [flag, path, *more])
    if kind in kinds:
        assert result.code == 0, result.err
        return
    assert result.code == 2 and path in result.err and result.err.count("\n") == 1
    if flag == "--checkpoint":
        instead, given = named(result.err)
        assert tried(instead, [*given, *more]).code == 0
    else:
        words = f"given as {flag}, is "
        assert words in result.err
        given = shlex.split(result.err.partition("; give it as ")[2])
        assert tried(module, [given[0], path, *more]).code == 0


def answers(path, tried):
    """The text that autoregressive weights write, and how likely they find one."""
    found = json.loads(tried(eval_minimind, ["--checkpoint", path, *PROMPT, *TEXT, "--json"]).out)
    return found["generation"]["text"], found["likelihood"]


def test_joint_weights_are_used_autoregressively_as_if_they_were_causal(tried, tokenizer):
    loaded = ready(tokenizer, "joint 3")
    save("joint.pt", loaded)
    likely = {
        way: tried(likelihood, ["--checkpoint", "joint.pt", *TEXT, "--write-as", way]).out
        for way in ("autoregressive", "diffusion")
    }
    loaded.model.config = loaded.model.config.as_kind("autoregressive")
    save("causal.pt", loaded)
    assert answers("joint.pt", tried) == answers("causal.pt", tried)
    assert (
        tried(likelihood, ["--checkpoint", "causal.pt", *TEXT]).out == likely["autoregressive"] != likely["diffusion"]
    )
    refused = tried(likelihood, ["--checkpoint", "causal.pt", *TEXT, "--write-as", "autoregressive"])
    assert refused.code == 2 and "--write-as has no effect" in refused.err


@pytest.mark.parametrize("kind", ["ar", "blocks"])
def test_schedules_are_compared_on_one_kind_alone_and_which_is_said(kind, tried, made, refused):
    path = made(kind, STAGES[kind][0])
    result = tried(schedule_variance, ["--checkpoint", path, "--data", "corpus.jsonl"])
    assert result.code == 2 and "a diffusion model without blocks, such as: uv run python -m scripts" in result.err


@pytest.mark.parametrize("module", [train_pretrain, train_sft_minimind, train_dpo_minimind])
def test_an_autoregressive_stage_refuses_weights_of_diffusion_and_names_the_stage_that_takes_them(module, tried, made):
    path = shutil.move(made("full", "diffusion"), "weights/full.pt")
    result = tried(module, ["--load-from", path, "--max-seq-len", "64"])
    assert result.code == 2, result
    instead, given = named(result.err.replace("--train --load", "--load"))
    assert instead.__name__.endswith("diffusion") and given[:2] == ["--load-from", path]
