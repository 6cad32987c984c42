"""Weights that come as tensors alone, and those of MiniMind: every flag that the shapes imply is named at once, and
rotary positions are stretched as they are there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dataset.tokenizer import token_ids
from model.checkpoint import load_checkpoint, load_model, write_archive
from model.config import ModelConfig
from model.import_weights import starting_weights
from model.rotary import yarn_frequencies
from model.transformer import Transformer
from scripts.train import train_pretrain

HEADS = frozenset({"num_attention_heads"})


def minimind_names(model: Transformer, prefix: str = "model.", tied: bool = False) -> dict[str, torch.Tensor]:
    """The state dict as MiniMind writes it: half precision, the rotary tables among the weights."""
    weights = {prefix + name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights |= {"model.freqs_cos": torch.zeros(8, 4), "model.freqs_sin": torch.zeros(8, 4)}
    return weights if tied else weights | {"lm_head.weight": model.lm_head.weight.detach().half()}


@pytest.fixture
def foreign(tokenizer, workspace):
    """foreign(**changes) -> (model whose weights are exact in half precision, its config) with the test's tokenizer."""

    def build(**changes):
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = ModelConfig(**shape | token_ids(tokenizer) | changes)
        torch.manual_seed(8)
        model = Transformer(config)
        model.load_state_dict({n: t.half().float() for n, t in model.state_dict().items()})
        return model, config

    return build


def imported_from(path: Path, config: ModelConfig) -> Transformer:
    """The model of foreign weights without a config.json."""
    start = starting_weights(path, config, HEADS, "any")
    return start.model(start.config)


def started_from(command, argv) -> dict[str, torch.Tensor]:
    """The weights that a run begins with: those after one step of next to no length."""
    result = command(train_pretrain, [*argv, "--lr", "1e-30", "--weight-decay", "0", "--max-iters", "1"])
    assert result.code == 0, result.err
    return load_checkpoint(Path("weights/ar.pt"))["weights"]


@pytest.mark.parametrize("prefix", ["model.", "", "module.model.", "_orig_mod.model."])
@pytest.mark.parametrize("tied", [False, True])
def test_minimind_weights_are_imported_tensor_by_tensor(prefix, tied, foreign, command, pretrain_argv):
    model, _ = foreign(tie_embeddings=tied)
    torch.save(minimind_names(model, prefix, tied), "theirs.pth")
    weights = started_from(command, [*pretrain_argv, "--init-from-minimind", "theirs.pth"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    config = load_checkpoint(Path("weights/ar.pt"))["config"]
    assert config["num_attention_heads"] == 4 and config["attention"] == "causal"


def test_heads_come_from_the_flags_since_no_shape_tells_them(foreign, command, pretrain_argv):
    model, _ = foreign()
    torch.save(minimind_names(model), "theirs.pth")
    started_from(command, [*pretrain_argv, "--init-from-minimind", "theirs.pth", "--num-attention-heads", "2"])
    assert load_checkpoint(Path("weights/ar.pt"))["config"]["num_attention_heads"] == 2


@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "model"])
def test_weights_beside_other_things_are_found_by_their_name(wrapper, foreign, tmp_path):
    model, config = foreign()
    torch.save({"epoch": 3, wrapper: minimind_names(model), "optimizer": {}}, tmp_path / "theirs.pth")
    imported = imported_from(tmp_path / "theirs.pth", config).state_dict()
    assert all(torch.equal(imported[name], tensor) for name, tensor in model.state_dict().items())


def test_a_vocabulary_without_the_mask_token_gets_the_mean_row_at_its_end(foreign, tmp_path):
    """As with MiniMind's own tokenizer directory when the mask token has to be added."""
    model, config = foreign()
    grown = replace(config, vocab_size=config.vocab_size + 1, mask_token_id=config.vocab_size)
    torch.save(minimind_names(model), tmp_path / "theirs.pth")
    imported = imported_from(tmp_path / "theirs.pth", grown)
    for ours, theirs in ((imported.embed_tokens, model.embed_tokens), (imported.lm_head, model.lm_head)):
        assert torch.equal(ours.weight[:-1], theirs.weight)
        torch.testing.assert_close(ours.weight[-1], theirs.weight.mean(dim=0))


