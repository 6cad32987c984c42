"""Character mode, and a tokenizer of the run's own: it is trained, used and kept with the run."""

from pathlib import Path

import pytest

from dataset.tokenizer import load_tokenizer
from model.checkpoint import load_checkpoint
from scripts.eval import eval_diffusion, likelihood
from scripts.train import diffusion, train_pretrain
from tests.scripts.conftest import without

TOKENIZER = Path("weights/chars_tokenizer")
GENERATE = ["--run-name", "chars", "--max-new-tokens", "6", "--gen-steps", "3", "--max-seq-len", "32"]


@pytest.fixture
def character_argv(workspace, tiny_flags, texts):
    """Character-level training on a .txt file: no tokenizer directory at all. other.txt has other characters."""
    (workspace / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    (workspace / "other.txt").write_text("Anderer Text, ohne die alten Zeichen.\n" * 50, encoding="utf-8")
    flags = [*without(tiny_flags, "--tokenizer-dir"), "--train", "--run-name", "chars", "--max-new-tokens", "4"]
    return [*flags, "--data", "corpus.txt"]


def test_character_mode_trains_and_generates(command, character_argv, texts, refused):
    assert command(diffusion, character_argv).code == 0
    assert len(load_tokenizer(TOKENIZER)) == 16 + len(set("\n".join(texts)))
    result = command(diffusion, [*GENERATE, "--prompt", "the cat"])
    assert result.code == 0 and result.out.startswith("the cat│")
    argv = ["--checkpoint", "weights/chars_state_dict.pt", "--tokenizer-dir", TOKENIZER, "--max-new-tokens", "4"]
    result = command(eval_diffusion, [*argv, "--prompt", "老朋友", "--eval-data", "corpus.txt"])
    assert result.code == 0 and "documents" in result.out
    refused(diffusion, [*GENERATE, "--prompt", "the € cat"], "€", "U+20AC")


def test_character_mode_resumes_with_its_own_tokenizer_and_generates_within_its_context(
    command, character_argv, refused
):
    argv = [*character_argv, "--max-position-embeddings", "32"]
    assert command(diffusion, [*argv, "--max-iters", "5"]).code == 0
    before = (TOKENIZER / "tokenizer.json").read_bytes()
    refused(diffusion, [*argv, "--resume", "must", "--mask-token", "<|other|>"], "--mask-token")
    assert command(diffusion, [*argv, "--resume", "must"]).code == 0
    assert (TOKENIZER / "tokenizer.json").read_bytes() == before
    assert load_checkpoint(Path("weights/chars.pt"))["step"] == 12
    refused(diffusion, [*GENERATE, "--max-seq-len", "33"], "--max-seq-len", "32")


def test_the_tokenizer_of_an_existing_run_outlives_previews_and_refused_commands(command, character_argv, refused):
    """With other data it would be another tokenizer, and the existing run worthless."""
    assert command(diffusion, [*character_argv, "--max-iters", "2"]).code == 0
    other = [*character_argv, "--data", "other.txt"]
    refused(diffusion, other, "--overwrite")
    refused(diffusion, [*other, "--overwrite", "--load-from", "missing.pt"], "missing.pt")
    before = (TOKENIZER / "tokenizer.json").read_bytes()
    for flag in ("--dry-run", "--show-batch"):
        assert command(diffusion, [*other, flag]).code == 0
        assert (TOKENIZER / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--prompt €", "U+20AC"),  # of the sample that closes a training
        ("--resume must", "--resume must"),
        ("--early-stop-patience 2 --val-fraction 0", "--early-stop-patience"),
        ("--save-dir corpus.txt", "--save-dir"),
    ],
)
def test_a_new_run_that_is_refused_or_looked_at_first_writes_no_tokenizer(
    flags, words, character_argv, refused, command
):
    refused(diffusion, [*character_argv, *flags.split()], words)
    for preview in ("--dry-run", "--show-batch"):
        assert command(diffusion, [*character_argv, preview]).code == 0
        assert not Path("weights").exists()


def test_a_retrained_tokenizer_is_accepted_by_every_other_command(command, tiny_flags):
    flags = "--train --use-tokenizer --retrain-tokenizer --run-name own --target-vocab-size 320 --max-new-tokens 4"
    assert command(diffusion, [*without(tiny_flags, "--tokenizer-dir"), *flags.split()]).code == 0
    own = ["--tokenizer-dir", "weights/own_tokenizer"]
    assert len(load_tokenizer(Path("weights/own_tokenizer"))) == 320
    use = ["--checkpoint", "weights/own_state_dict.pt", *own, "--eval-data", "corpus.jsonl", "--nmc", "1"]
    assert command(eval_diffusion, use).code == 0
    assert command(likelihood, use).code == 0
    assert command(train_pretrain, [*tiny_flags, *own, "--max-iters", "1", "--run-name", "ar"]).code == 0
