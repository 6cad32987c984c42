"""Every flag that is typed has an effect, or the command is refused before anything is computed."""

import pytest

from scripts.eval import eval_diffusion, eval_minimind, likelihood
from scripts.train import diffusion, train_pretrain
from tests.scripts.commands import EVALS


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--target-vocab-size", "300"], ["--target-vocab-size", "--retrain-tokenizer"]),
        (["--iid-mask-eps", "0.5"], ["--iid-mask-eps"]),
        (["--retrain-tokenizer", "--no-use-tokenizer"], ["--retrain-tokenizer"]),
        (["--no-train"], ["--train"]),
        (["--no-use-tokenizer"], ["--tokenizer-dir"]),
        (["--retrain-tokenizer"], ["--tokenizer-dir"]),
        (["--mask-token", "<|another|>"], ["--mask-token has no effect without"]),
        (["--weights-path", "weights/dm.pt"], ["--weights-path"]),
    ],
)
def test_diffusion_refuses_flags_that_it_would_ignore(flags, words, diffusion_argv, refused):
    refused(diffusion, [*diffusion_argv, *flags], *words)


@pytest.mark.parametrize(
    "flags", [["--eval-interval", "7"], ["--save-interval", "7"], ["--jsonl-sep", "x"], ["--cache-dir", "x"]]
)
def test_generating_refuses_flags_of_training(flags, refused):
    refused(diffusion, ["--run-name", "dm", *flags], flags[0])


IGNORED = [
    (train_pretrain, ["--lr-schedule", "cosine", "--lr-stable-ratio", "0.5"], "--lr-stable-ratio"),
    (diffusion, ["--mask-schedule", "fixed_count", "--iid-mask-eps", "0.01"], "--iid-mask-eps"),
    (diffusion, ["--repeat-penalty-min-run", "3"], "--repeat-penalty-min-run"),
    (diffusion, ["--repeat-penalty-warmup-steps", "3"], "--repeat-penalty-warmup-steps"),
    (train_pretrain, ["--early-stop-min-delta", "0.5"], "--early-stop-min-delta"),
    (train_pretrain, ["--val-fraction", "0", "--early-stop-patience", "2"], "--early-stop-patience"),
]


@pytest.mark.parametrize("module, flags, word", IGNORED)
def test_a_flag_without_effect_is_refused(module, flags, word, train_argv, refused):
    """Every flag does what its name says or the combination is refused; none is ignored."""
    refused(module, [*train_argv["diffusion" if module is diffusion else "train_pretrain"], *flags], word)


@pytest.mark.parametrize(
    "name, flags, word",
    [
        ("eval_minimind", ["--max-new-tokens", "3"], "without --prompt"),
        ("eval_minimind", ["--ar-temperature", "0.5"], "without --prompt"),
        ("eval_minimind", ["--ar-top-k", "5"], "without --prompt"),
        ("eval_minimind", ["--gen-seed", "3"], "without --prompt"),
        ("eval_minimind", ["--nmc", "3"], "without a diffusion model"),
        ("eval_minimind", ["--val-fraction", "0.5"], "without --eval-split validation"),
        ("eval_diffusion", ["--gen-steps", "3"], "without a --prompt"),
        ("eval_diffusion", ["--gen-seed", "3"], "without a --prompt"),
        ("eval_diffusion", ["--max-new-tokens", "3", "--prompt", "a", "--cond-ll-response", "b"], "without a --prompt"),
        ("eval_diffusion", ["--cond-ll-nmc", "3"], "without --cond-ll-response"),
        ("eval_diffusion", ["--val-fraction", "0.5"], "without --eval-split validation"),
        ("likelihood", ["--val-fraction", "0.5"], "without --eval-split validation"),
        ("likelihood", ["--checkpoint", "weights/ar_state_dict.pt", "--nmc", "3"], "without a diffusion model"),
    ],
)
def test_an_evaluation_flag_without_effect_is_refused(name, flags, word, eval_argv, refused):
    refused(EVALS[name], [*eval_argv[name], *flags], f"has no effect {word}")


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval-batch-size", "3"],
        ["--eval-max-batches", "3"],
        ["--jsonl-field", "text"],
        ["--eval-split", "validation"],
        ["--val-fraction", "0.5"],
        ["--nmc", "3"],
        ["--eval-mask-ratio", "0.5"],
    ],
)
@pytest.mark.parametrize("name", ["eval_minimind", "eval_diffusion"])
def test_a_flag_of_the_evaluated_file_is_refused_without_one(name, flags, eval_argv, refused):
    if name == "eval_minimind" and flags[0] == "--eval-mask-ratio":
        return  # it has no such flag
    argv = eval_argv[name][: eval_argv[name].index("--eval-data")]
    refused(EVALS[name], [*argv, "--prompt", "a", *flags], "has no effect without")


def test_what_an_evaluation_needs(eval_argv, refused):
    refused(eval_minimind, ["--prompt", "a"], "--checkpoint")
    refused(eval_minimind, ["--checkpoint", "weights/ar_state_dict.pt"], "--prompt", "--eval-data")
    refused(likelihood, ["--checkpoint", "weights/ar_state_dict.pt"], "--eval-data")
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
