"""A run that is stopped and continued is the run that was not; and one that cannot be continued is refused."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from scripts.engine.files import read_log
from scripts.engine.training.metrics import RunLog
from scripts.engine.training.trainer import Trainer
from scripts.train import diffusion, train_pretrain, train_sft_diffusion, train_sft_minimind
from tests.scripts.training.conftest import assert_same_run, send
from tests.soak.state import computed, difference, events

RUNS = {
    "ar": (train_pretrain, ""),
    "ar-muon-ema-tied": (train_pretrain, "--optimizer muon --ema-decay 0.9 --tie-embeddings"),
    "ar-everything": (
        train_pretrain,
        "--accumulation-steps 2 --ema-decay 0.9 --dropout 0.2 --no-packing --qk-norm --num-key-value-heads 2",
    ),
    "iid_t-everything": (
        diffusion,
        "--mask-schedule iid_t --accumulation-steps 2 --ema-decay 0.9 --dropout 0.2 --variable-length-prob 0.5 "
        "--repeat-penalty-weight 0.5 --repeat-penalty-min-run 1 --repeat-penalty-delay-steps 3 "
        "--repeat-penalty-warmup-steps 6",
    ),
    "fixed_count-muon": (diffusion, "--mask-schedule fixed_count --optimizer muon --dropout 0.1"),
    "llada2": (
        diffusion,
        "--mask-schedule wsd --time-weighted-loss --noise-schedule cosine --use-block-curriculum --topk-merge 2 "
        "--wsd-block-sizes-up 1,4 --wsd-block-sizes-down 8,4 --mask-embedding-noise 1 --mask-embedding-noise-steps 7 "
        "--accumulation-steps 2 --ema-decay 0.9 --edit-weight 0.5",
    ),
    "sft-ar": (train_sft_minimind, "--accumulation-steps 2 --resume-optimizer-state --load-from pretrained/ar.pt"),
    "sft-blocks": (
        train_sft_diffusion,
        "--block-size 4 --no-quantize-effective-length --complementary-masks --mask-rate-min 0.3 --mask-rate-max 0.8 "
        "--cap-weight 0.5 --dropout 0.1 --ema-decay 0.9 --lr-schedule cosine",
    ),
    "sft-streaming": (train_sft_diffusion, "--streaming --steps-per-epoch 5"),
    "joint": (
        diffusion,
        "--next-token-weight 0.5 --use-block-curriculum --wsd-block-sizes-up 1,4 --wsd-block-sizes-down 8,4 "
        "--accumulation-steps 2 --ema-decay 0.9 --variable-length-prob 0.5 --edit-weight 0.5 --edit-source self "
        "--edit-rounds 2",
    ),
    "sft-joint": (
        train_sft_diffusion,
        "--next-token-weight 0.3 --block-size 4 --no-quantize-effective-length --complementary-masks --streaming "
        "--steps-per-epoch 5 --edit-weight 1 --edit-source self --edit-rate 0.9",
    ),
}


@pytest.fixture
def runs(pretrain_argv, diffusion_argv, sft_argv):
    """runs[name] -> (module, argv) of a run of 12 steps."""
    base = {train_pretrain: pretrain_argv, diffusion: diffusion_argv}
    base |= {train_sft_minimind: sft_argv["sft_ar"], train_sft_diffusion: sft_argv["sft_dm"]}
    return {name: (module, base[module] + extra.split()) for name, (module, extra) in RUNS.items()}


WHOLE: dict[str, Path] = {}


@pytest.fixture
def whole(runs, command, tmp_path_factory):
    """whole(name) -> (module, argv); that run, uninterrupted, lies in whole/. It is trained once for all tests."""

    def provide(name):
        module, argv = runs[name]
        if name in WHOLE:
            shutil.copytree(WHOLE[name], "whole")
        else:
            assert command(module, [*argv, "--save-dir", "whole"]).code == 0
            WHOLE[name] = shutil.copytree("whole", tmp_path_factory.mktemp("runs") / name)
        return module, argv

    return provide


class Killed(BaseException):
    """What kill -9 looks like from inside."""


def kill():
    raise Killed


@pytest.fixture(autouse=True)
def _signals_are_harmless():
    """Outside the trainer's own handlers a signal of these tests fails the test instead of ending pytest."""

    def unexpected(number, frame):
        raise AssertionError(f"signal {number} arrived where the run does not listen for it")

    kept = {number: signal.signal(number, unexpected) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run_name(argv: list[str]) -> str:
    return argv[argv.index("--run-name") + 1]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_twice_by_signals_equals_the_run_that_was_not(name, whole, command, at):
    """Steps 5 and 7 are multiples of neither the save (3) nor the eval interval (4), 7 not of the log interval (5)."""
    module, argv = whole(name)
    at("_train_step", [5], send(signal.SIGTERM))
    at("_train_step", [7], send(signal.SIGINT))
    first = command(module, [*argv, "--save-dir", "parts"])
    assert first.code == 143 and "--resume must" in first.out and not first.err.count("Traceback")
    assert load_checkpoint(Path(f"parts/{run_name(argv)}.pt"))["step"] == 5
    second = command(module, [*argv, "--save-dir", "parts", "--resume", "must"])
    assert second.code == 130
    assert load_checkpoint(Path(f"parts/{run_name(argv)}.pt"))["step"] == 7
    assert command(module, [*argv, "--save-dir", "parts", "--resume", "auto"]).code == 0
    assert_same_run(run_name(argv))


KILLS = {
    "between the save and the validation of its step": ("save", [8], False),
    "right after a save": ("save", [9], False),
    "before a save": ("save", [9], True),
    "after a validation, whose log line and best weights are of a lost future": ("_validate", [8], False),
    "after one that drops weights which the last checkpoint lists among the best": ("_validate", [12], False),
    "two steps after a save": ("_train_step", [11], False),
    "before the weights are written, the average in place": ("write_weights", [12], True),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_continues_from_its_last_save_as_if_nothing_had_been(moment, whole, command, at):
    """Processes that are killed in truth are in test_crash.py."""
    module, argv = whole("llada2")
    method, steps, before = KILLS[moment]
    at(method, steps, kill, before)
    with pytest.raises(Killed):
        command(module, [*argv, "--save-dir", "parts"])
    assert command(module, [*argv, "--save-dir", "parts", "--resume", "must"]).code == 0
    assert_same_run(run_name(argv))


@pytest.mark.parametrize("number, code, step", [(signal.SIGINT, 130, 8), (signal.SIGTERM, 143, 12)])
def test_a_signal_during_validation_loses_nothing(number, code, step, whole, command, at):
    """The average of the weights, swapped in for the validation, must not be what is continued with; the last step has
    not been saved when it is validated."""
    module, argv = whole("ar-everything")
    at("_validate", [step], send(number), before=True)
    assert command(module, [*argv, "--save-dir", "parts"]).code == code
    assert command(module, [*argv, "--save-dir", "parts", "--resume", "must"]).code == 0
    assert_same_run("ar")


def test_a_signal_in_the_last_instant_before_the_check_is_saved_before_it_is_obeyed(runs, command, at):
    """Between the decision whether to save and the question whether to stop, the answer may change."""
    module, argv = runs["ar"]
    at("_stop_if_asked", [7], send(signal.SIGTERM), before=True)
    assert command(module, [*argv, "--save-dir", "parts"]).code == 143
    assert load_checkpoint(Path("parts/ar.pt"))["step"] == 7, "stopped at step 7, saved an earlier one"


@pytest.fixture
def validations(monkeypatch):
    """validations(losses): what the validations of the runs to come find, one after the other, by step."""

    def plan(by_step):
        original = Trainer._judge

        def judge(self, nats, counts, meter):
            loss = torch.tensor([by_step[self.step]], dtype=torch.float64)
            original(self, loss, torch.ones_like(loss), meter)

        monkeypatch.setattr(Trainer, "_judge", judge)

    return plan


@pytest.mark.parametrize("stopped_at", [None, 3, 7])
def test_small_improvements_add_up_and_are_kept_although_they_do_not_count(stopped_at, runs, command, at, validations):
    """The best loss takes every decrease; what an early stop compares with moves on decreases that count alone."""
    module, argv = runs["ar"]
    argv = [*argv, "--eval-interval", "1", "--early-stop-patience", "3", "--early-stop-min-delta", "0.1"]
    losses = [3.0, 2.96, 2.92, 2.88, 2.86, 2.84, 2.77, 2.76, 2.75, 2.74, 1.0, 1.0]  # 2.88 and 2.77 count
    validations({step: loss for step, loss in enumerate(losses, start=1)})
    if stopped_at:
        at("_train_step", [stopped_at], send(signal.SIGTERM))
        assert command(module, argv).code == 143
    assert command(module, [*argv, "--resume", "auto"]).code == 0
    state = load_checkpoint(Path("weights/ar.pt"))
    assert (state["step"], state["stop_loss"], state["bad_evals"]) == (10, 2.77, 3)
    assert (state["best_step"], state["best_loss"]) == (10, 2.74)
    assert load_checkpoint(Path("weights/ar_best.pt"))["step"] == 10
    log = [row for row in events(Path("weights/ar_log.jsonl")) if row["event"] == "eval"]
    assert [(row["loss"], row["best_loss"]) for row in log] == [(loss, loss) for loss in losses[:10]]


def test_the_last_step_is_saved_once_and_resuming_a_finished_run_changes_nothing(runs, command):
    module, argv = runs["ar"]
    for save_dir in ("whole", "parts"):
        result = command(module, [*argv, "--save-dir", save_dir])
        assert result.code == 0 and result.out.count("(step 12)") == 1
    again = command(module, [*argv, "--save-dir", "parts", "--resume", "must"])
    assert again.code == 0
    assert_same_run("ar")


def test_a_longer_target_continues_a_finished_run_in_batch_order_and_noise(runs, command):
    """With a constant learning rate, 6 steps and 6 more are 12: the schedule alone knows the total."""
    module, argv = runs["ar"]
    constant = [*argv, "--lr-stable-ratio", "1", "--eval-interval", "6"]
    assert command(module, [*constant, "--save-dir", "whole"]).code == 0
    assert command(module, [*constant, "--save-dir", "parts", "--max-iters", "6"]).code == 0
    more = command(module, [*constant, "--save-dir", "parts", "--resume", "must"])
    assert more.code == 0 and "--max-iters was 6, is 12" in more.out
    whole, parts = (computed(Path(folder, "ar.pt"))["weights"] for folder in ("whole", "parts"))
    assert difference(whole, parts) is None


def test_a_run_that_exists_is_neither_replaced_nor_continued_unless_it_can_be(runs, command, refused):
    module, argv = runs["ar"]
    must = [*argv, "--resume", "must"]
    refused(module, must, "--resume must", "weights/ar.pt")
    refused(module, [*argv, "--overwrite", "--resume", "auto"], "--overwrite", "--resume auto")
    assert command(module, [*argv, "--resume", "auto"]).code == 0
    refused(module, argv, "weights/ar.pt", "--resume must", "--overwrite", "--run-name")
    other_stage = [*runs["fixed_count-muon"][1], "--run-name", "ar", "--resume", "must"]
    refused(diffusion, other_stage, "scripts.train.train_pretrain", "--run-name", "--load-from")
    os.replace("weights/ar_state_dict.pt", "weights/ar.pt")
    refused(module, must, "weights only")


def test_overwrite_starts_anew_and_removes_the_old_files_before_its_first_step(runs, command, at):
    """A run that is killed before its first save must not leave another's files under its name."""
    module, argv = runs["ar"]
    assert command(module, argv).code == 0
    before = computed(Path("weights/ar.pt"))
    Path("weights/ar_loss.png").touch()
    again = [*argv, "--overwrite", "--seed", "5"]
    at("_train_step", [0], kill, before=True)
    with pytest.raises(Killed):
        command(module, again)
    assert {path.name for path in Path("weights").iterdir()} <= {"ar_log.jsonl", "ar.lock"}
    assert command(module, again).code == 0
    after = computed(Path("weights/ar.pt"))
    assert after["step"] == 12 and not torch.equal(after["weights"]["norm.weight"], before["weights"]["norm.weight"])
    assert [row["event"] for row in read_log(Path("weights/ar_log.jsonl"))].count("start") == 1


@pytest.mark.parametrize("suffix", ["_best.pt", "_state_dict.pt"])
def test_weights_without_their_run_are_not_replaced_unasked(suffix, runs, command, refused):
    module, argv = runs["ar"]
    assert command(module, [*argv, "--max-iters", "1"]).code == 0
    for other in {".pt", "_best.pt", "_state_dict.pt"} - {suffix}:
        Path(f"weights/ar{other}").unlink(missing_ok=True)
    Path(f"weights/ar{suffix}").touch()
    for resume in ("never", "auto"):
        refused(module, [*argv, "--resume", resume], f"weights/ar{suffix}", "--overwrite", "--run-name")
    assert command(module, [*argv, "--overwrite"]).code == 0


OTHERWISE = {
    "ar": "--learning-rate 0.5 --batch-size 3 --accumulation-steps 2 --seed 7 --hidden-size 64 --warmup-steps 3 "
    "--ema-decay 0.5 --optimizer muon --max-seq-len 16 --val-fraction 0.4 --dropout 0.5",
    "iid_t-everything": "--mask-schedule random",
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_resuming_with_another_setting_or_other_data_is_refused(name, runs, command, refused, at, workspace):
    module, argv = runs[name]
    at("_train_step", [2], send(signal.SIGTERM))
    assert command(module, argv).code == 143
    again, words = [*argv, "--resume", "must"], OTHERWISE[name].split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        refused(module, [*again, flag, value], f"{flag} was ", f", is {value}", "other settings")
    with (workspace / "corpus.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    refused(module, again, "corpus.jsonl")


def test_resuming_with_harmless_settings_works_and_is_told_where_numbers_may_change(runs, command, at):
    module, argv = runs["ar"]
    at("_train_step", [2], send(signal.SIGTERM))
    assert command(module, argv).code == 143
    changed = ["--max-iters", "9", "--log-interval", "1", "--save-interval", "2", "--eval-interval", "3"]
    result = command(module, [*argv, "--resume", "must", *changed])
    assert result.code == 0
    assert "--max-iters was 12, is 9" in result.out and "--eval-interval was 4, is 3" in result.out
    assert "--log-interval" not in result.out
    assert load_checkpoint(Path("weights/ar.pt"))["step"] == 9


@pytest.mark.parametrize("flag, old, new", [("--data", "corpus.jsonl", "moved.jsonl"), ("--tokenizer-dir", None, "t")])
def test_the_same_contents_in_another_place_are_the_same_run_and_told(
    flag, old, new, whole, command, at, workspace, tokenizer_dir
):
    """What counts is the content, whose hash is compared."""
    module, argv = whole("ar")
    at("_train_step", [2], send(signal.SIGTERM))
    assert command(module, [*argv, "--save-dir", "parts"]).code == 143
    old = old or tokenizer_dir
    (shutil.copytree if Path(old).is_dir() else shutil.copy)(old, new)
    result = command(module, [*argv, "--save-dir", "parts", "--resume", "must", flag, new])
    assert result.code == 0 and f"{flag} was {old}, is {new}" in result.out
    assert_same_run("ar")


def test_best_weights_score_the_loss_that_the_log_says(runs, command):
    """The best weights are those of the best validation, not of the save before or after it."""
    module, argv = runs["ar"]
    # A rate that grows until the loss rises again: the best weights are not the last.
    assert command(module, [*argv, "--lr", "100", "--warmup-steps", "1000", "--eval-interval", "1"]).code == 0
    best = min((row for row in events(Path("weights/ar_log.jsonl")) if row["event"] == "eval"), key=lambda r: r["loss"])
    saved = load_checkpoint(Path("weights/ar_best.pt"))
    assert (saved["step"], saved["best_loss"]) == (best["step"], best["loss"]) and best["step"] < 12
    again = ["--run-name", "again", "--load-from", "weights/ar_best.pt", "--lr", "1e-12", "--max-iters", "1"]
    assert command(module, [*argv, *again]).code == 0
    assert events(Path("weights/again_log.jsonl"))[-1]["loss"] == pytest.approx(best["loss"], abs=1e-5)


def test_a_line_separator_in_the_command_line_does_not_cut_the_log(runs, command, at, monkeypatch, plots):
    """The log holds the command, prompt and all; Unicode knows more line ends than a JSONL file does."""
    module, argv = runs["fixed_count-muon"]
    argv = [*argv, "--prompt", "the\u2028cat\u2029sees\x85him"]
    monkeypatch.setattr(sys, "argv", argv)
    at("_train_step", [6], send(signal.SIGTERM))
    first = command(module, argv)
    assert first.code == 143, first.err
    second = command(module, [*argv, "--resume", "must"])
    assert second.code == 0, second.err
    assert [row["step"] for row in read_log(Path("weights/dm_log.jsonl")) if row["event"] == "eval"] == [4, 8, 12]


def test_weights_to_start_from_are_not_deleted_by_overwrite(refused, workspace, pretrain_argv, weights_of_one_step):
    shutil.copytree(weights_of_one_step, workspace / "weights")
    source = ["--load-from", str(workspace / "weights" / "ar_state_dict.pt")]  # the same file by another path
    refused(train_pretrain, [*pretrain_argv, "--overwrite", *source], "--overwrite", "--run-name")


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
