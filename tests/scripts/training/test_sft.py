"""Fine-tuning: where it starts, what a step minimises, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.sft import DiffusionSFTData, SFTData, SFTDataset
from model.checkpoint import load_checkpoint, load_model
from model.forward_process import StepNoise
from model.masked_diffusion import MaskedDiffusion
from model.objective import NextToken
from scripts.engine.files import read_log
from scripts.engine.training.optim import SFTOptimConfig, lr_at
from scripts.engine.training.trainer import Trainer
from scripts.train import train_pretrain, train_sft_diffusion, train_sft_minimind
from tests.scripts.conftest import without

MODULES = {"sft_ar": train_sft_minimind, "sft_dm": train_sft_diffusion}


@pytest.fixture
def first_step(monkeypatch):
    """What the trainer holds when its first step begins: {"weights", "optimizers"}."""
    seen = {}
    original = Trainer._train_step

    def spying(self):
        if not seen:
            seen["weights"] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            seen["optimizers"] = [
                {"state": {k: {n: v.clone() for n, v in s.items()} for k, s in o.state_dict()["state"].items()}}
                for o in self.state.optimizers
            ]
        return original(self)

    monkeypatch.setattr(Trainer, "_train_step", spying)
    return seen


@pytest.mark.parametrize("name", MODULES)
def test_it_starts_from_every_tensor_of_the_pretrained_checkpoint(name, sft_argv, command, first_step):
    argv = sft_argv[name]
    assert command(MODULES[name], argv).code == 0
    pretrained = load_checkpoint(argv[argv.index("--load-from") + 1])["weights"]
    assert pretrained.keys() == first_step["weights"].keys()
    for tensor, value in pretrained.items():
        assert torch.equal(first_step["weights"][tensor], value), tensor
    tuned = load_checkpoint(f"weights/{name}_state_dict.pt")
    assert all(not torch.equal(tuned["weights"][t], v) for t, v in pretrained.items() if v.ndim == 2), "a frozen tensor"


@pytest.mark.parametrize("name", MODULES)
def test_it_learns_the_replies(name, sft_argv, command):
    argv = [*sft_argv[name], "--max-iters", "60", "--eval-interval", "60", "--eval-max-batches", "1"]
    result = command(MODULES[name], argv)
    assert result.code == 0, result.err
    losses = [e["loss"] for e in read_log(Path(f"weights/{name}_log.jsonl")) if e["event"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("size", [None, 0, 4, 8])
def test_weights_of_blocks_are_tuned_in_their_blocks_or_in_those_that_are_typed(size, sft_argv, command):
    module, argv = train_sft_diffusion, [*sft_argv["sft_dm"], "--no-quantize-effective-length", "--max-iters", "1"]
    assert command(module, [*argv, "--block-size", "8", "--run-name", "blocks"]).code == 0
    typed = [] if size is None else ["--block-size", str(size)]
    if size == 0:
        argv.remove("--no-quantize-effective-length")
    argv = [*argv, "--load-from", "weights/blocks_state_dict.pt", "--run-name", "again", *typed]
    result = command(module, argv)
    assert result.code == 0, result.err
    config = load_checkpoint("weights/again_state_dict.pt")["config"]
    expected = 8 if size is None else size
    assert (config["attention"], config["block_size"]) == ("block" if expected else "full", expected)


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(sft_argv, tokenizer, workspace):
    """rows(all_replies, **flags) -> the training rows of chats.jsonl."""

    def build(all_replies, **flags):
        config = (SFTData if all_replies else DiffusionSFTData)(
            data=workspace / "chats.jsonl", val_fraction=0.2, **{"max_seq_len": 40, **flags}
        )
        return SFTDataset(config, tokenizer, all_replies, rows_per_step=4).train

    return build


SCHEDULES = ["iid_t", "fixed_count"]
OBJECTIVES = {"sft_ar": NextToken(sequence_mean=True)} | {
    f"sft_dm-{name}": MaskedDiffusion(mask_schedule=name, sequence_mean=True, variable_length_prob=0.0)
    for name in SCHEDULES
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_batch_is_the_mean_of_its_rows_losses(name, rows, weights_of_one_step):
    objective, causal = OBJECTIVES[name], name == "sft_ar"
    model = load_model(weights_of_one_step / ("ar_state_dict.pt" if causal else "dm_state_dict.pt"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.ndim == 2 else 1)  # logits far from uniform
    source, visits = rows(causal), np.array([3, 0, 11, 7, 5])

    def loss(chosen, first_row):
        noise = StepNoise(1, 2, len(visits), first_row, width=40)
        with torch.no_grad():
            made = objective(model, source.batch(chosen), noise)
        return float(made.nats.sum() / made.count.sum())

    alone = [loss(visits[i : i + 1], i) for i in range(len(visits))]
    assert loss(visits, 0) == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert max(alone) > 1.05 * min(alone), "equal rows would prove nothing"


def test_the_diffusion_loss_of_a_row_is_equation_5_by_hand(rows, weights_of_one_step, tokenizer):
    """(1 / (t L')) sum over masked of -log p, L' the reply with its fill; t = k / L' for a fixed count."""
    model = load_model(weights_of_one_step / "dm_state_dict.pt")
    batch = rows(False, eos_fill=9).batch(np.array([3]))
    seen = []
    forward = model.forward
    model.forward = lambda ids, **more: seen.append(ids.clone()) or forward(ids, **more)
    with torch.no_grad():
        made = MaskedDiffusion(sequence_mean=True, variable_length_prob=0.0)(model, batch, StepNoise(1, 2, 1, width=40))
        ids, (noised,) = batch["input_ids"], seen
        masked = noised == tokenizer.mask_token_id
        assert torch.equal(noised[~masked], ids[~masked]) and not (masked & ~batch["loss_mask"]).any()
        real = int((batch["document_ids"] == 0).sum())
        logits = forward(noised[:, :real])[0]
        logits[:, tokenizer.mask_token_id] = -torch.inf
        nats = torch.nn.functional.cross_entropy(logits, ids[0, :real], reduction="none")[masked[0, :real]]
    length = int(batch["loss_mask"].sum())
    assert float(made.nats) == pytest.approx(float(nats.sum()) / (len(nats) / length * length), rel=1e-5)
    assert float(made.count) == 1


def test_validation_counts_the_reply_and_one_eos_but_pays_for_the_fill(rows, weights_of_one_step):
    model = load_model(weights_of_one_step / "dm_state_dict.pt")
    batch = rows(False, eos_fill=20).batch(np.arange(8))
    objective = MaskedDiffusion(sequence_mean=True).for_validation()
    with torch.no_grad():
        made = objective(model, batch, StepNoise(0, 0, 8, width=40))
        bare = {name: tensor for name, tensor in batch.items() if name != "fill"}
        other = objective(model, bare, StepNoise(0, 0, 8, width=40))
    replies = (batch["loss_mask"] & ~batch["fill"]).sum(dim=1).float()
    assert torch.equal(made.count, replies) and torch.equal(made.nats, other.nats)
    assert torch.equal(other.count, batch["loss_mask"].sum(dim=1).float()) and (other.count > made.count).any()


def test_autoregressive_validation_is_a_ratio_of_sums(rows, weights_of_one_step):
    model, batch = load_model(weights_of_one_step / "ar_state_dict.pt"), rows(True).batch(np.arange(6))
    with torch.no_grad():
        made = NextToken(sequence_mean=True).for_validation()(model, batch, StepNoise(0, 0, 6))
    assert torch.equal(made.count, batch["loss_mask"].sum(dim=1).float())


@pytest.mark.parametrize("name", MODULES)
def test_a_stage_minimises_the_mean_over_rows_on_rows_of_its_kind(name, sft_argv, command, monkeypatch, texts):
    seen = {}
    original = Trainer.__init__

    def spying(self, model, objective, dataset, *arguments):
        seen.update(objective=objective, rows=len(dataset.train))
        original(self, model, objective, dataset, *arguments)

    monkeypatch.setattr(Trainer, "__init__", spying)
    assert command(MODULES[name], [*sft_argv[name], "--val-fraction", "0", "--max-seq-len", "200"]).code == 0
    assert seen["objective"].sequence_mean
    two_exchanges = len(range(0, len(texts), 28))  # a seventh of the rows of the first format
    assert seen["rows"] == len(texts) + (two_exchanges if name == "sft_dm" else 0)


def test_a_bad_row_late_in_a_stream_loses_nothing_and_can_be_corrected(sft_argv, command, workspace, monkeypatch):
    monkeypatch.setattr("dataset.sft.CHUNK_CHARACTERS", 3000)  # read ahead
    good = "".join(f'{{"prompt": "q{i}", "response": "a{i}"}}\n' for i in range(500)) + " " * (1 << 20) + "\n"
    late = workspace / "late.jsonl"
    late.write_text(good + '{"prompt": "q"}\n')
    flags = "--data late.jsonl --streaming --steps-per-epoch 9 --save-interval 999 --eval-interval 999 --max-iters 160"
    argv = [*sft_argv["sft_ar"], *flags.split(), "--val-fraction", "0"]
    result = command(train_sft_minimind, argv)
    assert result.code == 2 and "late.jsonl, row 502: expected the fields" in result.err
    # A window is 50 steps of 4 rows, so the third one met the bad row.
    assert load_checkpoint(Path("weights/sft_ar.pt"))["step"] == 100
    late.write_text(good + '{"prompt": "q", "response": "a"}\n')
    assert command(train_sft_minimind, [*argv, "--resume", "must"]).code == 0
    late.write_text("\n" + good)
    result = command(train_sft_minimind, [*argv, "--resume", "must", "--max-iters", "170"])
    assert result.code == 2 and "other contents" in result.err


@pytest.mark.parametrize("name", MODULES)
def test_the_share_of_eos_among_the_targets_is_logged_and_told(name, sft_argv, command):
    result = command(MODULES[name], [*sft_argv[name], "--log-interval", "1"])
    assert "EOS is " in result.out and "% of what is learnt" in result.out
    logged = [event["eos_share"] for event in read_log(Path(f"weights/{name}_log.jsonl")) if event["event"] == "train"]
    assert len(logged) == 12 and all(0 < share < 1 for share in logged)


# -- the optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_moments_come_along_on_request(optimizer, sft_argv, pretrain_argv, command, first_step):
    assert command(train_pretrain, [*pretrain_argv, "--run-name", "first", "--optimizer", optimizer]).code == 0
    first_step.clear()
    argv = [*sft_argv["sft_ar"], "--optimizer", optimizer, "--weight-decay", "0.03", "--load-from", "weights/first.pt"]
    assert command(train_sft_minimind, [*argv, "--run-name", "without"]).code == 0
    assert all(not o["state"] for o in first_step["optimizers"])
    first_step.clear()
    assert command(train_sft_minimind, [*argv, "--run-name", "with", "--resume-optimizer-state"]).code == 0
    saved = load_checkpoint("weights/first.pt")["optimizers"]
    for mine, theirs in zip(first_step["optimizers"], saved, strict=True):
        assert mine["state"].keys() == theirs["state"].keys() and mine["state"]
        for key, state in theirs["state"].items():
            assert all(torch.equal(mine["state"][key][name], value) for name, value in state.items())
    ends = [load_checkpoint(f"weights/{name}.pt") for name in ("with", "without")]
    assert ends[0]["step"] == ends[1]["step"] == 12, "steps begin anew"
    groups = [o["param_groups"] for o in ends[0]["optimizers"]]
    assert {g["weight_decay"] for group in groups for g in group} == {0.03, 0.0}, "settings are those of the new run"
    weights = [end["weights"]["layers.0.mlp.up_proj.weight"] for end in ends]
    assert not torch.equal(*weights)


def test_the_final_decay_ratio_is_the_rest_of_the_stable_ratio():
    one = SFTOptimConfig(final_decay_ratio=0.3, min_lr_ratio=0.05, warmup_steps=10)
    other = SFTOptimConfig(lr_stable_ratio=0.7, min_lr_ratio=0.05, warmup_steps=10)
    rates = [lr_at(step, 110, one) for step in range(110)]
    assert rates == [lr_at(step, 110, other) for step in range(110)]
    assert rates[79] == max(rates) > rates[80] and rates[-1] == pytest.approx(0.05 * max(rates))


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {
    "moments without a run": ("sft_ar", "--resume-optimizer-state", "weights only"),
    "moments of another optimizer": (
        "sft_dm",
        "--load-from pretrained/dm.pt --resume-optimizer-state --optimizer muon",
        "--optimizer adamw",
    ),
    "cut rows": ("sft_dm", "--variable-length-prob 0.5", "--variable-length-prob"),
    "no conversations": ("sft_dm", "--data corpus.jsonl", "corpus.jsonl, row 1: expected the fields of a conversation"),
    "text": ("sft_ar", "--data corpus.txt", "expected rows"),
    "stream": ("sft_ar", "--streaming", "--steps-per-epoch"),
    "another name": ("sft_dm", "--mask-schedule random", "--mask-schedule random is fixed_count"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused(kind, sft_argv, refused):
    name, flags, words = REFUSED[kind]
    refused(MODULES[name], [*sft_argv[name], *flags.split()], words)


@pytest.mark.parametrize("name", MODULES)
def test_fine_tuning_random_weights_is_refused(name, sft_argv, refused):
    refused(MODULES[name], without(sft_argv[name], "--load-from"), "--load-from is missing")


def test_diffusion_may_start_from_autoregressive_weights(sft_argv, command):
    argv = [*sft_argv["sft_dm"], "--load-from", "pretrained/ar_state_dict.pt", "--max-iters", "2"]
    assert command(train_sft_diffusion, argv).code == 0
    assert load_checkpoint("weights/sft_dm_state_dict.pt")["config"]["attention"] == "full"
