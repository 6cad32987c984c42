"""Starting weights: ours, or those that MiniMind and Hugging Face's Llama and Qwen3 write.

Foreign weights are imported if they compute what this model computes, and refused, with the reason, if they do not:
most of what differs between models leaves names and shapes as they are. So the `model_type` in config.json decides, and
then each setting that counts.
"""

import json
import re
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import (
    build_model,
    final_weights,
    is_checkpoint,
    read_archive,
    read_folder,
    read_object,
    require_checkpoint,
    require_tokenizer,
    unusable,
    weight_faults,
)
from model.config import ADJUSTABLE, ModelConfig
from model.transformer import Transformer

# Types that can be imported, and what a setting that config.json leaves out is by the definition of the type. Versions
# of MiniMind differ in theirs, so those files must say it.
PLAIN = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
TYPES: dict[str, dict[str, Any]] = {
    "llama": PLAIN | {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "qwen3": PLAIN | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "minimind": {"head_dim": None},
}

# What the types that people try do otherwise, although their tensors may have the same names and shapes.
OTHERWISE = {
    "cohere": "subtracts the mean in its norms, and scales the logits",
    "ernie4_5": "rotates neighbouring dimensions",
    "gemma": "scales the embeddings, and adds 1 to the weights of its norms",
    "gemma2": "scales the embeddings, adds 1 to the weights of its norms, and caps scores and logits",
    "gemma3_text": "scales the embeddings, adds 1 to the weights of its norms, and attends within a window",
    "glm": "rotates neighbouring dimensions, and only half of them",
    "granite": "multiplies embeddings, scores, residuals and logits by factors of its own",
    "helium": "rotates neighbouring dimensions",
    "mistral": "may attend within a sliding window",
    "olmo2": "has its norms after attention and feed-forward network",
    "qwen2": "adds biases to queries, keys and values",
    "smollm3": "has layers without rotary positions",
}

# Settings that change what is computed, and the values with which they do not. Absent or null is no such change.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "auto_map": (),  # code of its own; that of MiniMind is known
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": (),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_bias": (False,),
    "use_moe": (False,),
    "use_sliding_window": (False,),
}

SETTINGS = {
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "head_dim": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "hidden_act": str,
    "tie_word_embeddings": bool,
}
# Under which name training programs save the weights beside other things.
WRAPPERS = ("model_state_dict", "state_dict", "model")
PLAIN_ROPE = {"rope_theta", "rope_type", "type"}
# MiniMind's stretching of rotary positions in its present version; the earlier one had another formula.
MINIMIND_YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1}


@dataclass(frozen=True)
class StartingWeights:
    """The weights that a stage starts from, read from a file once."""

    path: Path
    config: ModelConfig  # as the file and the flags say; the objective settles the rest
    weights: dict[str, Tensor]
    payload: dict[str, Any] = field(default_factory=dict)  # the rest of a checkpoint of ours

    @property
    def foreign(self) -> bool:
        """Whether another program wrote the weights, so that nothing in them names their tokenizer."""
        return not self.payload

    def model(self, config: ModelConfig) -> Transformer:
        """Return a network of `config` with these weights."""
        return build_model(config, self.weights, str(self.path))


def starting_weights(path: Path, config: ModelConfig, given: frozenset[str], tokenizer: str) -> StartingWeights:
    """Return the weights in `path`, ours or foreign, and their config with the settings that a stage may change.

    path: a file, or a folder of Hugging Face's. config: from the flags, `given` being those that were typed. For our
    own checkpoints the architecture comes from the file, for foreign weights from the config.json beside them;
    ValueError names the typed flags that contradict it. Without config.json the flags must agree with the shapes.
    tokenizer: fingerprint of the one in use.
    """
    path = Path(path)
    payload = read_folder(path) if path.is_dir() else read_archive(path)
    if is_checkpoint(payload):
        payload = require_checkpoint(payload, path)
        require_tokenizer(payload, path, tokenizer)
        # Attention and block size are the stage's to settle; one of its flags has the name of the second.
        config = _settled(path, config, payload["config"], given - {"attention", "block_size"})
        return StartingWeights(path, config, final_weights(payload), payload)
    weights = foreign_weights(payload, path)
    config_json = (path if path.is_dir() else path.parent) / "config.json"
    if config_json.is_file():
        config = _settled(path, config, read_config(config_json, weights), given)
    else:
        config = _agreed(path, config, weights, given)
    return StartingWeights(path, config, _with_mask_token(weights, path, config))


