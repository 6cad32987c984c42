"""model/checkpoint.py: what is written comes back exactly, what does not fit is named, and reading runs no code."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from model.checkpoint import (
    load_checkpoint,
    load_model,
    save_checkpoint,
    write_archive,
)
from model.config import ADJUSTABLE
from model.import_weights import starting_weights
from scripts.eval import eval_minimind, likelihood
from scripts.train import diffusion, train_pretrain


def edit(path: Path, change) -> None:
    """Rewrite a checkpoint after change(payload)."""
    payload = torch.load(path, weights_only=True)
    change(payload)
    write_archive(path, payload)


UNUSUAL = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "qk_norm": True,
    "hidden_act": "gelu",
    "rope_theta": 123.0,
    "rms_norm_eps": 1e-3,
    "attention": "full",
    "inference_rope_scaling": True,
    "rope_original_length": 16,
}


def test_a_file_rebuilds_its_model_without_any_flag_exactly(saved):
    """Heads, rotary base, norm epsilon and attention leave no trace in the shapes; they come from the file."""
    model, path = saved(**UNUSUAL)
    again = load_model(path)
    assert again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ids = torch.randint(4, 24, (2, 40))
    assert torch.equal(again(ids), model(ids))


def test_loading_costs_the_caller_no_random_number(saved):
    _, path = saved()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(path)
    assert torch.equal(torch.rand(4), expected)


def test_every_file_of_a_run_holds_tensors_and_built_in_types_only(command, diffusion_argv):
    argv = [*diffusion_argv, "--max-iters", "2", "--ema-decay", "0.5", "--optimizer", "muon"]
    assert command(diffusion, argv).code == 0
    plain = (dict, list, tuple, str, int, float, bool, type(None))

    def check(value, where):
        if isinstance(value, torch.Tensor):
            return
        assert type(value) in plain, (where, type(value))
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) in (str, int), (where, key)
                check(item, f"{where}/{key}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                check(item, f"{where}/{i}")

    files = sorted(Path("weights").glob("*.pt"))
    assert [f.name for f in files] == ["dm.pt", "dm_best.pt", "dm_state_dict.pt"]
    for file in files:
        payload = torch.load(file, weights_only=True)
        payload["weights"] = dict(payload["weights"])  # torch's state_dict is an OrderedDict, which it reads itself
        check(payload, file.name)


@pytest.mark.parametrize("fault", ["missing", "extra", "transposed", "wider"])
def test_one_wrong_tensor_is_named_with_both_shapes(fault, saved):
    name = "layers.1.mlp.gate_proj.weight"
    _, path = saved()

    def change(payload):
        weights = payload["weights"]
        if fault == "missing":
            del weights[name]
        elif fault == "extra":
            weights["layers.2.mlp.gate_proj.weight"] = weights[name]
        elif fault == "transposed":
            weights[name] = weights[name].T.contiguous()
        else:
            weights[name] = torch.zeros(65, 32)

    edit(path, change)
    said = {
        "missing": f"{name} is missing",
        "extra": "layers.2.mlp.gate_proj.weight is unknown",
        "transposed": rf"{name} has shape \(32, 64\), the model \(64, 32\).*--intermediate-size",
        "wider": rf"{name} has shape \(65, 32\), the model \(64, 32\).*--intermediate-size",
    }[fault]
    with pytest.raises(ValueError, match=f"model.pt.*{said}"):
        load_model(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p.update(format="another"), "not a nano-llada checkpoint"),
        (lambda p: p.pop("format"), "not a nano-llada checkpoint"),
        (lambda p: p.update(version=99), "version 99"),
        (lambda p: p.pop("config"), "config"),
        (lambda p: p.pop("weights"), "weights"),
        (lambda p: p.pop("tokenizer"), "tokenizer"),
        (lambda p: p["config"].update(colour="blue"), "colour"),
        (lambda p: p["config"].update(hidden_size=0), "hidden-size"),
        (lambda p: p["config"].update(attention="sideways"), "sideways"),
        (lambda p: p.update(config=[1, 2]), "config"),
        (lambda p: p["config"].update(hidden_size="32"), "hidden_size"),
        (lambda p: p["config"].pop("num_attention_heads"), "num_attention_heads is missing"),
        (lambda p: p["config"].update(hidden_act="tanh"), "--hidden-act must be one of"),
        (lambda p: p.update(average={}), "average"),
        (lambda p: p.update(weights=[1, 2]), "weights"),
        (lambda p: p["weights"].update({"norm.weight": "text"}), "norm.weight"),
    ],
)
def test_a_changed_file_is_refused_with_its_name_and_the_reason(change, words, saved):
    _, path = saved()
    edit(path, change)
    with pytest.raises(ValueError, match=f"(?s)(?=.*{words})(?=.*model.pt)"):
        load_model(path)


@pytest.mark.parametrize(
    "stage, chat, unit",
    [
        ("scripts.train.diffusion", False, "nats per token"),
        ("scripts.train.train_sft_diffusion", True, "nats per token"),
        ("scripts.train.train_dpo_minimind", True, "per pair"),
    ],
)
def test_chat_and_unit_are_saved_and_of_older_files_known_by_their_stage(stage, chat, unit, saved):
    _, path = saved()
    edit(path, lambda p: p.update(stage=stage))
    older = load_checkpoint(path)
    assert (older["chat"], older["unit"]) == (chat, unit)
    edit(path, lambda p: p.update(chat=not chat, unit="bits"))
    newer = load_checkpoint(path)
    assert (newer["chat"], newer["unit"]) == (not chat, "bits")


def test_another_tokenizer_is_refused(saved):
    _, path = saved()
    assert load_model(path, tokenizer="abc")
    with pytest.raises(ValueError, match="model.pt.*another tokenizer.*--tokenizer-dir"):
        load_model(path, tokenizer="abd")


def test_a_tied_head_comes_back_tied_and_a_head_of_its_own_is_not_tied_silently(saved):
    model, path = saved(tie_embeddings=True)
    again = load_model(path)
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    edit(path, lambda p: p["weights"].update({"lm_head.weight": torch.zeros(24, 32)}))
    with pytest.raises(ValueError, match="head of its own"):
        load_model(path)


def test_a_failed_save_leaves_the_old_file_whole(saved, monkeypatch):
    model, path = saved()
    before = path.read_bytes()

    def fail_half_way(payload, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError):
        save_checkpoint(path, model.config, model.state_dict(), tokenizer="abc", stage="test")
    assert path.read_bytes() == before
    assert not [p for p in path.parent.iterdir() if p.suffix == ".pt" and p != path]
    monkeypatch.undo()
    save_checkpoint(path, model.config, model.state_dict(), tokenizer="abd", stage="test")
    assert load_checkpoint(path)["tokenizer"] == "abd"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]


def test_a_full_disk_during_training_is_one_sentence(command, pretrain_argv, monkeypatch):
    def fail(payload, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    result = command(train_pretrain, pretrain_argv)
    assert result.code == 2 and "No space left" in result.err and not Path("weights/ar.pt").exists()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda tensor: tensor.fill_(torch.nan), "not finite"),
        (lambda tensor: tensor.to(torch.int8), "torch.int8"),
        (lambda tensor: tensor.to_sparse(), "torch.sparse_coo"),
    ],
)
def test_what_is_no_number_to_compute_with_is_no_weight(spoil, words, saved):
    """Neither in our files nor in those of others: integers would be huge weights, and NaN decodes to some text."""
    model, path = saved()
    edit(path, lambda p: p["weights"].update({"norm.weight": spoil(p["weights"]["norm.weight"])}))
    with pytest.raises(ValueError, match=f"norm.weight .*{words}"):
        load_model(path)
    weights = model.state_dict()
    torch.save(weights | {"norm.weight": spoil(weights["norm.weight"])}, path)
    with pytest.raises(ValueError, match=f"norm.weight .*{words}"):
        starting_weights(path, model.config, frozenset({"num_attention_heads"}), "any")


def test_a_run_goes_on_where_its_name_leads(saved, tmp_path):
    """A link to a larger disk stays one."""
    model, path = saved()
    elsewhere = tmp_path / "large disk" / "model.pt"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    save_checkpoint(path, model.config, model.state_dict(), tokenizer="other", stage="test")
    assert path.is_symlink() and load_checkpoint(elsewhere)["tokenizer"] == "other"


def test_where_memory_ends_in_reading_no_file_is_called_damaged(saved, monkeypatch):
    _, path = saved()

    def fail(*arguments, **more):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_checkpoint(path)


def test_our_own_checkpoint_brings_its_shape_and_typed_flags_that_contradict_it_are_named(
    command, refused, pretrain_argv, diffusion_argv
):
    assert command(train_pretrain, [*pretrain_argv, "--qk-norm", "--num-key-value-heads", "2"]).code == 0
    start = [*diffusion_argv, "--load-from", "weights/ar_state_dict.pt"]
    refused(diffusion, [*start, "--num-attention-heads", "2"], "--num-attention-heads 2", "the file has 4")
    result = command(diffusion, start)
    assert result.code == 0
    config = load_checkpoint(Path("weights/dm.pt"))["config"]
    assert (config["qk_norm"], config["num_key_value_heads"], config["attention"]) == (True, 2, "full")


def test_every_file_of_a_run_starts_another_and_serves_the_evaluation(command, pretrain_argv, tokenizer_dir):
    assert command(train_pretrain, pretrain_argv).code == 0
    for i, suffix in enumerate((".pt", "_state_dict.pt", "_best.pt")):
        start = [*pretrain_argv, "--max-iters", "1", "--load-from", f"weights/ar{suffix}", "--run-name", f"next{i}"]
        assert command(train_pretrain, start).code == 0
        use = ["--checkpoint", f"weights/ar{suffix}", "--tokenizer-dir", tokenizer_dir, "--prompt", "the cat"]
        assert command(eval_minimind, [*use, "--max-new-tokens", "2"]).code == 0


@pytest.mark.parametrize("flags", [[], ["--tie-embeddings"]])
def test_the_files_of_a_run_with_a_moving_average_are_one_model(
    flags, command, diffusion_argv, tokenizer_dir, monkeypatch
):
    """All give the average, to the evaluation and to the next stage; so does the sample that closes the run."""
    closing = []

    def spy(loaded, *more):
        closing.append({name: tensor.clone() for name, tensor in loaded.model.state_dict().items()})
        return generate(loaded, *more)

    generate = diffusion.generate
    monkeypatch.setattr(diffusion, "generate", spy)
    argv = [*diffusion_argv, "--ema-decay", "0.9", "--lr", "0.01", "--lr-stable-ratio", "1", *flags]
    assert command(diffusion, argv).code == 0
    state = load_checkpoint(Path("weights/dm.pt"))
    assert state["best_step"] == state["step"] == 12, "the best step must be the last for this comparison"
    models = [load_model(Path(f"weights/dm{suffix}")).state_dict() for suffix in (".pt", "_state_dict.pt", "_best.pt")]
    for other in (models[1], models[2], closing[0]):
        assert all(torch.equal(tensor, other[name]) for name, tensor in models[0].items())
    assert any(not torch.equal(tensor, state["weights"][name]) for name, tensor in models[0].items())
    use = ["--tokenizer-dir", tokenizer_dir, "--eval-data", "corpus.jsonl", "--nmc", "2", "--dtype", "float32"]
    said = {
        command(likelihood, ["--checkpoint", f"weights/dm{suffix}", *use]).out
        for suffix in (".pt", "_state_dict.pt", "_best.pt")
    }
    assert len(said) == 1 and "documents" in said.pop()
    start = ["--load-from", "weights/dm.pt", "--run-name", "next", "--max-iters", "1", "--lr", "1e-30"]
    assert command(diffusion, [*diffusion_argv, *start, "--weight-decay", "0"]).code == 0
    after = load_checkpoint(Path("weights/next.pt"))["weights"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in models[0].items())


def test_loading_a_start_leaves_dropout_and_rope_scaling_to_the_flags(command, pretrain_argv):
    assert command(train_pretrain, pretrain_argv).code == 0
    before = load_checkpoint(Path("weights/ar_state_dict.pt"))
    start = [*pretrain_argv, "--load-from", "weights/ar_state_dict.pt", "--run-name", "next", "--lr", "1e-30"]
    argv = [*start, "--weight-decay", "0", "--dropout", "0.25", "--inference-rope-scaling"]
    assert command(train_pretrain, argv).code == 0
    after = load_checkpoint(Path("weights/next.pt"))
    assert after["config"] == before["config"] | {"dropout": 0.25, "inference_rope_scaling": True}
    for name, tensor in before["weights"].items():
        assert torch.equal(after["weights"][name], tensor), name


def test_the_config_in_the_file_is_the_whole_config(saved):
    model, path = saved()
    assert load_checkpoint(path)["config"] == asdict(model.config)
    assert set(ADJUSTABLE) <= asdict(model.config).keys()
