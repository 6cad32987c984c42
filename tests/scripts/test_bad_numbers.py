"""Numbers and settings that cannot be: one sentence that names the flag, exit code 2, nothing written."""

import pytest

from dataset.pretrain import PretrainData
from model.config import ModelConfig
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from model.masked_diffusion import MaskedDiffusion
from scripts.engine import flags as declarations
from scripts.engine.likelihood.windows import DataEvalConfig
from scripts.engine.loaded import CheckpointConfig
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training.config import TrainerConfig
from scripts.engine.training.optim import OptimConfig
from scripts.engine.training.run import RunConfig
from scripts.eval import eval_diffusion, eval_minimind
from scripts.train import diffusion
from tests.scripts.commands import EVALS, TRAINS

ZERO_MEANS_SOMETHING = {
    *("dropout", "weight_decay", "warmup_steps", "lr_stable_ratio", "min_lr_ratio", "grad_clip", "ema_decay", "seed"),
    *("early_stop_patience", "early_stop_min_delta", "variable_length_prob", "repeat_penalty_weight", "val_fraction"),
    *("repeat_penalty_delay_steps", "repeat_penalty_warmup_steps", "gen_temp", "gen_top_k", "gen_block_size"),
    *("gen_repeat_penalty", "gen_cfg_scale", "ar_temperature", "ar_top_k", "ar_repeat_penalty"),
    *("rms_norm_eps", "gen_seed", "mask_rate_min", "block_size", "cap_weight", "mask_embedding_noise", "topk_merge"),
}


def numeric(*groups) -> list[tuple[str, type]]:
    found = []
    for group in groups:
        for flag in declarations.flags_of(group):
            number = {int: int, declarations._finite: float}.get(declarations._conversion(flag.kind).get("type"))
            if number:
                found.append((flag.name, number))
    return found


TRAINING_NUMBERS = numeric(
    PretrainData, ModelConfig, OptimConfig, TrainerConfig, RunConfig, RuntimeConfig, MaskedDiffusion, DenoisingConfig,
    ContinuationConfig, diffusion.DiffusionRun,
)  # fmt: skip
EVALUATION_NUMBERS = numeric(
    CheckpointConfig, DataEvalConfig, RuntimeConfig, ContinuationConfig, DenoisingConfig, eval_diffusion.Request
)


def bad_numbers(names: list[tuple[str, type]]) -> list[tuple[str, str]]:
    cases = []
    for name, kind in names:
        cases.append((name, "-1"))
        if name not in ZERO_MEANS_SOMETHING:
            cases.append((name, "0"))
        if kind is float:
            cases += [(name, "nan"), (name, "inf")]
    return cases


@pytest.mark.parametrize("name, value", bad_numbers(TRAINING_NUMBERS))
def test_training_refuses_an_impossible_number(name, value, diffusion_argv, refused):
    flag = "--" + name.replace("_", "-")
    argv = [*diffusion_argv, "--max-iters", "1"]
    if name == "epochs":
        argv = [a for i, a in enumerate(argv) if "--max-iters" not in (a, argv[i - 1])]
    if name == "target_vocab_size":
        argv = [a for i, a in enumerate(argv) if "--tokenizer-dir" not in (a, argv[i - 1])] + ["--retrain-tokenizer"]
    said = refused(diffusion, [*argv, f"{flag}={value}"])
    assert name.replace("_", "-") in said or (name == "target_vocab_size" and "vocabulary" in said), said
    assert not [word for word in ("math domain", "integer ratio", "cannot convert") if word in said], said


@pytest.mark.parametrize("name, value", bad_numbers(EVALUATION_NUMBERS))
def test_an_evaluation_refuses_an_impossible_number(name, value, eval_argv, refused):
    flag = "--" + name.replace("_", "-")
    more = {"val_fraction": ["--eval-split", "validation"], "cond_ll_nmc": ["--cond-ll-response", "b"]}.get(name, [])
    said = refused(eval_diffusion, [*eval_argv["eval_diffusion"], "--prompt", "a", *more, f"{flag}={value}"])
    assert name.replace("_", "-") in said, said


