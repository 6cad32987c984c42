"""What a training does about steps that it must not take, losses that jump, and memory that does not suffice."""

import math
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset.pretrain import PackedRows
from model.checkpoint import load_checkpoint, write_archive
from scripts.engine.files import read_log
from scripts.engine.training import loader
from scripts.engine.training.config import StageConfigs, TrainerConfig
from scripts.engine.training.guard import FEWEST, WINDOW, Health, smaller_batch
from scripts.engine.training.run import RunConfig
from scripts.engine.training.trainer import Trainer
from scripts.train import train_pretrain
from tests.scripts.commands import TRAINS


@pytest.fixture
def at_step(monkeypatch):
    """at_step({step: change}): in that step of the trainings to come change() is multiplied to the loss, or raises."""
    original = Trainer._loss

    def plan(changes):
        def spoilt(self, prepared):
            loss = original(self, prepared)
            return replace(loss, nats=loss.nats * changes.get(self.step + 1, lambda: 1)())

        monkeypatch.setattr(Trainer, "_loss", spoilt)

    return plan


def nan() -> float:
    return math.nan


def events(name: str, run: str = "ar") -> list[dict]:
    return [row for row in read_log(Path(f"weights/{run}_log.jsonl")) if row["event"] == name]


def stop() -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return 1


def weights(path: str) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_checkpoint(Path(path))["weights"].values()])


@pytest.mark.parametrize("flags", [(), ("--optimizer", "muon"), ("--ema-decay", "0.9")])
def test_a_step_that_is_not_finite_is_skipped_logged_with_its_rows_and_the_run_goes_on(
    flags, pretrain_argv, command, at_step
):
    """Also a run that is stopped behind it: what it was like to skip is saved, too."""
    at_step({7: nan})
    argv = [*pretrain_argv, *flags]
    result = command(train_pretrain, argv)
    assert result.code == 0, result
    assert [row["step"] for row in events("skipped")] == [7]
    assert "step 7: loss or gradient not finite" in result.out
    assert all(row["loss"] is not None and row["grad_norm"] is not None for row in events("train"))
    whole = weights("weights/ar.pt")
    assert whole.isfinite().all() and load_checkpoint(Path("weights/ar.pt"))["health"]["skipped"] == 1
    again = [*argv, "--save-dir", "parts", "--save-interval", "1", "--eval-interval", "50"]
    at_step({7: nan, 8: stop})
    assert command(train_pretrain, again).code == 143
    assert command(train_pretrain, [*again, "--resume", "must"]).code == 0
    assert torch.equal(weights("parts/ar.pt"), whole)


def test_the_rows_named_are_those_of_the_step(pretrain_argv, command, at_step, monkeypatch):
    asked = []
    original = Trainer.__init__

    def listening(self, *args, **kwargs):
        original(self, *args, **kwargs)
        batch = type(self.rows).batch
        monkeypatch.setattr(type(self.rows), "batch", lambda rows, i: asked.append(i.tolist()) or batch(rows, i))

    monkeypatch.setattr(Trainer, "__init__", listening)
    at_step({7: nan})
    argv = [*pretrain_argv, "--val-fraction", "0", "--accumulation-steps", "2"]
    assert command(train_pretrain, argv).code == 0
    assert events("skipped")[0]["rows"] == sorted(asked[12] + asked[13])


def test_what_a_skipped_step_would_have_changed_is_as_it_was(pretrain_argv, command, at_step):
    """With a learning rate that does not change, steps 1 to 6 and no step 7 are 7 steps of which the last is none."""
    argv = [*pretrain_argv, "--lr-stable-ratio", "1"]
    assert command(train_pretrain, [*argv, "--max-iters", "6", "--save-dir", "six"]).code == 0
    at_step({7: nan})
    assert command(train_pretrain, [*argv, "--max-iters", "7"]).code == 0
    six, seven = load_checkpoint(Path("six/ar.pt")), load_checkpoint(Path("weights/ar.pt"))
    assert (six["step"], seven["step"]) == (6, 7)
    assert torch.equal(weights("six/ar.pt"), weights("weights/ar.pt"))
    for number, moments in six["optimizers"][0]["state"].items():
        for name, value in moments.items():
            assert torch.equal(seven["optimizers"][0]["state"][number][name], value), name


def test_after_too_many_skipped_steps_the_run_stops_with_the_last_good_state_and_can_go_on(
    pretrain_argv, command, at_step
):
    at_step(dict.fromkeys(range(5, 100), nan))
    argv = [*pretrain_argv, "--max-skipped-steps", "3"]
    result = command(train_pretrain, argv)
    assert result.code == 2 and "3 steps in a row, to step 7" in result.err and "holds step 7" in result.err, result
    assert "--show-step 7" in result.err and not Path("weights/ar_state_dict.pt").exists()
    at_step({})
    assert command(train_pretrain, [*argv, "--resume", "must"]).code == 0
    assert [row["step"] for row in events("skipped")] == [5, 6, 7] and events("train")[-1]["loss"] is not None


