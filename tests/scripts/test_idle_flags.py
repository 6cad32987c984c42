"""Flags without effect because of what only the command knows: refused before anything is computed.

That every flag is refused which needs another one: test_every_flag.
"""

import pytest

from scripts.eval import benchmark, eval_diffusion, eval_minimind, likelihood, schedule_variance
from scripts.train import diffusion, train_pretrain
from tests.scripts.commands import EVALS

BAND = ["--mask-schedule", "iid_t", "--mask-rate-min", "0.3", "--mask-rate-max", "0.8", "--iid-mask-eps", "0.01"]


@pytest.mark.parametrize(
    "module, flags, words",
    [
        (diffusion, ["--no-use-tokenizer"], "--tokenizer-dir has no effect without --use-tokenizer"),
        (diffusion, ["--retrain-tokenizer"], "--tokenizer-dir has no effect with --retrain-tokenizer"),
        (diffusion, ["--mask-token", "<|x|>"], "--mask-token has no effect without a tokenizer that is trained here"),
        (diffusion, ["--jsonl-sep", "x"], "--jsonl-sep has no effect without character mode"),
        (diffusion, BAND, "--iid-mask-eps has no effect without a band of mask rates"),
        (diffusion, ["--weights-path", "weights/dm.pt"], "--weights-path"),
        (diffusion, ["--no-train"], "--train"),
        (train_pretrain, ["--jsonl-sep", "x"], "--jsonl-sep has no effect without character mode"),
        (train_pretrain, ["--val-fraction", "0", "--early-stop-patience", "2"], "--early-stop-patience"),
    ],
)
def test_training_refuses_flags_without_effect(module, flags, words, diffusion_argv, pretrain_argv, refused):
    refused(module, [*(diffusion_argv if module is diffusion else pretrain_argv), *flags], words)


@pytest.mark.parametrize("module", [benchmark, schedule_variance])
def test_a_separator_is_for_character_mode_alone(module, refused):
    refused(module, ["--jsonl-sep", "x"], "--jsonl-sep has no effect without character mode")


@pytest.mark.parametrize("name", ["eval_minimind", "likelihood"])
def test_an_autoregressive_model_draws_no_masks(name, eval_argv, refused):
    argv = [*eval_argv["eval_minimind"], "--nmc", "3"]
    refused(EVALS[name], argv, "--num-samples has no effect without a diffusion model")


def test_what_an_evaluation_needs(eval_argv, refused):
    refused(eval_minimind, ["--prompt", "a"], "--checkpoint")
    refused(eval_minimind, ["--checkpoint", "weights/ar_state_dict.pt"], "--prompt", "--eval-data")
    refused(likelihood, ["--checkpoint", "weights/ar_state_dict.pt"], "--eval-data")
    refused(likelihood, [*eval_argv["likelihood"], "--compile"], "--compile")
    diffusion_eval = eval_argv["eval_diffusion"]
    refused(eval_diffusion, [*diffusion_eval, "--cond-ll-response", "x"], "--prompt")
    refused(eval_diffusion, [*diffusion_eval, "--prompt", "a", "--cond-ll-response", ""], "empty")
    refused(
        eval_diffusion,
        ["--prompt", "a", "--eval-mask-ratio", "0.5"],
        "--eval-mask-ratio has no effect without --eval-data",
    )
    long = ["--prompt", "a" * 400, "--cond-ll-response", "b"]
    refused(eval_diffusion, [*diffusion_eval, *long], "--max-seq-len 256")