@pytest.mark.parametrize("name, value", bad_numbers(numeric(SamplingConfig)))
def test_autoregressive_sampling_refuses_an_impossible_number(name, value, eval_argv, refused):
    flag = "--" + name.replace("_", "-")
    said = refused(eval_minimind, [*eval_argv["eval_minimind"], "--prompt", "a", f"{flag}={value}"])
    assert flag in said, said


@pytest.mark.parametrize("module, covered", [(diffusion, TRAINING_NUMBERS), (eval_diffusion, EVALUATION_NUMBERS)])
def test_every_number_of_a_command_is_covered_above(module, covered, monkeypatch):
    """A group added to a command must be added to the lists of numbers, too."""
    groups = []
    monkeypatch.setattr(module, "parse_args", lambda text, *found, **more: groups.extend(found) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.main([])
    assert set(numeric(*groups)) == set(covered)
    assert {int, float} == {kind for _, kind in covered}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hidden-size", "33"], ["--hidden-size 33", "--num-attention-heads 4"]),
        (["--num-attention-heads", "32"], ["even"]),
        (["--num-key-value-heads", "3"], ["--num-key-value-heads 3"]),
        (["--max-seq-len", "100", "--max-position-embeddings", "64"], ["--max-seq-len", "100", "64"]),
        (["--max-seq-len", "1"], ["--max-seq-len"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--epochs", "1", "--max-iters", "5"], ["--epochs", "--max-iters"]),
        (["--seed", str(10**30)], ["--seed"]),
        (["--seed", str(2**63)], ["--seed"]),
        (["--rope-theta", "1"], ["--rope-theta"]),
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
@pytest.mark.parametrize("length", ["0", "1", "-5", "40000"])
def test_an_evaluation_refuses_an_impossible_length(name, length, eval_argv, refused):
    argv = [*eval_argv[name], f"--max-seq-len={length}"]
    refused(EVALS[name], argv, "--max-seq-len", length)
    refused(EVALS[name], [*argv, "--eval-max-batches", "1"], "--max-seq-len", length)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--wsd-phase-ratios 0.5,0.5", ["--wsd-phase-ratios", "three"]),
        ("--wsd-phase-ratios 0.5,0.5,0.5", ["--wsd-phase-ratios", "add up to 1"]),
        ("--wsd-block-sizes-up 1,0", ["--wsd-block-sizes-up"]),
        ("--wsd-block-sizes-down 4,x", ["--wsd-block-sizes-down", "list of whole numbers"]),
        ("--wsd-block-sizes-up=", ["--wsd-block-sizes-up", "list of whole numbers"]),
        ("--block-size 4", ["--block-size", "--use-block-curriculum", "contradict"]),
        ("--mask-schedule wsd --wsd-min-mask-ratio 0.9 --wsd-max-mask-ratio 0.5", ["--wsd-min-mask-ratio 0.9"]),
        ("--mask-schedule wsd --wsd-warmup-ratio 0.7", ["--wsd-warmup-ratio 0.7", "together at most 1"]),
        ("--mask-schedule wsd --mask-rate-max 0.5", ["--mask-rate-max", "--wsd-max-mask-ratio"]),
        ("--complementary-masks --mask-schedule iid_t", ["--complementary-masks needs --mask-schedule fixed_count"]),
        ("--time-weighted-loss", ["--time-weighted-loss has no effect without --mask-schedule wsd"]),
        ("--noise-schedule cosine", ["--noise-schedule has no effect without --mask-schedule iid_t or wsd"]),
        ("--gen-block-size 4", ["--gen-block-size 4 is not 32"]),
        ("--gen-cache dual", ["--gen-cache dual is not for this checkpoint of block diffusion"]),
        ("--wsd-phase-ratios 0.5,0.5,0", ["--wsd-phase-ratios", "the last above 0"]),
        ("--no-use-block-curriculum --block-size 1 --mask-rate-min 0.3", ["--mask-rate-min has no effect"]),
        ("--mask-embedding-noise-steps 5", ["has no effect without a positive --mask-embedding-noise"]),
    ],
)
def test_block_diffusion_refuses_what_cannot_be(flags, words, diffusion_argv, refused):
    refused(diffusion, [*diffusion_argv, "--max-iters", "1", "--use-block-curriculum", *flags.split()], *words)