def test_where_the_weights_themselves_are_spoilt_the_save_before_is_left(pretrain_argv, command, at_step, monkeypatch):
    """A streak that reaches the time of a save does not overwrite it, and a validation loss of NaN tells."""
    at_step(dict.fromkeys(range(5, 100), nan))
    monkeypatch.setattr(
        "scripts.engine.training.validation.Validation.__call__", lambda self, _: (torch.tensor([torch.nan]),) * 3
    )
    argv = [*pretrain_argv, "--max-skipped-steps", "3", "--eval-interval", "50"]
    result = command(train_pretrain, argv)
    assert (
        result.code == 2
        and "nor is the loss on the validation rows finite" in result.err
        and "holds step 3" in result.err
    ), result
    assert "--learning-rate" in result.err and load_checkpoint(Path("weights/ar.pt"))["step"] == 3


def test_without_validation_rows_an_earlier_save_is_left_and_with_none_the_weights_are_kept(
    pretrain_argv, command, at_step
):
    """For whether they are good cannot be told: the save before leads here again, and none is worse than these."""
    at_step(dict.fromkeys(range(5, 100), nan))
    argv = [*pretrain_argv, "--max-skipped-steps", "3", "--val-fraction", "0"]
    result = command(train_pretrain, argv)
    assert result.code == 2 and "holds step 4" in result.err and "spoilt" not in result.err, result
    result = command(train_pretrain, [*argv, "--run-name", "b", "--save-interval", "50", "--eval-interval", "50"])
    assert result.code == 2 and "b.pt holds step 7" in result.err, result


def test_stopped_before_anything_is_saved_it_does_not_say_how_to_continue(pretrain_argv, command, at_step):
    at_step({1: nan, 2: nan, 3: lambda: stop() * nan()})
    result = command(train_pretrain, pretrain_argv)
    assert result.code == 143 and "nothing is saved" in result.out and "--resume" not in result.out, result
    assert not Path("weights/ar.pt").exists()


def test_a_row_of_skipped_steps_counts_also_where_it_is_looked_at_late():
    """On a GPU flags are read with the log lines."""
    health = Health()
    for step, sound in enumerate([True] + [False] * 20 + [True] * 10, start=1):
        health.note(step, torch.tensor(sound))
    assert health.read() == [*range(2, 22)] and (health.longest, health.in_a_row, health.skipped) == (20, 0, 20)
    assert health.read() == [] and health.longest == 0


def test_float16_skips_what_overflows_by_its_scale_and_stops_where_there_is_none_left(
    pretrain_argv, command, monkeypatch
):
    scaler, update = torch.amp.GradScaler, Trainer._update
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**4))

    def spoilt(self, *arguments):
        if self.step >= 2:
            self.state.parameters[3].grad.fill_(math.nan)
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", spoilt)
    result = command(train_pretrain, [*pretrain_argv, "--max-skipped-steps", "3", "--max-iters", "30"])
    assert result.code == 2 and "3 steps in a row, to step 9" in result.err, result  # 16, 8, 4, 2, and then three at 1
    assert [row["step"] for row in events("skipped")] == [7, 8, 9]


def test_a_signal_is_heeded_while_the_data_hangs_and_what_was_learnt_is_saved(pretrain_argv, command, monkeypatch):
    assert command(train_pretrain, [*pretrain_argv, "--save-dir", "whole"]).code == 0
    fetch, go_on = PackedRows.batch, threading.Event()

    def hanging(self, indices):
        if not go_on.is_set() and threading.current_thread().name == "data" and next(calls) == 6:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            go_on.wait(20)
        return fetch(self, indices)

    calls = iter(range(1, 100))
    monkeypatch.setattr(PackedRows, "batch", hanging)
    monkeypatch.setattr(loader, "LAST_ITEM", 0.1)
    argv = [*pretrain_argv, "--eval-interval", "50", "--accumulation-steps", "1"]
    result = command(train_pretrain, argv)
    go_on.set()
    assert result.code == 143 and "stopped at step 5" in result.out, result
    assert command(train_pretrain, [*pretrain_argv, "--resume", "must"]).code == 0
    assert torch.equal(weights("weights/ar.pt"), weights("whole/ar.pt"))