def _settled(path: Path, config: ModelConfig, saved: dict[str, Any], given: frozenset[str]) -> ModelConfig:
    """Return the config of the flags with the settings `saved` with the weights; raise ValueError if a typed flag
    contradicts them. A stage may change some."""
    names = {f.name for f in fields(ModelConfig)} & saved.keys() & given - set(ADJUSTABLE)
    wrong = [name for name in sorted(names) if getattr(config, name) != saved[name]]
    if wrong:
        flags = ", ".join(f"{_flag(n, getattr(config, n))} (the file has {saved[n]})" for n in wrong)
        raise ValueError(f"{path} was trained with another shape than {flags}; leave these flags out")
    kept = {name: getattr(config, name) for name in ADJUSTABLE if name in given}
    try:
        return replace(config, **saved | kept)
    except ValueError as error:
        raise ValueError(f"{path} has a shape that this model cannot have: {error}") from None


def _agreed(path: Path, config: ModelConfig, weights: dict[str, Tensor], given: frozenset[str]) -> ModelConfig:
    """Return the config of weights that come without one: that of the flags, and MiniMind's way to stretch rotary
    positions. Raises ValueError, with all flags that the shapes imply, if the flags do not agree with them."""
    implied = implied_settings(weights, config.num_attention_heads if "num_attention_heads" in given else None)
    head_dim = implied.pop("head_dim", None)
    wrong = {name for name, value in implied.items() if getattr(config, name) != value}
    if not config.tie_embeddings:  # a head that equals the embedding may be trained on its own
        wrong.discard("tie_embeddings")
    if wrong or "num_attention_heads" not in implied:
        flags = [_flag(name, value) for name, value in implied.items() if value is not False or name in wrong]
        if "num_attention_heads" not in implied:
            share = Fraction(*(len(weights[f"layers.0.self_attn.{name}_proj.weight"]) for name in "kq"))
            flags += ["--num-attention-heads N", f"--num-key-value-heads {share} N" if share != 1 else ""]
            flags.append("(no shape tells N)")
        raise ValueError(
            f"{path} comes without config.json, and its shapes need {' '.join(filter(None, flags))}; give these flags, "
            f"and --rope-theta and --rms-norm-eps if they are not {config.rope_theta:g} and {config.rms_norm_eps:g}"
        )
    return replace(config, head_dim=head_dim, rope_variant="minimind")


