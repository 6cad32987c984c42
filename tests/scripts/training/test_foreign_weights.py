"""Weights of others: what can be imported computes what it computed before, and everything else is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dataset.tokenizer import load_tokenizer, save_tokenizer, token_ids, train_bpe
from model.checkpoint import load_checkpoint, load_model
from model.config import ModelConfig
from model.import_weights import starting_weights
from scripts.train import train_dpo_minimind, train_pretrain, train_sft_minimind

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WITHOUT_A_STEP = ["--lr", "1e-30", "--weight-decay", "0", "--max-iters", "1"]
HEADS = frozenset({"num_attention_heads"})


def without(argv: list[str], flag: str) -> list[str]:
    """argv without a flag and its value."""
    at = argv.index(flag)
    return [*argv[:at], *argv[at + 2 :]]


def change_config(folder: str, **changes) -> None:
    """Set keys of a config.json; None removes one."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# -- folders that transformers wrote ---------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "rope_theta": 500.0}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama with few key heads, tied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "llama with wide heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "hidden_act": "gelu"}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2}),
    "qwen3 tied, with wide heads": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True},
    ),
}


@pytest.fixture
def folder(tokenizer_dir, workspace):
    """folder(case, **settings) -> the model that transformers saved in theirs/, with the tokenizer's files."""

    def save(case: str = "llama", shard: str = "1GB", **changes):
        config_class, model_class, settings = MODELS[case]
        if config_class is Qwen3Config:
            settings = {"head_dim": 8} | settings
        ids = token_ids(load_tokenizer(tokenizer_dir))
        shared = {"num_key_value_heads": 4, "rope_parameters": ROPE, "max_position_embeddings": 64}
        torch.manual_seed(0)
        config = config_class(**SHAPE | shared | settings | {"vocab_size": ids["vocab_size"]} | changes)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm in the wrong place
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained("theirs", max_shard_size=shard)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_dir / file, "theirs")
        return model

    return save


def assert_equal_logits(theirs, path: Path = Path("weights/ar_state_dict.pt")) -> None:
    """Our checkpoint and their model compute the same."""
    ours = load_model(path)
    tokens = torch.randint(ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, is_causal=True), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["theirs", "theirs/model.safetensors"])
@pytest.mark.parametrize("case", MODELS)
def test_a_folder_is_read_whole_and_computes_what_transformers_computes(case, place, folder, command, shapeless_argv):
    """No flag says anything of the shape."""
    theirs = folder(case)
    result = command(train_pretrain, [*shapeless_argv, "--init-from-minimind", place])
    assert result.code == 0, result.err
    assert_equal_logits(theirs)


@pytest.mark.parametrize("case", ["llama", "qwen3 tied, with wide heads"])
def test_shards_are_one_model(case, folder, command, shapeless_argv):
    theirs = folder(case, shard="20KB")
    assert len(list(Path("theirs").glob("*.safetensors"))) > 2
    result = command(train_pretrain, [*shapeless_argv, "--load-from", "theirs"])
    assert result.code == 0, result.err
    assert_equal_logits(theirs)


def test_the_form_of_transformers_4_says_the_same(folder, command, shapeless_argv):
    theirs = folder("llama")
    change_config("theirs", rope_parameters=None, head_dim=None, rope_theta=500.0)
    assert command(train_pretrain, [*shapeless_argv, "--load-from", "theirs"]).code == 0
    assert_equal_logits(theirs)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings"])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_what_config_json_leaves_out_is_what_transformers_takes_it_for(case, name, folder, tmp_path, monkeypatch):
    default = {"llama": LlamaConfig, "qwen3": Qwen3Config}[case]()
    values = {"rope_parameters": default.rope_parameters} if name == "rope_parameters" else {}
    theirs = folder(case, **values)
    change_config("theirs", **{name: None})
    config = read_back(ModelConfig(vocab_size=theirs.config.vocab_size))
    fields = {"rope_parameters": "rope_theta", "tie_word_embeddings": "tie_embeddings"}
    expected = default.rope_parameters["rope_theta"] if name == "rope_parameters" else getattr(default, name)
    assert getattr(config, fields.get(name, name)) == expected


def read_back(config: ModelConfig, given: frozenset[str] = frozenset()) -> ModelConfig:
    return starting_weights(Path("theirs"), config, given, "any").config


