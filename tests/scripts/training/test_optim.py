"""Learning rates, optimizers, the moving average, clipping, and batches that are cut into several passes."""

import copy
import math
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.order import RowOrder
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import load_tokenizer
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.objective import NextToken
from model.transformer import Transformer
from scripts.engine.files import read_log
from scripts.engine.training.optim import MovingAverage, OptimConfig, lr_at, make_optimizers, scale_and_clip
from scripts.train import diffusion, train_pretrain
from tests.scripts.conftest import without
from tests.scripts.training.conftest import assert_same_run, send

configs = st.builds(
    OptimConfig,
    learning_rate=st.floats(1e-6, 10),
    lr_schedule=st.sampled_from(["wsd", "cosine"]),
    warmup_steps=st.integers(0, 30),
    lr_stable_ratio=st.floats(0, 0.9),
    min_lr_ratio=st.floats(0, 1),
)


@settings(max_examples=100, deadline=None)
@given(configs, st.integers(1, 100))
def test_the_learning_rate_rises_in_a_line_peaks_never_rises_again_and_ends_at_its_minimum(config, after):
    total = config.warmup_steps + after
    rates = [lr_at(step, total, config) for step in range(total)]
    for step in range(config.warmup_steps):
        assert rates[step] == pytest.approx(config.learning_rate * (step + 1) / config.warmup_steps)
    assert max(rates) <= config.learning_rate * (1 + 1e-12)
    falling = rates[max(config.warmup_steps - 1, 0) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(falling))
    # A stable phase that rounding stretches over all steps leaves none to fall in.
    if config.lr_schedule == "cosine" or round(after * config.lr_stable_ratio) < after:
        assert rates[-1] == pytest.approx(config.learning_rate * config.min_lr_ratio)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_learning_rate_is_a_function_of_the_step_and_defined_beyond_the_end(schedule):
    config = OptimConfig(learning_rate=1.0, lr_schedule=schedule, warmup_steps=5)
    once = [lr_at(step, 50, config) for step in range(60)]
    assert [lr_at(step, 50, config) for step in reversed(range(60))] == once[::-1]
    assert once[50:] == [pytest.approx(0.1)] * 10


def test_wsd_stays_at_the_peak_for_its_share_and_falls_by_equal_amounts():
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, lr_stable_ratio=0.6, min_lr_ratio=0.2)
    rates = [lr_at(step, 110, config) for step in range(110)]
    assert rates[9:70] == [1.0] * 61
    assert [a - b for a, b in pairwise(rates[69:])] == [pytest.approx(0.8 / 40)] * 40


def test_cosine_is_the_cosine():
    config = OptimConfig(learning_rate=2.0, lr_schedule="cosine", warmup_steps=0, min_lr_ratio=0.1)
    for step in range(40):
        share = (1 + math.cos(math.pi * (step + 1) / 40)) / 2
        assert lr_at(step, 40, config) == pytest.approx(2.0 * (0.1 + 0.9 * share))


def test_a_warmup_longer_than_the_run_never_reaches_the_peak():
    config = OptimConfig(learning_rate=1.0, warmup_steps=100)
    assert [lr_at(step, 10, config) for step in range(10)] == [pytest.approx((step + 1) / 100) for step in range(10)]


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}, {"qk_norm": True}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_optimised_once_and_norms_and_embedding_do_not_decay(shape, optimizer, tiny_model):
    """The embedding neither where it is the head, too; Muon has the matrices inside the layers, and only those."""
    model = tiny_model(**shape)
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer, weight_decay=0.3))
    groups = [(o, group) for o in optimizers for group in o.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    covered = [names[id(p)] for _, group in groups for p in group["params"]]
    assert sorted(covered) == sorted(names.values())
    for o, group in groups:
        for p in group["params"]:
            decays = p.ndim == 2 and names[id(p)] != "embed_tokens.weight"
            assert group["weight_decay"] == (0.3 if decays else 0.0), names[id(p)]
            matrix_in_layer = p.ndim == 2 and names[id(p)].startswith("layers.")
            assert isinstance(o, torch.optim.Muon) == (optimizer == "muon" and matrix_in_layer), names[id(p)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_autoregressive_training_leaves_the_row_of_the_mask_token_as_it_was(optimizer, tiny_model):
    """It never sees [MASK]; decay would shrink to nothing what diffusion then starts from."""
    model, ids = tiny_model(), torch.randint(4, 24, (4, 12))
    mask = model.config.mask_token_id
    ids[ids == mask] = 4
    before = model.embed_tokens.weight.detach().clone()
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer, weight_decay=0.5, learning_rate=0.1))
    for _ in range(5):
        model(ids, is_causal=True).square().mean().backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    after = model.embed_tokens.weight
    assert torch.equal(after[mask], before[mask]) and not torch.equal(after[4], before[4])


