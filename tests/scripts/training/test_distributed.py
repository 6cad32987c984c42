"""Several processes learn what one learns, and act as one: one writes, all stop, none hangs."""

import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from model.checkpoint import load_checkpoint
from scripts.engine import runtime
from scripts.engine.files import read_log
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training import distributed
from scripts.engine.training.trainer import Trainer
from scripts.train import diffusion, train_pretrain
from tests.scripts.conftest import Result
from tests.scripts.training.conftest import send
from tests.soak.processes import PRELOAD, ROOT, Command, start_together

multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, __name__])


def begin(patch, rank):
    """What all processes of these tests do first: nothing has to survive a power cut."""
    os.fsync = lambda descriptor: None
    if patch:
        patch(rank)


@pytest.fixture
def processes(workspace):
    """processes(module, argv, patch=None, size=2) -> a Result of each; patch(rank) is called first in each of them."""

    def start(module, argv, patch=None, size=2):
        patches = [partial(begin, patch, rank) for rank in range(size)]
        commands = start_together(workspace, module.__name__, [str(a) for a in argv], patches)
        ended = [command.wait(60) for command in commands]
        assert all(process.code is not None for process in ended), "it hangs"
        return [Result(*process) for process in ended]

    return start


# The last batch of the validation rows has none for the second process; the steps' logs, saves and validations differ.
RUNS = {
    "ar": (train_pretrain, "--accumulation-steps 2 --ema-decay 0.9 --topk-merge 2 --save-interval 50"),
    "dm": (diffusion, "--accumulation-steps 2 --mask-schedule iid_t --variable-length-prob 0.5"),
    "half": (train_pretrain, "--run-name half --dtype bfloat16 --max-iters 4 --log-interval 1"),
    "muon": (
        diffusion,
        "--run-name muon --optimizer muon --max-iters 3 --log-interval 1 --block-size 4 --next-token-weight 0.5 "
        "--edit-weight 1 --edit-source self",
    ),
}


TOLERANCES = {"half": (1e-3, 2e-3), "muon": (1e-4, 5e-4)}  # of losses and of weights