@pytest.mark.parametrize("flag", [("--num-attention-heads", "2"), ("--qk-norm",), ("--rope-theta", "1e4")])
def test_a_typed_flag_that_contradicts_config_json_is_named(flag, folder, refused, shapeless_argv):
    folder()
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs", *flag], flag[0], "leave these flags out")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda: Path("theirs/config.json").unlink(), ["theirs", "config.json"]),
        (lambda: Path("theirs/config.json").write_text("[1]"), ["config.json", "list"]),
        (lambda: Path("theirs/config.json").write_text("{"), ["config.json", "not JSON"]),
        (lambda: Path("theirs/model.safetensors.index.json").unlink(), ["theirs", "model.safetensors"]),
        (lambda: Path("theirs/model.safetensors.index.json").write_text("{}"), ["index.json", "weight_map"]),
        (lambda: next(Path("theirs").glob("*-00002-of-*")).unlink(), ["00002-of", "shards"]),
        (lambda: drop_a_tensor(next(Path("theirs").glob("*-00002-of-*"))), ["index.json", "no shard holds"]),
        (lambda: cut_short(next(Path("theirs").glob("*-00002-of-*"))), ["00002-of", "damaged"]),
        (lambda: change_config("theirs", num_hidden_layers=3), ["layers.2", "missing"]),
        (lambda: change_config("theirs", num_attention_heads=8), ["q_proj.weight", "shape"]),
        (lambda: change_config("theirs", hidden_size="wide"), ["hidden_size", "wide"]),
        (lambda: change_config("theirs", intermediate_size=None), ["config.json", "intermediate_size"]),
        (lambda: change_config("theirs", num_attention_heads=0), ["theirs", "--num-attention-heads"]),
        (lambda: change_config("theirs", tie_word_embeddings=True), ["tie_word_embeddings", "head"]),
        (lambda: change_config("theirs", hidden_act="gelu_new"), ["--hidden-act", "gelu_new"]),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(spoil, words, folder, refused, shapeless_argv):
    folder(shard="20KB")
    spoil()
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], *words)


def drop_a_tensor(shard: Path) -> None:
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def test_a_folder_of_runs_is_no_folder_of_weights(refused, shapeless_argv, weights_of_one_step):
    refused(
        train_pretrain, [*shapeless_argv, "--load-from", str(weights_of_one_step)], "is a folder", "ar_state_dict.pt"
    )


def test_fine_tuning_and_tuning_on_preferences_start_from_a_folder(folder, command, tokenizer_dir):
    folder()
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]
    other = [turns[0], {"role": "assistant", "content": "the river"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    Path("pairs.jsonl").write_text((json.dumps({"chosen": turns, "rejected": other}) + "\n") * 8)
    shared = ["--load-from", "theirs", "--tokenizer-dir", tokenizer_dir, "--max-seq-len", "32", "--batch-size", "4"]
    shared += ["--dtype", "float32", "--device", "cpu", "--max-iters", "1"]
    for module, data in ((train_sft_minimind, "chats.jsonl"), (train_dpo_minimind, "pairs.jsonl")):
        result = command(module, [*shared, "--data", data, "--run-name", data.partition(".")[0]])
        assert result.code == 0, result.err


# -- models that compute something else --------------------------------------------------------------------------------

OTHER_TYPES = sorted(kind for kind, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING)
OTHER_TYPES = [kind for kind in OTHER_TYPES if kind not in ("llama", "qwen3")]
# Whose tensors may have the names and shapes of Llama's, so that nothing but model_type tells.
ALIKE = ["cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "granite", "helium", "mistral", "olmo2"]
ALIKE += ["qwen2", "smollm3"]


@pytest.mark.parametrize("kind", ALIKE)
def test_a_model_of_another_type_is_refused_by_name_with_the_reason(kind, folder, refused, shapeless_argv):
    """The config is the one of transformers for this type, in the shape of the weights."""
    theirs = folder()
    config = CONFIG_MAPPING[kind](**SHAPE, vocab_size=theirs.config.vocab_size, num_key_value_heads=4, head_dim=8)
    config.save_pretrained("theirs")
    sentence = refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], f"type {kind}, which ", "llama")
    assert "something else" not in sentence


def test_no_other_type_of_transformers_is_imported(folder):
    """All that it has a causal language model for."""
    folder()
    assert len(OTHER_TYPES) > 100 and set(ALIKE) <= {*OTHER_TYPES}
    for kind in OTHER_TYPES:
        change_config("theirs", model_type=kind)
        with pytest.raises(ValueError, match=f"of type {kind}, which"):
            read_back(ModelConfig())


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    "config, word",
    [
        (Qwen3Config(**SHAPE, **WINDOW), "use_sliding_window"),
        (Qwen3Config(**SHAPE, attention_bias=True), "attention_bias"),
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias"),
        (LlamaConfig(**SHAPE, sliding_window=8), "sliding_window"),
        (LlamaConfig(**SHAPE, quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (LlamaConfig(**SHAPE, is_causal=False), "is_causal"),
        (LlamaConfig(**SHAPE, layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (LlamaConfig(**SHAPE, auto_map={"AutoModelForCausalLM": "modeling.Model"}), "auto_map"),
        (LlamaConfig(**SHAPE, partial_rotary_factor=0.5), "partial_rotary_factor"),
        *(
            (LlamaConfig(**SHAPE, **{name: 2.0}), name)
            for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        ),
    ],
)
def test_a_setting_that_changes_the_logits_is_refused_by_name(config, word, folder, refused, shapeless_argv):
    folder()
    config.save_pretrained("theirs")
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], "config.json", word)


@pytest.mark.parametrize("kind", sorted({*ROPE_INIT_FUNCTIONS, "of_tomorrow"} - {"default"}))
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_other_rotary_positions_are_refused_by_name(kind, form, folder, refused, shapeless_argv):
    """As transformers 5 and transformers 4 write them."""
    folder()
    rope = {"rope_type": kind, "type": kind, "factor": 2.0, "rope_theta": 1e4}
    change_config("theirs", **{"rope_parameters": None, form: rope})
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], f"rotary positions of type {kind}")