def test_a_vocabulary_that_lacks_another_row_is_refused(foreign, tmp_path):
    """A mask token inside the vocabulary means that the missing row is some other token's."""
    model, config = foreign()
    torch.save(minimind_names(model), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="embed_tokens.weight.*--tokenizer-dir"):
        imported_from(tmp_path / "theirs.pth", replace(config, vocab_size=config.vocab_size + 1))


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(2)},
        {"model": {"embed_tokens.weight": torch.zeros(2, 2)}},
        {"model": {"transformer.wte.weight": torch.zeros(2, 2)}, "optimizer": {}},
        [1, 2],
        {1: torch.zeros(2), "model.embed_tokens.weight": torch.zeros(380, 32)},
        {"model.embed_tokens.weight": torch.zeros(380, 32), "epoch": 3},
        {"model.embed_tokens.weight": "text"},
        {"model_state_dict": 3},
    ],
)
def test_a_foreign_dict_is_refused(content, refused, pretrain_argv, workspace):
    torch.save(content, "theirs.pth")
    refused(train_pretrain, [*pretrain_argv, "--init-from-minimind", "theirs.pth"], "theirs.pth")


# -- flags for tensors alone -------------------------------------------------------------------------------------------

MINIMIND_3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96, "qk_norm": True}
MINIMIND_2 = MINIMIND_3 | {"qk_norm": False, "num_key_value_heads": 2}


def flags_in(sentence: str) -> list[str]:
    """The flags that a refusal says to give."""
    return sentence.partition("its shapes need ")[2].partition(";")[0].split()


@pytest.mark.parametrize("shape", [MINIMIND_3, MINIMIND_3 | {"head_dim": 16, "num_hidden_layers": 3}])
def test_one_sentence_gives_all_flags_that_the_shapes_imply(shape, foreign, refused, command, shapeless_argv):
    """Of a model with norms on queries and keys that is all: the norms have the width of a head."""
    model, _ = foreign(tie_embeddings=True, **shape)
    torch.save(minimind_names(model, tied=True), "theirs.pth")
    argv = [*shapeless_argv, "--init-from-minimind", "theirs.pth"]
    flags = flags_in(refused(train_pretrain, argv, "theirs.pth", "--rope-theta", "--rms-norm-eps"))
    assert len(flags) == 12, flags
    assert command(train_pretrain, [*argv, *flags]).code == 0
    config = load_model(Path("weights/ar.pt")).config
    names = [*shape, "head_dim", "hidden_size", "num_hidden_layers", "tie_embeddings"]
    assert all(getattr(config, name) == getattr(model.config, name) for name in names)


def test_without_norms_on_queries_and_keys_the_heads_must_be_typed(foreign, refused, command, shapeless_argv):
    """The default would compute something else from the same tensors, and nothing would tell."""
    model, _ = foreign(**MINIMIND_2)
    torch.save(minimind_names(model), "theirs.pth")
    argv = [*shapeless_argv, "--init-from-minimind", "theirs.pth"]
    refused(train_pretrain, argv, "--num-attention-heads N --num-key-value-heads 1/4 N (no shape tells N)")
    argv += ["--num-attention-heads", "8"]
    flags = flags_in(refused(train_pretrain, argv, "theirs.pth"))
    assert flags[-4:] == ["--num-attention-heads", "8", "--num-key-value-heads", "2"]
    assert command(train_pretrain, [*argv, *flags]).code == 0


@pytest.mark.parametrize(
    "flags, answer", [(["--qk-norm"], "--no-qk-norm"), (["--hidden-size", "64"], "--hidden-size 32")]
)
def test_a_flag_that_contradicts_the_shapes_is_put_right(flags, answer, foreign, refused, pretrain_argv):
    model, _ = foreign()
    torch.save(minimind_names(model), "theirs.pth")
    refused(train_pretrain, [*pretrain_argv, "--load-from", "theirs.pth", *flags], "theirs.pth", answer)