@pytest.fixture
def runs(pretrain_argv, diffusion_argv):
    """runs[name] -> (module, argv) of a run of 12 steps."""
    base = {"ar": pretrain_argv, "dm": diffusion_argv, "half": pretrain_argv, "muon": diffusion_argv}
    return {name: (module, [*base[name], *more.split()]) for name, (module, more) in RUNS.items()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def alone(runs, command, kept):
    """alone(name) -> (losses, state) of the run that one process has trained, once for all tests."""

    def provide(name):
        module, argv = runs[name]
        if not (kept / f"{name}.pt").exists():
            assert command(module, [*argv, "--save-dir", kept]).code == 0
        return outcome(kept, name)

    return provide


def outcome(folder, name):
    """([(event, step, loss, gradient norm, tokens)], state) of a run in `folder`."""
    keys = "event", "step", "loss", "grad_norm", "tokens"
    log = [tuple(row.get(key) for key in keys) for row in read_log(Path(folder) / f"{name}_log.jsonl") if "loss" in row]
    return log, load_checkpoint(Path(folder) / f"{name}.pt")


def assert_same_learning(expected, found, tolerance, of_weights=None):
    for theirs, ours in zip(expected[0], found[0], strict=True):
        assert ours[:2] == theirs[:2] and ours[4] == theirs[4]
        assert ours[2:4] == pytest.approx(theirs[2:4], abs=tolerance), ours
    for name, tensor in expected[1]["weights"].items():
        assert torch.allclose(found[1]["weights"][name], tensor, rtol=0, atol=of_weights or tolerance), name


def write_nothing(rank):
    """The first process alone may; what another opens for writing is told on its standard error."""

    def told(event, arguments):
        inside = event == "open" and str(arguments[0]).startswith((os.getcwd(), "weights", "two"))
        if inside and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or event in ("os.rename", "os.remove"):
            print(event, arguments, file=sys.stderr)

    if rank:
        sys.addaudithook(told)


@pytest.mark.parametrize(
    "name, more", [("ar", ""), ("dm", ""), ("ar", "--fsdp"), ("half", "--fsdp"), ("muon", "--fsdp")]
)
def test_two_processes_learn_what_one_learns_and_one_of_them_writes_it(name, more, alone, runs, processes):
    module, argv = runs[name]
    first, second = processes(module, [*argv, "--save-dir", "two", *more.split()], write_nothing)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 processes" in first.out and not second.out and not second.complaints
    expected = alone(name)
    # bfloat16, and so Muon's iteration, magnifies what the order of sums does.
    assert_same_learning(expected, outcome("two", name), *TOLERANCES.get(name, (1e-4,)))
    assert expected[1].keys() == load_checkpoint(Path(f"two/{name}.pt")).keys()
    if name == "ar":
        merged = load_checkpoint(Path("two/ar_topk_merged.pt"))["weights"]
        assert merged.keys() == expected[1]["weights"].keys()
    elif module is diffusion:  # after the training the first process alone has gone on, with the whole model
        assert " forward passes, " in first.out


def stop_in(rank_asked, step, rank):
    """Process `rank_asked` gets SIGTERM, as all do when it is None, while it takes a step."""
    original = Trainer._update

    def signalled(self, *args):
        if self.step == step and rank_asked in (None, rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    Trainer._update = signalled


@pytest.mark.parametrize("rank_asked, more", [(None, []), (1, ["--fsdp"])])
def test_a_run_goes_on_with_another_number_of_processes(rank_asked, more, alone, runs, command, processes, at):
    """1 -> 2 -> 1. A signal to one process, or to all, ends all after the same step, which is saved."""
    module, argv = runs["ar"]
    at("_train_step", [5], send(signal.SIGTERM))
    assert command(module, [*argv, "--save-dir", "two"]).code == 143
    again = [*argv, "--save-dir", "two", "--resume", "must"]
    results = processes(module, [*again, *more], partial(stop_in, rank_asked, 7))
    assert [result.code for result in results] == [143, 143], results
    assert "stopped at step 8" in results[0].out and not results[1].out + results[1].err
    assert load_checkpoint(Path("two/ar.pt"))["step"] == 8
    assert command(module, again).code == 0
    assert_same_learning(alone("ar"), outcome("two", "ar"), 1e-5)


def count_reductions(rank):
    """Tells at the end how often gradients were exchanged."""
    wrap, counted = torch.nn.parallel.DistributedDataParallel, []

    def counting(module, **more):
        made = wrap(module, **more)

        def reduce(state, bucket):
            counted.append(1)
            return allreduce_hook(None, bucket)

        made.register_comm_hook(None, reduce)
        return made

    fit = Trainer.fit
    Trainer.fit = lambda self: (fit(self), print("reductions:", len(counted)))
    distributed.data_parallel = lambda module: counting(module, gradient_as_bucket_view=True)


def test_gradients_are_exchanged_once_a_step_however_many_micro_batches_it_has(runs, processes):
    module, argv = runs["ar"]
    argv = [*argv, "--max-iters", "3", "--accumulation-steps", "4"]
    assert "reductions: 3\n" in processes(module, argv, count_reductions)[0].out


def fail_in_a_step(rank):
    """The first process cannot take its fourth step."""
    original, calls = Trainer._update, iter(range(1, 100))

    def spoilt(self, *args):
        if next(calls) == 4 and rank == 0:
            raise OSError("process 0 cannot go on")
        return original(self, *args)

    Trainer._update = spoilt


def fail_in_the_data(rank):
    """The second process finds no rows for its fourth step of two micro-batches."""
    original = Trainer._micro_batches

    def spoilt(self):
        for number, item in enumerate(original(self)):
            if number == 6 and rank == 1:
                raise OSError("process 1 cannot go on")
            yield item

    Trainer._micro_batches = spoilt


@pytest.mark.parametrize("failing, fail, saved", [(0, fail_in_a_step, 2), (1, fail_in_the_data, 3)])
def test_an_error_of_one_process_is_told_once_and_ends_all(failing, fail, saved, runs, processes):
    """Where it is the data's, all save what was learnt before it."""
    module, argv = runs["ar"]
    results = processes(module, [*argv, "--save-interval", "2", "--eval-interval", "50"], fail)
    assert [result.code for result in results] == ([2, 1] if failing == 0 else [1, 2])
    said = "".join(result.err for result in results).splitlines()
    assert [line for line in said if not line.startswith("tokenised")] == [f"error: process {failing} cannot go on"]
    assert load_checkpoint(Path("weights/ar.pt"))["step"] == saved


def test_a_batch_that_does_not_divide_is_refused_once(runs, processes):
    module, argv = runs["ar"]
    results = processes(module, [*argv, "--batch-size", "5"])
    assert [result.code for result in results] == [2, 2]
    said = "".join(result.err for result in results)
    assert said.count("\n") == said.count("error: --batch-size 5") == said.count("2 processes") == 1


def test_sharding_without_torchrun_is_refused(runs, refused):
    module, argv = runs["ar"]
    refused(module, [*argv, "--fsdp"], "--fsdp", "torchrun")


@pytest.fixture
def second_of_three(monkeypatch):
    """What torchrun tells the second of three processes, on a machine of two GPUs."""
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_every_process_has_a_gpu_of_its_own(second_of_three, monkeypatch):
    for name in ("auto", "cuda"):
        assert RuntimeConfig(device=name, dtype="float32").torch_device == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="cuda:0 is one for all processes"):
        RuntimeConfig(device="cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than the 2 GPUs"):
        RuntimeConfig(device="cuda")


def test_torchrun_itself_starts_them(runs, workspace):
    """A command through the real launcher, up to its first step."""
    module, argv = runs["ar"]
    line = ["--nproc-per-node", "1", "-m", module.__name__, *argv, "--dry-run", "--fsdp"]
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = Command(workspace, "torch.distributed.run", line, environment=told).wait()
    assert done.code == 0, done.err
    assert "nothing was trained" in done.out and "Warning" not in done.err


def die_in_its_fifth_step(rank):
    """The second process is killed."""
    original = Trainer._update

    def killed(self, *args):
        if self.step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    Trainer._update = killed


def test_where_one_process_is_killed_the_other_says_so_in_one_sentence(runs, processes):
    """The second one here, the first in test_crash.py."""
    module, argv = runs["ar"]
    first, second = processes(module, [*argv, "--save-interval", "2"], die_in_its_fifth_step)
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    (sentence,) = (line for line in first.err.splitlines() if not line.startswith("tokenised"))
    assert sentence.startswith("error: another process of this training has ended") and "--resume" in sentence
    assert load_checkpoint(Path("weights/ar.pt"))["step"] == 4


def die_before(name, rank):
    """The second process is killed right before it calls a function of torch.distributed."""
    runtime.MEETING = timedelta(seconds=2)
    if rank:
        setattr(dist, name, lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("name", ["init_process_group", "new_group"])
def test_a_process_that_never_arrives_is_not_waited_for_all_day(name, runs, processes):
    module, argv = runs["ar"]
    first, second = processes(module, argv, partial(die_before, name))
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    assert "error: the 2 processes of this training have not all arrived within 2 seconds" in first.err
    assert "Traceback" not in first.err
