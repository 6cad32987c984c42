"""Whatever a user gets wrong: one sentence that names it, exit code 2, nothing written."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dataset.pretrain import PretrainData
from dataset.tokenizer import save_tokenizer, train_bpe
from model.config import ModelConfig
from model.decode import DenoisingConfig, SamplingConfig
from model.objective import MaskedDiffusion
from scripts.engine import cli
from scripts.engine.evaluation import CheckpointConfig, DataEvalConfig
from scripts.engine.optim import OptimConfig
from scripts.engine.run import RunConfig
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.trainer import TrainerConfig
from scripts.eval import eval_diffusion, eval_minimind, likelihood
from scripts.train import diffusion, train_pretrain, train_tokenizer

EVALS = {"eval_minimind": eval_minimind, "eval_diffusion": eval_diffusion, "likelihood": likelihood}
TRAINS = {"train_pretrain": train_pretrain, "diffusion": diffusion}


@pytest.fixture
def train_argv(pretrain_argv, diffusion_argv):
    return {"train_pretrain": pretrain_argv, "diffusion": diffusion_argv}


@pytest.fixture
def eval_argv(workspace, weights_of_one_step, tokenizer_dir):
    """eval_argv[name]: arguments of an evaluation that works, on corpus.jsonl."""
    shutil.copytree(weights_of_one_step, workspace / "weights")
    more = ["--tokenizer-dir", str(tokenizer_dir), "--eval-data", "corpus.jsonl", "--dtype", "float32"]
    ar, dm = (["--checkpoint", f"weights/{run}_state_dict.pt", *more] for run in ("ar", "dm"))
    return {"eval_minimind": ar, "eval_diffusion": [*dm, "--nmc", "1"], "likelihood": [*dm, "--nmc", "1"]}


BAD_FILES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "has no rows"),
    "blank": (b"\n \n\n", "has no rows"),
    "wrong field": (b'{"text": "a"}\n{"content": "b"}\n', 'row 2: field "text" is missing; fields present: content'),
    "not a string": (b'{"text": 5}\n', 'row 1: field "text" is a number'),
    "null": (b'{"text": null}\n', 'row 1: field "text" is null'),
    "malformed": (b'{"text": "a"}\n{"text": "b\n', "row 2: not valid JSON"),
    "not an object": (b'["text"]\n', "row 1: expected an object"),
    "not UTF-8": (b'{"text": "a"}\n\n{"text": "\xff\xfe"}\n', "row 3: not UTF-8"),
    "half a pair": (b'{"text": "\\ud83d"}\n', "row 1"),
    "gzip by content": (b"\x1f\x8b\x08 and more\n", "gzip"),
    "only empty texts": (b'{"text": ""}\n{"text": ""}\n', "empty"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", TRAINS)
def test_training_on_a_bad_file(name, kind, train_argv, refused, workspace):
    content, words = BAD_FILES[kind]
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    refused(TRAINS[name], [*train_argv[name], "--data", "bad.jsonl"], "bad.jsonl", words)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_evaluating_a_bad_file(kind, eval_argv, refused, workspace):
    content, words = BAD_FILES[kind]
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], "--eval-data", "bad.jsonl"], "bad.jsonl", words)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_character_mode_and_tokenizer_training_on_a_bad_file(kind, refused, workspace, train_argv):
    content, words = BAD_FILES[kind]
    if kind == "only empty texts":
        words = "no text"
    if content is not None:
        (workspace / "bad.jsonl").write_bytes(content)
    refused(train_tokenizer, ["--data", "bad.jsonl", "--target-vocab-size", "300"], words)
    refused(diffusion, ["--train", "--data", "bad.jsonl", "--run-name", "x"], words)


@pytest.mark.parametrize(
    "name, words", [("data.csv", ".jsonl or .txt"), ("folder.jsonl", "directory"), ("data.jsonl.gz", "gzip")]
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


BAD_TOKENIZERS = {
    "missing": "does not exist",
    "empty": "holds no tokenizer.json",
    "no config": "holds no tokenizer_config.json",
    "not JSON": "tokenizer.json is not JSON",
    "cut short": "tokenizer.json is not JSON",
    "not a tokenizer": "tokenizer.json is not a tokenizer",
    "not UTF-8": "tokenizer_config.json is not JSON",
    "no EOS": "eos_token",
}


@pytest.fixture
def bad_tokenizer(workspace, tokenizer_dir):
    def make(kind):
        directory = workspace / "bad"
        if kind == "missing":
            return directory
        directory.mkdir()
        if kind == "empty":
            return directory
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((tokenizer_dir / name).read_bytes())
        main, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
        if kind == "no config":
            config.unlink()
        elif kind == "not JSON":
            main.write_text("hello")
        elif kind == "cut short":
            main.write_bytes(main.read_bytes()[:500])
        elif kind == "not a tokenizer":
            main.write_text('{"a": 1}')
        elif kind == "not UTF-8":
            config.write_bytes(b"\xff\xfe")
        else:
            config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
        return directory

    return make


@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_a_bad_tokenizer_directory(kind, bad_tokenizer, train_argv, eval_argv, refused):
    flags = ["--tokenizer-dir", bad_tokenizer(kind)]
    for name, module in TRAINS.items():
        refused(module, [*train_argv[name], "--run-name", "new", *flags], "bad", BAD_TOKENIZERS[kind])
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], *flags], "bad", BAD_TOKENIZERS[kind])


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


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


BAD_CHECKPOINTS = {
    "missing": None,
    "zero bytes": lambda good: b"",
    "text": lambda good: b"hello\n",
    "first half": lambda good: good[: len(good) // 2],
    "all but the end": lambda good: good[:-100],
    "code": lambda good: _file(Trap()),
    "tensor": lambda good: _file(torch.zeros(3)),
    "foreign dict": lambda good: _file({"epoch": 3, "note": "x"}),
}


def _file(value) -> bytes:
    torch.save(value, "made.tmp")
    content = Path("made.tmp").read_bytes()
    Path("made.tmp").unlink()
    return content


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint(kind, train_argv, eval_argv, refused, workspace):
    make = BAD_CHECKPOINTS[kind]
    if make is not None:
        (workspace / "bad.pt").write_bytes(make(Path("weights/ar_state_dict.pt").read_bytes()))
    for name, module in EVALS.items():
        refused(module, [*eval_argv[name], "--checkpoint", "bad.pt"], "bad.pt")
    for name, module in TRAINS.items():
        refused(module, [*train_argv[name], "--run-name", "new", "--load-from", "bad.pt"], "bad.pt")
    if make is not None:
        Path("weights/ar.pt").write_bytes((workspace / "bad.pt").read_bytes())
        for resume in ("must", "auto"):
            refused(train_pretrain, [*train_argv["train_pretrain"], "--resume", resume], "weights/ar.pt")
    assert not Path("sprung").exists()


def test_the_other_kind_of_checkpoint_names_the_command_for_it(eval_argv, refused):
    ar, dm = ["--checkpoint", "weights/ar_state_dict.pt"], ["--checkpoint", "weights/dm_state_dict.pt"]
    refused(eval_diffusion, [*eval_argv["eval_diffusion"], *ar], "ar_state_dict.pt", "scripts.eval.eval_minimind")
    refused(eval_minimind, [*eval_argv["eval_minimind"], *dm], "dm_state_dict.pt", "scripts.eval.eval_diffusion")


def test_generating_without_a_trained_run(refused, tokenizer_dir, train_argv, command):
    argv = ["--use-tokenizer", "--tokenizer-dir", tokenizer_dir, "--run-name", "none"]
    refused(diffusion, argv, "weights/none_state_dict.pt")
    refused(diffusion, ["--run-name", "none"], "none_tokenizer")


# -- values ------------------------------------------------------------------------------------------------------------


ZERO_MEANS_SOMETHING = {
    *("dropout", "weight_decay", "warmup_steps", "lr_stable_ratio", "min_lr_ratio", "grad_clip", "ema_decay", "seed"),
    *("early_stop_patience", "early_stop_min_delta", "variable_length_prob", "repeat_penalty_weight", "val_fraction"),
    *("repeat_penalty_delay_steps", "repeat_penalty_warmup_steps", "temperature", "top_k", "gen_block_size"),
    "rms_norm_eps",
}


def numeric(*groups) -> list[tuple[str, type]]:
    found = []
    for group in groups:
        for name, kind, _, _ in cli._flags(group):
            number = cli._conversion(kind).get("type")
            if number in (int, float):
                found.append((name, number))
    return found


TRAINING_NUMBERS = numeric(
    PretrainData, ModelConfig, OptimConfig, TrainerConfig, RunConfig, RuntimeConfig, MaskedDiffusion, SamplingConfig,
    DenoisingConfig, diffusion.DiffusionRun,
)  # fmt: skip
EVALUATION_NUMBERS = numeric(
    CheckpointConfig, DataEvalConfig, RuntimeConfig, SamplingConfig, DenoisingConfig, eval_diffusion.Request
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
    assert flag in said or name.replace("_", "-") in said or "early-stop" in said or value in said, said
    assert "math domain" not in said and "integer ratio" not in said and "cannot convert" not in said, said


@pytest.mark.parametrize("name, value", bad_numbers(EVALUATION_NUMBERS))
def test_an_evaluation_refuses_an_impossible_number(name, value, eval_argv, refused):
    flag = "--" + name.replace("_", "-")
    said = refused(eval_diffusion, [*eval_argv["eval_diffusion"], "--prompt", "a", f"{flag}={value}"])
    assert flag in said or name.replace("_", "-") in said, said


def test_every_group_of_a_command_is_covered_above():
    """A group added to a command must be added to the lists of numbers, too."""
    groups = {f.name for g in (OptimConfig, TrainerConfig, RunConfig, MaskedDiffusion, ModelConfig) for f in fields(g)}
    assert {name for name, _ in TRAINING_NUMBERS} & groups


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


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--target-vocab-size", "300"], ["--target-vocab-size", "--retrain-tokenizer"]),
        (["--iid-mask-eps", "0.5"], ["--iid-mask-eps"]),
        (["--retrain-tokenizer", "--no-use-tokenizer"], ["--retrain-tokenizer"]),
        (["--no-train"], ["--train"]),
        (["--no-use-tokenizer"], ["--tokenizer-dir"]),
        (["--retrain-tokenizer"], ["--tokenizer-dir"]),
        (["--mask-token", "<|another|>"], ["--mask-token"]),
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
    """cli.md: every flag does what its name says or the combination is refused; none is ignored."""
    refused(module, [*train_argv["diffusion" if module is diffusion else "train_pretrain"], *flags], word)


@pytest.mark.parametrize(
    "name, flags, word",
    [
        ("eval_minimind", ["--max-new-tokens", "3"], "--max-new-tokens"),
        ("eval_diffusion", ["--gen-steps", "3"], "--gen-steps"),
        ("eval_diffusion", ["--cond-ll-nmc", "3"], "--cond-ll-nmc"),
        ("eval_minimind", ["--nmc", "3"], "num-samples"),
    ],
)
def test_an_evaluation_flag_without_effect_is_refused(name, flags, word, eval_argv, refused):
    refused(EVALS[name], [*eval_argv[name], *flags], word)


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


def test_what_an_evaluation_needs(eval_argv, refused):
    refused(eval_minimind, ["--prompt", "a"], "--checkpoint")
    refused(eval_minimind, ["--checkpoint", "weights/ar_state_dict.pt"], "--prompt", "--eval-data")
    refused(likelihood, ["--checkpoint", "weights/ar_state_dict.pt"], "--eval-data")
    diffusion_eval = eval_argv["eval_diffusion"]
    refused(eval_diffusion, [*diffusion_eval, "--cond-ll-response", "x"], "--prompt")
    refused(eval_diffusion, [*diffusion_eval, "--prompt", "a", "--cond-ll-response", ""], "empty")
    refused(eval_diffusion, ["--prompt", "a", "--eval-mask-ratio", "0.5"], "--eval-mask-ratio needs --eval-data")
    long = ["--prompt", "a" * 400, "--cond-ll-response", "b"]
    refused(eval_diffusion, [*diffusion_eval, *long], "--max-seq-len 256")


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize("save_dir", ["file", "file/below"])
def test_a_save_dir_that_is_a_file_is_refused_before_anything_is_computed(
    name, save_dir, train_argv, refused, workspace
):
    (workspace / "file").write_text("x")
    refused(TRAINS[name], [*train_argv[name], "--save-dir", save_dir], "--save-dir", save_dir)
    assert not (workspace / "dataset").exists(), "the corpus was tokenised first"


def test_a_weights_path_that_is_a_directory_is_refused_before_training(train_argv, refused, workspace):
    (workspace / "folder").mkdir()
    refused(train_pretrain, [*train_argv["train_pretrain"], "--weights-path", "folder"], "--weights-path", "folder")


def test_a_result_file_that_cannot_be_written_is_refused_before_the_evaluation(eval_argv, refused, monkeypatch):
    monkeypatch.setattr(likelihood, "evaluate_file", lambda *a: pytest.fail("evaluated for nothing"))
    refused(likelihood, [*eval_argv["likelihood"], "--json", "missing/result.json"], "missing")


def test_a_cache_dir_that_is_a_file(train_argv, refused, workspace):
    (workspace / "file").write_text("x")
    refused(train_pretrain, [*train_argv["train_pretrain"], "--cache-dir", "file"], "file", "--cache-dir")


# -- what is no mistake ------------------------------------------------------------------------------------------------


def test_a_folder_with_spaces_and_chinese_characters(train_argv, command, eval_argv):
    argv = [
        *train_argv["train_pretrain"],
        "--save-dir",
        "我的 weights (2)",
        "--run-name",
        "运行 一",
        "--max-iters",
        "2",
    ]
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
def test_small_and_odd_corpora_train(name, rows, flags, train_argv, command, workspace, texts, jsonl):
    jsonl(workspace / "small.jsonl", texts[:rows])
    argv = [*train_argv[name], "--data", "small.jsonl", "--max-iters", "3", "--eval-interval", "1", *flags]
    if name == "diffusion" and "--max-seq-len" in flags:
        argv += ["--max-new-tokens", "1"]
    result = command(TRAINS[name], argv)
    assert result.code == 0, result.err
    assert_is_json(Path(f"weights/{argv[argv.index('--run-name') + 1]}_log.jsonl"))


def assert_is_json(log: Path) -> None:
    """JSON as others read it: without Python's NaN and Infinity."""
    for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{log} holds {constant}, which is not JSON"))


