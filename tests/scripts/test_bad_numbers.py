"""Settings that cannot be: one sentence that names the flag, exit code 2, nothing written. Ranges: test_every_flag."""

import pytest

from scripts.train import diffusion
from tests.scripts.commands import EVALS, TRAINS


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hidden-size", "33"], ["--hidden-size 33", "--num-attention-heads 4"]),
        (["--num-attention-heads", "32"], ["even"]),
        (["--num-key-value-heads", "3"], ["--num-key-value-heads 3"]),
        (["--max-seq-len", "100", "--max-position-embeddings", "64"], ["--max-seq-len", "100", "64"]),
        (["--epochs", "1", "--max-iters", "5"], ["--epochs", "--max-iters"]),
        (["--device", "quantum"], ["--device"]),
        (["--device", "meta"], ["--device"]),
        (["--device", "xpu"], ["--device"]),
        (["--dtype", "float16", "--device", "cpu"], ["--dtype float16"]),
        (["--run-name", "a/b"], ["--run-name"]),
        (["--run-name", ""], ["--run-name"]),
        (["--run-name", ".."], ["--run-name"]),
        (["--jsonl-field", ""], ["--jsonl-field"]),
        (["--jsonl-sep", "x"], ["--jsonl-sep"]),
        (["--nonsense", "3"], ["--nonsense"]),
    ],
)
@pytest.mark.parametrize("name", TRAINS)
def test_training_refuses_impossible_settings(name, flags, words, train_argv, refused):
    argv = train_argv[name]
    if "--epochs" not in flags:
        argv = [*argv, "--max-iters", "1"]
    refused(TRAINS[name], [*argv, *flags], *words)


@pytest.mark.parametrize("name", ["eval_minimind", "eval_diffusion"])
def test_a_prompt_and_its_continuation_longer_than_the_sequence(name, eval_argv, refused):
    argv = [*eval_argv[name], "--prompt", "the cat sees the dog", "--max-new-tokens", "30", "--seq-len", "32"]
    refused(EVALS[name], argv, "--max-new-tokens 30", "--max-seq-len 32")


@pytest.mark.parametrize("name", EVALS)
def test_an_evaluation_refuses_more_context_than_the_model_has(name, eval_argv, refused):
    argv = [*eval_argv[name], "--max-seq-len", "40000"]
    refused(EVALS[name], argv, "--max-seq-len", "40000")
    refused(EVALS[name], [*argv, "--eval-max-batches", "1"], "--max-seq-len", "40000")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--wsd-phase-ratios 0.5,0.5", ["--wsd-phase-ratios", "three"]),
        ("--wsd-phase-ratios 0.5,0.5,0.5", ["--wsd-phase-ratios", "add up to 1"]),
        ("--wsd-block-sizes-down 4,x", ["--wsd-block-sizes-down", "list of whole numbers"]),
        ("--wsd-block-sizes-up=", ["--wsd-block-sizes-up", "list of whole numbers"]),
        ("--block-size 4", ["--block-size", "--use-block-curriculum", "contradict"]),
        ("--mask-schedule wsd --wsd-min-mask-ratio 0.9 --wsd-max-mask-ratio 0.5", ["--wsd-min-mask-ratio 0.9"]),
        ("--mask-schedule wsd --wsd-warmup-ratio 0.7", ["--wsd-warmup-ratio 0.7", "together at most 1"]),
        ("--complementary-masks --mask-schedule iid_t", ["--complementary-masks needs --mask-schedule fixed_count"]),
        ("--gen-block-size 4", ["--gen-block-size 4 is not 32"]),
        ("--gen-cache dual", ["--gen-cache dual is not for this checkpoint of block diffusion"]),
        ("--wsd-phase-ratios 0.5,0.5,0", ["--wsd-phase-ratios", "the last above 0"]),
    ],
)
def test_block_diffusion_refuses_what_cannot_be(flags, words, diffusion_argv, refused):
    refused(diffusion, [*diffusion_argv, "--max-iters", "1", "--use-block-curriculum", *flags.split()], *words)