def test_a_head_of_its_own_is_not_tied(foreign, refused, pretrain_argv):
    model, _ = foreign()
    torch.save(minimind_names(model), "theirs.pth")
    refused(train_pretrain, [*pretrain_argv, "--load-from", "theirs.pth", "--tie-embeddings"], "--no-tie-embeddings")


# -- MiniMind's rotary positions ---------------------------------------------------------------------------------------


YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 16, "attention_factor": 1.0}


def minimind_folder(tokenizer, normed: bool, stretched: bool, **changes) -> torch.nn.Module:
    """Write theirs/ with MiniMind's config.json, and return stock transformers' model of the same weights."""
    classes = (Qwen3Config, Qwen3ForCausalLM) if normed else (LlamaConfig, LlamaForCausalLM)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    shape |= {"vocab_size": token_ids(tokenizer)["vocab_size"], "tie_word_embeddings": True, "hidden_act": "silu"}
    rope = YARN | {"rope_type": "yarn"} if stretched else {"rope_type": "default"}
    torch.manual_seed(0)
    twin = classes[1](classes[0](**shape, rope_parameters=rope | {"rope_theta": 1e6})).eval()
    Path("theirs").mkdir(exist_ok=True)
    for name, parameter in twin.named_parameters():
        parameter.data *= 8 if "_proj" in name else 1  # attention far from uniform, so that positions count
    save_file(
        {name: t.clone() for name, t in twin.state_dict().items() if name != "lm_head.weight"},
        "theirs/model.safetensors",
    )
    scaling = YARN | {"type": "yarn"} | changes if stretched else None
    settings = {"rope_theta": 1e6, "dropout": 0.0, "use_moe": False, "flash_attn": True, "rope_scaling": scaling}
    auto_map = {"AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"}
    config = shape | settings | {"inference_rope_scaling": stretched, "auto_map": auto_map}
    Path("theirs/config.json").write_text(json.dumps(config | {"model_type": "minimind"}))
    return twin