def _flag(name: str, value: Any) -> str:
    """Return a flag as it is typed."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')} {value}"


def implied_settings(weights: dict[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    """Return the fields of ModelConfig that the shapes of weights, under our names, imply.

    num_heads: if it is known. Without it and without norms on queries and keys, no shape tells the heads.
    """
    # 1. The embedding (V, C), the gate (inner width, C) and the number of layers.
    settings = {
        "hidden_size": weights["embed_tokens.weight"].shape[-1],
        "num_hidden_layers": len(_layers(weights)),
        "intermediate_size": len(weights["layers.0.mlp.gate_proj.weight"]),
        "qk_norm": has_qk_norm(weights),
        "tie_embeddings": is_tied(weights),
    }
    # 2. Queries (H * D, C) and keys (H_kv * D, C); the norm of either has D weights.
    query, key = (len(weights[f"layers.0.self_attn.{name}_proj.weight"]) for name in "qk")
    norm = weights.get("layers.0.self_attn.q_norm.weight")
    head_dim = len(norm) if norm is not None else query // num_heads if num_heads else None
    if head_dim and query % head_dim == key % head_dim == 0:
        heads = {"num_attention_heads": query // head_dim, "num_key_value_heads": key // head_dim}
        return settings | heads | {"head_dim": head_dim}
    return settings


def foreign_weights(payload: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors, under our names, of what another program wrote to `path`; raise ValueError if they are no
    weights of a model like ours."""
    weights = payload if isinstance(payload, dict) else {}
    weights = next((weights[name] for name in WRAPPERS if isinstance(weights.get(name), dict)), weights)
    names = list(map(str, weights))[:3]
    if weight_faults(weights):
        weights = {}
    weights = {
        re.sub(r"^(_orig_mod\.|module\.)*(model\.)?", "", name): tensor
        for name, tensor in weights.items()
        if not name.endswith(("freqs_cos", "freqs_sin", "rotary_emb.inv_freq"))
    }
    faults = unusable(weights)
    if faults:
        raise ValueError(f"{path} holds no weights that can be trained: {faults[0]}")
    if "embed_tokens.weight" not in weights:
        raise ValueError(
            f"{path} holds neither a nano-llada checkpoint nor weights named like MiniMind's "
            f"(model.embed_tokens.weight, ...); it begins with {', '.join(names) or 'no name'}"
        )
    needed = [f"layers.0.self_attn.{name}_proj.weight" for name in "qk"] + ["layers.0.mlp.gate_proj.weight"]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{path} holds no {missing[0]}, as models like Llama have; only such weights can be imported")
    scalar = [name for name in ("embed_tokens.weight", *needed) if weights[name].ndim != 2]
    if scalar:
        raise ValueError(f"{path} holds no matrix as {scalar[0]}; only weights of models like Llama can be imported")
    return {name: tensor.float() for name, tensor in weights.items()}


def _layers(weights: dict[str, Tensor]) -> set[str]:
    """Return the numbers of the layers."""
    return {match[1] for name in weights if (match := re.match(r"layers\.(\d+)\.", name))}