@pytest.mark.parametrize("rope", [{"full_attention": {"rope_theta": 1e4}}, {"rope_type": "default", "factor": 2}])
def test_rotary_settings_that_nobody_knows_are_refused_by_name(rope, folder, refused, shapeless_argv):
    folder()
    change_config("theirs", rope_parameters=rope)
    refused(train_pretrain, [*shapeless_argv, "--load-from", "theirs"], "rotary positions", [*rope][-1])


# -- the tokenizer of foreign weights ----------------------------------------------------------------------------------


def test_foreign_weights_need_a_typed_tokenizer(folder, refused, command, shapeless_argv, tokenizer_dir, monkeypatch):
    """The default is the bundled one; that it has as many entries says nothing."""
    folder()
    for file in Path("theirs").glob("tokenizer*"):
        shutil.copy(file, ".")
    argv = without([*shapeless_argv, "--load-from", "theirs"], "--tokenizer-dir")
    refused(train_pretrain, argv, "theirs", "--tokenizer-dir theirs")
    assert command(train_pretrain, [*argv, "--tokenizer-dir", "."]).code == 0


def test_a_tokenizer_of_equal_size_but_other_entries_is_refused(folder, refused, command, shapeless_argv):
    folder()
    other = train_bpe(["all other words, and then some more of them, over and over again " * 3] * 20, 300)
    state = json.loads(Path("theirs/tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    vocabulary[names[-1]], vocabulary[names[-2]] = vocabulary[names[-2]], vocabulary[names[-1]]
    Path("theirs/tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    argv = [*shapeless_argv, "--load-from", "theirs"]
    refused(train_pretrain, argv, "theirs/tokenizer.json", "2 other entries", "id 378", "--tokenizer-dir theirs")
    assert command(train_pretrain, [*argv, "--tokenizer-dir", "theirs", "--run-name", "b"]).code == 0
    save_tokenizer(other, Path("small"))
    refused(train_pretrain, [*argv, "--tokenizer-dir", "small"], "380 entries", "300", "--tokenizer-dir")
    Path("theirs/tokenizer.json").write_text("{}")
    refused(train_pretrain, argv, "theirs/tokenizer.json is not a tokenizer")


def test_a_mask_token_that_was_added_is_no_difference(folder, command, shapeless_argv, tokenizer_dir):
    """Their tokenizer has none, and their weights no row for it."""
    theirs = folder(vocab_size=379)
    state = json.loads(Path("theirs/tokenizer.json").read_text(encoding="utf-8"))
    names = [token["content"] for token in state["added_tokens"]]
    settings = json.loads(Path("theirs/tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["mask_token"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    vocabulary = {entry: i for entry, i in state["model"]["vocab"].items() if entry not in names[3:]}
    state["model"]["vocab"] = {entry: i for i, entry in enumerate(sorted(vocabulary, key=vocabulary.get))}
    Path("theirs/tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    Path("theirs/tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    size = len(state["model"]["vocab"])
    theirs.resize_token_embeddings(size)
    theirs.save_pretrained("theirs")
    result = command(train_pretrain, [*shapeless_argv, "--load-from", "theirs", "--tokenizer-dir", "theirs"])
    assert result.code == 0, result.err
    config = load_checkpoint(Path("weights/ar.pt"))["config"]
    assert (config["vocab_size"], config["mask_token_id"]) == (size + 1, size)