@pytest.mark.parametrize("name, run", [("train_pretrain", "ar"), ("diffusion", "dm")])
def test_the_rows_of_a_skipped_step_can_be_looked_at(name, run, train_argv, command, at_step):
    at_step({7: nan})
    module, argv = TRAINS[name], train_argv[name]
    assert command(module, argv).code == 0
    shown = command(module, [*argv, "--show-batch", "--show-step", "7"])
    assert shown.code == 0, shown
    rows = [int(number) for number in re.findall(r"^row (\d+): ", shown.out, re.MULTILINE)]
    assert sorted(rows) == events("skipped", run)[0]["rows"] and len(rows) == 4


def test_nothing_is_saved_while_steps_are_being_skipped(pretrain_argv, command, at_step):
    at_step({2: nan, 3: nan})
    result = command(train_pretrain, pretrain_argv)
    assert result.code == 0 and "(step 3)" not in result.out and "(step 4)" in result.out


@pytest.mark.parametrize("unusual", [3.3, 1e4, float("inf")])
def test_a_loss_far_above_those_before_is_a_spike_and_noise_is_none(unusual):
    draw = torch.Generator().manual_seed(0)
    health = Health()
    usual = (3 - torch.arange(200) / 100 + 0.02 * torch.randn(200, generator=draw)).tolist()  # noisy and falling
    assert not any(health.spike(loss) for loss in usual)
    median, deviation = health.spike(unusual)
    assert 1 < median < 1.2 and 0 < deviation < 0.1
    few = Health()
    assert not any(few.spike(loss) for loss in [*usual[: FEWEST - 1], unusual])
    assert Health(health.state).spike(unusual) and len(health.state["recent"]) == WINDOW


def test_a_spike_is_logged_and_told(pretrain_argv, command, at_step):
    at_step({20: lambda: 1e5})
    result = command(train_pretrain, [*pretrain_argv, "--log-interval", "1", "--max-iters", "24"])
    assert result.code == 0 and "step 20: the training loss" in result.out
    (spike,) = events("spike")
    assert spike["step"] == 20 and spike["loss"] > 1000 > spike["median"] > 0


def out_of_memory():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("name, run", [("train_pretrain", "ar"), ("diffusion", "dm")])
def test_where_memory_ends_the_flags_told_go_on_with_the_same_training(name, run, train_argv, command, at_step):
    module, argv = TRAINS[name], train_argv[name]
    assert command(module, [*argv, "--save-dir", "whole"]).code == 0
    at_step({8: out_of_memory})
    result = command(module, argv)
    flags = "--batch-size 2 --accumulation-steps 2 --eval-max-batches 40"
    assert result.code == 2 and "out of memory after step 7" in result.err and flags in result.err, result
    assert "holds step 7" in result.err and "--resume must" in result.err
    at_step({})
    result = command(module, [*argv, *flags.split(), "--resume", "must"])
    assert result.code == 0 and "--batch-size was 4, is 2" in result.out, result
    torch.testing.assert_close(weights(f"weights/{run}.pt"), weights(f"whole/{run}.pt"), rtol=1e-4, atol=1e-6)
    whole, parts = (read_log(Path(f"{folder}/{run}_log.jsonl")) for folder in ("whole", "weights"))
    validated = [[row["loss"] for row in rows if row["event"] == "eval"] for rows in (whole, parts)]
    assert len(validated[0]) == 3 and validated[0] == pytest.approx(validated[1], rel=1e-5)


@given(st.integers(1, 96), st.integers(1, 8), st.integers(1, 50), st.integers(1, 8))
def test_a_smaller_batch_has_the_same_rows_in_a_step_and_in_a_validation(portion, times, evaluated, processes):
    trainer, run = TrainerConfig(portion * processes, times), RunConfig(eval_max_batches=evaluated)
    configs = StageConfigs(None, None, trainer, run, None, frozenset(), None)
    told = smaller_batch(configs, processes).split()
    if portion == 1:
        assert not told
        return
    size, steps, batches = map(int, told[1::2])
    assert size * steps == portion * processes * times and size * batches == portion * processes * evaluated
    assert size % processes == 0 and size <= portion * processes // 2


def test_a_run_saved_before_a_flag_existed_had_its_default(pretrain_argv, command, refused):
    assert command(train_pretrain, pretrain_argv).code == 0
    path = Path("weights/ar.pt")
    state = load_checkpoint(path)
    for name in ("max_skipped_steps", "grad_clip"):
        del state["settings"][name]
    write_archive(path, state)
    again = [*pretrain_argv, "--resume", "must", "--max-iters", "13"]
    refused(train_pretrain, [*again, "--grad-clip", "0.5"], "--grad-clip was 1.0, is 0.5")
    result = command(train_pretrain, again)
    assert result.code == 0 and "was None" not in result.out