@pytest.mark.parametrize("tied", [False, True])
def test_the_moving_average_is_its_recursion_with_a_warmed_up_decay(tied, tiny_model):
    model = tiny_model(tie_embeddings=tied)
    average = MovingAverage(model, 0.3)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for n in range(1, 8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(model)
        decay = min(0.3, (1 + n) / (10 + n))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(average.shadow[name].double(), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_swapping_twice_is_the_identity_and_once_an_exchange(tied, tiny_model):
    model = tiny_model(tie_embeddings=tied)
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    weights, shadow = copy.deepcopy(model.state_dict()), copy.deepcopy(average.shadow)
    average.swap(model)
    assert all(torch.equal(p, shadow[name]) for name, p in model.named_parameters())
    average.swap(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(average.shadow[name], value) for name, value in shadow.items())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_scale_and_clip_is_scaling_and_then_torch_clipping(scale, max_norm, size):
    shapes = [(3, 4), (5,), (2, 2)]
    ours = [torch.zeros(s, requires_grad=True) for s in shapes]
    theirs = [torch.zeros(s, requires_grad=True) for s in shapes]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a) * size
        b.grad = a.grad * scale
    ours.append(torch.zeros(3, requires_grad=True))  # no gradient: left alone
    norm = scale_and_clip(ours, torch.tensor(scale), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
    torch.testing.assert_close(norm, expected)
    assert ours.pop().grad is None
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-12)


SPLITS = {
    "ar": (train_pretrain, []),
    "ar-no-packing": (train_pretrain, ["--no-packing"]),
    "iid_t": (diffusion, ["--mask-schedule", "iid_t", "--variable-length-prob", "0"]),
    "fixed_count-no-packing": (diffusion, ["--no-packing", "--variable-length-prob", "0"]),
    "random-no-packing": (diffusion, ["--mask-schedule", "random", "--no-packing", "--variable-length-prob", "0"]),
    "fixed_count-cut-short": (diffusion, ["--variable-length-prob", "1"]),
    "repeat-penalty": (diffusion, ["--repeat-penalty-weight", "1", "--repeat-penalty-min-run", "1"]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_one_batch_of_8_two_of_4_and_four_of_2_are_one_step(name, command, pretrain_argv, diffusion_argv):
    """With padding, too, where the passes of a step hold different numbers of tokens."""
    module, extra = SPLITS[name]
    argv = [*(pretrain_argv if module is train_pretrain else diffusion_argv), *extra]
    argv += ["--max-iters", "5", "--log-interval", "1", "--eval-interval", "5", "--eval-max-batches", "1000"]
    # AdamW divides by the gradient's own size, which makes rounding of a gradient near 0 a step of full length.
    argv += ["--lr", "1e-4"]
    logs, weights = [], []
    for size, passes in ((8, 1), (4, 2), (2, 4)):
        save_dir = f"batch{size}"
        result = command(module, [*argv, "--batch-size", size, "--accumulation-steps", passes, "--save-dir", save_dir])
        assert result.code == 0, result.err
        run = argv[argv.index("--run-name") + 1]
        logs.append([row for row in read_log(Path(f"{save_dir}/{run}_log.jsonl")) if row["event"] in ("train", "eval")])
        weights.append(load_checkpoint(Path(f"{save_dir}/{run}.pt"))["weights"])
    for log, tensors in zip(logs[1:], weights[1:], strict=True):
        for a, b in zip(logs[0], log, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=2e-6)
            if a["event"] == "train":
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
                assert b["tokens"] == a["tokens"]
            if "loss_by_rate" in a:
                for x, y in zip(a["loss_by_rate"], b["loss_by_rate"], strict=True):
                    assert (x is None and y is None) or y == pytest.approx(x, abs=1e-5)
        for key, tensor in weights[0].items():
            assert (tensors[key] - tensor).abs().max() < 1e-5, key


@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_follows_the_gradient_of_the_mean_over_scored_tokens(passes, command, pretrain_argv, tokenizer_dir):
    """Of all the tokens of all its passes; padding counts for nothing. One pass of plain autograd is the reference."""
    argv = [*pretrain_argv, "--no-packing", "--max-iters", "1", "--log-interval", "1", "--accumulation-steps", passes]
    assert command(train_pretrain, argv).code == 0
    logged = next(row for row in read_log(Path("weights/ar_log.jsonl")) if row["event"] == "train")
    data = PretrainData(data=Path("corpus.jsonl"), max_seq_len=32, packing=False, val_fraction=0.2)
    rows = PretrainDataset(data, load_tokenizer(tokenizer_dir)).train
    torch.manual_seed(1337)
    model = Transformer(ModelConfig(**load_checkpoint(Path("weights/ar.pt"))["config"]))
    count = 4 * passes
    batch = rows.batch(RowOrder(len(rows), 1337)(0, count))
    assert not batch["loss_mask"].all()
    result = NextToken()(model, batch, StepNoise(1337, 0, count))
    loss = result.nats.sum() / result.count.sum()
    loss.backward()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_validations_of_one_model_agree_whatever_the_seed_of_the_run(command, diffusion_argv, weights_of_one_step):
    """The masks of a validation belong to no run: losses of two seeds, and of two schedules, are one quantity."""
    losses = []
    for number, more in enumerate((["--seed", "1"], ["--seed", "2"], ["--mask-schedule", "iid_t"])):
        start = ["--load-from", str(weights_of_one_step / "dm_state_dict.pt"), "--lr", "1e-12", "--max-iters", "1"]
        assert command(diffusion, [*diffusion_argv, *start, "--run-name", f"v{number}", *more]).code == 0
        losses += [row["loss"] for row in read_log(Path(f"weights/v{number}_log.jsonl")) if row["event"] == "eval"]
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-6)


# -- a warm-up and the length of its run -----------------------------------------------------------------------


def rates_of(run: str) -> list[float]:
    return [row["lr"] for row in read_log(Path(f"{run}_log.jsonl")) if row["event"] == "train"]


@pytest.fixture
def short_argv(pretrain_argv):
    """Arguments of a run of 30 steps that logs each of them, without --warmup-steps, whose default is longer."""
    return [*without(pretrain_argv, "--warmup-steps"), "--max-iters", "30", "--log-interval", "1"]


def test_a_warmup_that_was_not_typed_is_a_tenth_of_a_short_run_and_stays_so(command, short_argv, at):
    """Also when the run is continued, with another length, too: what was settled is a setting like any other."""
    flags = [*short_argv, "--lr-schedule", "cosine"]
    whole = command(train_pretrain, [*flags, "--save-dir", "whole"])
    assert whole.code == 0 and "warm-up of 3 steps, a tenth of the run" in whole.out
    settled = OptimConfig(lr_schedule="cosine", warmup_steps=3)
    assert rates_of("whole/ar") == pytest.approx([lr_at(step, 30, settled) for step in range(30)])
    at("_train_step", [7], send(signal.SIGTERM))
    assert command(train_pretrain, [*flags, "--save-dir", "parts"]).code == 143
    assert command(train_pretrain, [*flags, "--save-dir", "parts", "--resume", "must"]).code == 0
    assert_same_run("ar")
    longer = [*flags, "--save-dir", "parts", "--resume", "must", "--max-iters", "60"]
    assert command(train_pretrain, longer).code == 0
    assert load_checkpoint(Path("parts/ar.pt"))["settings"]["warmup_steps"] == 3
    assert rates_of("parts/ar")[30:] == pytest.approx([lr_at(step, 60, settled) for step in range(30, 60)])


def test_a_typed_warmup_is_kept_however_long_and_a_run_that_has_one_goes_on_with_it(command, short_argv, at):
    """So do runs that were saved before defaults gave way to the length."""
    whole = command(train_pretrain, [*short_argv, "--warmup-steps", "200", "--save-dir", "whole"])
    assert whole.code == 0 and "ends within its warm-up of 200" in whole.out
    assert rates_of("whole/ar") == pytest.approx([1e-3 * (step + 1) / 200 for step in range(30)])
    at("_train_step", [7], send(signal.SIGTERM))
    assert command(train_pretrain, [*short_argv, "--warmup-steps", "200", "--save-dir", "parts"]).code == 143
    assert command(train_pretrain, [*short_argv, "--save-dir", "parts", "--resume", "must"]).code == 0
    assert_same_run("ar")