def _with_mask_token(weights: dict[str, Tensor], path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights with a head and a row for every token.

    A vocabulary that is one short gets a row for the mask token at its end, the mean of the others. Raises ValueError
    if it is of another size than the tokenizer's.
    """
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if len(weights[name]) == config.vocab_size - 1 == config.mask_token_id:
            weights[name] = torch.cat([weights[name], weights[name].mean(dim=0, keepdim=True)])
        if len(weights[name]) != config.vocab_size:
            raise ValueError(
                f"{path} has {len(weights[name])} entries in {name}, the tokenizer has {config.vocab_size}; "
                "give the directory of its own tokenizer with --tokenizer-dir"
            )
    return weights


# -- Hugging Face's config.json --------------------------------------------------------------------------------------


def read_config(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of ModelConfig that a config.json decides; raise ValueError if its model is another one.

    weights: under our names; they decide what some versions of MiniMind leave out.
    """
    theirs = read_object(path)
    # 1. Refuse what computes something else.
    kind = _model_type(path, theirs)
    _refuse_other_settings(path, theirs, kind)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    rotary = _rotary(path, rope, kind)
    # 2. The settings, and for those that the file leaves out what its type says.
    present = {"rope_theta": rope.get("rope_theta")} | {n: v for n in SETTINGS if (v := theirs.get(n)) is not None}
    values = TYPES[kind] | {name: value for name, value in present.items() if value is not None}
    if kind == "minimind":
        values.setdefault("tie_word_embeddings", is_tied(weights))
    _check_settings(path, values)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    # 3. What only the weights of MiniMind say: whether queries and keys have a norm.
    tied = values.pop("tie_word_embeddings")
    _check_head(path, tied, weights)
    qk_norm = has_qk_norm(weights) if kind == "minimind" else kind == "qwen3"
    return values | {"tie_embeddings": tied, "qk_norm": qk_norm} | rotary


def has_qk_norm(weights: dict[str, Tensor]) -> bool:
    """Return whether queries and keys have a norm."""
    return any(name.endswith("q_norm.weight") for name in weights)


def _model_type(path: Path, theirs: dict[str, Any]) -> str:
    kind = theirs.get("model_type")
    if kind is None:
        raise ValueError(f"{path} has no model_type, so nothing tells what its weights compute; copy it again")
    if not isinstance(kind, str) or kind not in TYPES:
        reason = OTHERWISE.get(str(kind), "computes something else")
        raise ValueError(
            f"{path} describes a model of type {kind}, which {reason}; only llama, qwen3 without a sliding window, "
            "and minimind can be imported"
        )
    return kind


def _refuse_other_settings(path: Path, theirs: dict[str, Any], kind: str) -> None:
    """Raise ValueError if a setting makes the model compute something else than ours."""
    settings = {name: theirs.get(name) for name in NEUTRAL}
    if kind == "minimind":
        settings["auto_map"] = None
    # transformers ignores the width of a window that is not in use.
    if theirs.get("use_sliding_window") is not False:
        settings["sliding_window"] = theirs.get("sliding_window")
    layers = theirs.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        settings["layer_types"] = layers
    for name, value in settings.items():
        if value is not None and value not in NEUTRAL.get(name, ()):
            raise ValueError(f"{path} has {name} {json.dumps(value)}, which this model cannot compute")


def _rotary(path: Path, rope: Any, kind: str) -> dict[str, Any]:
    """Return the settings of rotary positions; raise ValueError if they are neither plain nor MiniMind's."""
    if not isinstance(rope, dict):
        raise ValueError(f"{path} has rope_parameters {json.dumps(rope)}, expected an object; copy it again")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    variant = {"rope_variant": "minimind" if kind == "minimind" else "yarn"}
    unknown = sorted(name for name in rope.keys() - PLAIN_ROPE if rope[name] != NEUTRAL.get(name, [None])[0])
    if scaling == "default" and not unknown:
        return variant
    if kind != "minimind" or scaling != "yarn":
        what = f"of type {scaling}" if scaling != "default" else f"with {unknown[0]} {json.dumps(rope[unknown[0]])}"
        raise ValueError(f"{path} has rotary positions {what}; only plain ones can be imported")
    if any(rope.get(name) != value for name, value in MINIMIND_YARN.items()):
        raise ValueError(
            f"{path} stretches rotary positions as an earlier version of MiniMind did; only the present one, with "
            "beta_fast 32, beta_slow 1 and attention_factor 1, can be imported"
        )
    factor, length = rope.get("factor"), rope.get("original_max_position_embeddings")
    if type(factor) not in (int, float) or type(length) is not int:
        raise ValueError(f"{path} does not say factor and original_max_position_embeddings of its rope_scaling")
    return variant | {"rope_factor": factor, "rope_original_length": length, "inference_rope_scaling": True}


def _check_settings(path: Path, values: dict[str, Any]) -> None:
    """Raise ValueError if a setting is missing or of another type."""
    missing = [name for name in SETTINGS if name not in values]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}; copy the whole file, or add what is missing")
    for name, right in SETTINGS.items():
        value = values[name]
        if value is not None and type(value) is not right and not (right is float and type(value) is int):
            raise ValueError(f"{path} has {name} {json.dumps(value)}, expected {right.__name__}; copy it again")


def is_tied(weights: dict[str, Tensor]) -> bool:
    """Return whether the head is the embedding."""
    head = weights.get("lm_head.weight")
    return head is None or head.equal(weights["embed_tokens.weight"])


def _check_head(path: Path, tied: bool, weights: dict[str, Tensor]) -> None:
    """Raise ValueError if the weights contradict what config.json says of the head."""
    if tied and not is_tied(weights):
        raise ValueError(f"{path} has tie_word_embeddings true, but the head in the weights is not the embedding")
    if not tied and "lm_head.weight" not in weights:
        raise ValueError(f"{path} has tie_word_embeddings false, but the weights hold no head (lm_head.weight)")