def test_a_step_without_anything_to_score_has_no_loss_rather_than_nan(train_argv, command):
    """Two tokens a row, a document a row: one of an odd length ends in a row of one token, which nothing predicts."""
    flags = ["--no-packing", "--max-seq-len", "2", "--batch-size", "1", "--log-interval", "1", "--max-iters", "300"]
    flags += ["--eval-interval", "300", "--save-interval", "300"]
    result = command(train_pretrain, [*train_argv["train_pretrain"], *flags])
    assert result.code == 0
    log = Path("weights/ar_log.jsonl")
    assert_is_json(log)
    losses = [json.loads(line).get("loss") for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    assert None in losses[1:]


def test_a_fraction_of_an_epoch_is_at_least_one_step(train_argv, command):
    argv = train_argv["train_pretrain"]
    argv = [a for i, a in enumerate(argv) if "--max-iters" not in (a, argv[i - 1])]
    result = command(train_pretrain, [*argv, "--epochs", "0.001"])
    assert result.code == 0 and "1 steps" in result.out


def test_a_diverged_run_ends_with_a_sentence_and_keeps_its_last_sound_weights(train_argv, command):
    """Weights of NaN are never what a later stage is given."""
    argv = [*train_argv["train_pretrain"], "--lr", "1e30", "--grad-clip", "0", "--warmup-steps", "0"]
    result = command(train_pretrain, [*argv, "--max-iters", "60"])
    assert_is_json(Path("weights/ar_log.jsonl"))
    for path in Path("weights").glob("*.pt"):
        weights = torch.load(path, weights_only=True)["weights"]
        assert all(t.isfinite().all() for t in weights.values()), path
    assert result.code == 2 and "learning-rate" in result.err


def test_a_sample_that_cannot_fit_is_refused_before_the_training(diffusion_argv, refused):
    """Not after it: the error would come when hours have been spent, and the exit code say that they failed."""
    refused(diffusion, [*diffusion_argv, "--max-new-tokens", "32"], "--max-new-tokens 32", "--max-seq-len 32")


def test_the_default_sample_fits_every_sequence_length(diffusion_argv, command):
    """--max-seq-len 64 alone is no mistake of the user's, although 128 new tokens are the default."""
    at = diffusion_argv.index("--max-new-tokens")
    result = command(diffusion, [*diffusion_argv[:at], *diffusion_argv[at + 2 :], "--max-iters", "1"])
    assert result.code == 0, result.err