def assert_equal_logits(model: Transformer, twin: torch.nn.Module, length: int) -> None:
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens, is_causal=True), twin(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("stretched", [False, True])
def test_a_minimind_folder_computes_what_minimind_computes(normed, stretched, tokenizer, command, shapeless_argv):
    """Stretched at every length, without YaRN's factor on attention: as stock transformers does with factor 1."""
    twin = minimind_folder(tokenizer, normed, stretched)
    result = command(train_pretrain, [*shapeless_argv, "--load-from", "theirs"])
    assert result.code == 0, result.err
    assert ("rotary positions stretched 16-fold at every length, as MiniMind does" in result.out) == stretched
    model = load_model(Path("weights/ar_state_dict.pt"))
    assert (model.config.rope_variant, model.config.inference_rope_scaling) == ("minimind", stretched)
    for context, length in ((64, 64), (12, 12), (12, 3)):
        model.set_context(context)
        assert_equal_logits(model, twin, length)
    if stretched:  # the other meaning of the flag gives other logits
        published = Transformer(replace(model.config, rope_variant="yarn"))
        published.load_state_dict(model.state_dict())
        with pytest.raises(AssertionError, match="not close"):
            assert_equal_logits(published, twin, 64)


@pytest.mark.parametrize("place", ["theirs", "theirs.pth"])
def test_the_flag_means_for_weights_of_minimind_what_it_means_there(place, tokenizer, command, shapeless_argv):
    """The flag alone stretches weights that were trained without it; a file without config.json is MiniMind's, too."""
    minimind_folder(tokenizer, normed=True, stretched=False)
    shape = ["--inference-rope-scaling"]
    if place == "theirs.pth":
        torch.save(load_file("theirs/model.safetensors"), "theirs.pth")
        shape += ["--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4", "--qk-norm"]
        shape += ["--num-key-value-heads", "2", "--intermediate-size", "64", "--rms-norm-eps", "1e-6"]
    result = command(train_pretrain, [*shapeless_argv, "--load-from", place, *shape])
    assert result.code == 0 and "at every length, as MiniMind does" in result.out, result.err
    config = load_model(Path("weights/ar.pt")).config
    assert (config.rope_variant, config.inference_rope_scaling) == ("minimind", True)
    # The next stage keeps it.
    start = ["--load-from", "weights/ar_state_dict.pt", "--run-name", "next"]
    assert command(train_pretrain, [*shapeless_argv, *start]).code == 0
    assert load_model(Path("weights/next.pt")).config == config


def test_for_our_own_weights_the_flag_stretches_long_contexts_only(command, pretrain_argv):
    assert command(train_pretrain, [*pretrain_argv, "--inference-rope-scaling", "--max-iters", "1"]).code == 0
    model = load_model(Path("weights/ar.pt"))
    assert model.config.rope_variant == "yarn"
    plain = Transformer(replace(model.config, inference_rope_scaling=False))
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(model.config.vocab_size, (1, 20))
    model.set_context(2048)
    assert torch.equal(model(ids), plain.eval()(ids))
    model.set_context(2049)
    assert not torch.allclose(model(ids), plain(ids))


@pytest.mark.parametrize("theta", [1e6, 1e4, 100.0])
@pytest.mark.parametrize("original", [16, 2048])
def test_minimind_frequencies_follow_its_formula(theta, original):
    """f (1 - r + r / s), r a ramp over the pairs of dimensions that ends at the last one; no factor on attention."""
    head_dim, s = 64, 16.0
    config = ModelConfig(rope_theta=theta, rope_original_length=original, rope_factor=s, rope_variant="minimind")
    pair = torch.arange(head_dim // 2)
    turns = torch.tensor([32.0, 1.0])
    low, high = head_dim * torch.log(original / (turns * 2 * torch.pi)) / (2 * torch.log(torch.tensor(theta)))
    low, high = low.floor().clamp(min=0), high.ceil().clamp(max=head_dim // 2 - 1)
    r = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies, scale = yarn_frequencies(config)
    torch.testing.assert_close(frequencies, theta ** (-2 * pair / head_dim) * (1 - r + r / s))
    assert scale == 1


@pytest.mark.parametrize("changes", [{"beta_fast": 4, "factor": 4}, {"attention_factor": None}, {"factor": "4"}])
def test_another_stretching_than_that_of_the_present_minimind_is_refused(changes, tokenizer, refused, shapeless_argv):
    """Its earlier formula had beta_fast 4 and no attention_factor."""
    minimind_folder(tokenizer, True, True, **changes)
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], "config.json", "factor")


def test_experts_are_refused(tokenizer, refused, shapeless_argv):
    minimind_folder(tokenizer, True, False)
    config = json.loads(Path("theirs/config.json").read_text())
    Path("theirs/config.json").write_text(json.dumps(config | {"use_moe": True}))
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], "use_moe true")


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "num_key_value_heads", "max_position_embeddings"])
def test_minimind_must_say_what_its_versions_take_differently(name, tokenizer, refused, shapeless_argv):
    minimind_folder(tokenizer, True, False)
    config = json.loads(Path("theirs/config.json").read_text())
    del config[name]
    Path("theirs/config.json").write_text(json.dumps(config))
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], "does not say", name)


def test_a_checkpoint_of_before_these_settings_loads_as_it_was(command, pretrain_argv):
    assert command(train_pretrain, [*pretrain_argv, "--max-iters", "1"]).code == 0
    new = load_checkpoint(Path("weights/ar.pt"))
    config = {name: value for name, value in new["config"].items() if name not in ("head_dim", "rope_variant")}
    write_archive(Path("old.pt"), new | {"version": 3, "config": config})
    old = load_model(Path("old.pt"))
    assert old.config == ModelConfig(**new["config"])
    result = command(train_pretrain, [*pretrain_argv, "--max-iters", "1", "--load-from", "old.pt", "--run-name", "b"])
    assert result.code == 0, result.err
