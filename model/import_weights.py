"""Weights that other programs wrote: MiniMind's and Hugging Face's Llama and Qwen3; and what a stage starts from."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import (
    FORMAT,
    build_model,
    final_weights,
    load_checkpoint,
    read_archive,
    require_tokenizer,
    unusable,
    weight_faults,
)
from model.config import ModelConfig
from model.transformer import Transformer

# Settings that leave every tensor as it is; a stage may set them anew for weights it starts from.
ADJUSTABLE = ("inference_rope_scaling", "dropout")
# What no shape tells, and Hugging Face's config.json does, under the same names.
TOLD_BESIDE = ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "hidden_act")


def import_foreign(path: Path, config: ModelConfig) -> Transformer:
    """Return a model of shape `config` with `foreign_weights`."""
    return build_model(config, foreign_weights(path, config), str(path))


def foreign_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a model of shape `config` from weights with the names of MiniMind or of Hugging Face's
    Llama and Qwen3.

    Those files say nothing of heads, rotary base or context, so `config` must: it comes from the flags. A vocabulary
    that is one short gets a row for the mask token, the mean of the others, at its end. ValueError where names or
    shapes differ.
    """
    weights = read_archive(path)
    weights = weights.get("model_state_dict", weights) if isinstance(weights, dict) else weights
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
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if "embed_tokens.weight" not in weights:
        raise ValueError(
            f"{path} holds neither a nano-llada checkpoint nor weights named like MiniMind's "
            "(model.embed_tokens.weight, ...)"
        )
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    layers = {int(found[1]) for name in weights if (found := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"{path} has {len(layers)} layers, --num-hidden-layers says {config.num_hidden_layers}")
    if any(name.endswith("q_norm.weight") for name in weights) != config.qk_norm:
        raise ValueError(
            f"{path} and --qk-norm disagree: it has {'a' if not config.qk_norm else 'no'} norm on queries and keys"
        )
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if len(weights[name]) == config.vocab_size - 1 == config.mask_token_id:
            weights[name] = torch.cat([weights[name], weights[name].mean(dim=0, keepdim=True)])
    return weights


def _require_as_told(beside: Path, config: ModelConfig) -> None:
    """ValueError, with the flags that are right, if Hugging Face's config.json says otherwise than `config`."""
    try:
        theirs = json.loads(beside.read_text(encoding="utf-8"))
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        told = {name: theirs.get(name, rope.get(name)) for name in TOLD_BESIDE}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{beside} is not the config of a model ({error}); copy it again") from None
    if kind != "default":
        raise ValueError(f"{beside} has rotary positions of type {kind!r}; only plain ones can be imported")
    wrong = {name: value for name, value in told.items() if value is not None and value != getattr(config, name)}
    if wrong:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wrong.items())
        raise ValueError(f"{beside}, beside the weights, tells of another model than the flags; give {flags}")


def starting_weights(
    path: Path, config: ModelConfig, given: frozenset[str], tokenizer: str
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return what a stage starts from: the config, with the settings that a stage may change, and the weights in
    `path`, ours or foreign. `build_model` makes the network, once the objective has settled the config.

    config: from the flags, `given` being those that were typed. For our own checkpoints the architecture comes from the
    file; ValueError names the typed flags that contradict it.
    """
    payload = read_archive(path)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        if (Path(path).parent / "config.json").is_file():
            _require_as_told(Path(path).parent / "config.json", config)
        elif "num_attention_heads" not in given:
            raise ValueError(
                f"{path} does not say how many heads its model has; give --num-attention-heads with it, and "
                f"--rope-theta and --rms-norm-eps where they are not {config.rope_theta:g} and {config.rms_norm_eps:g}"
            )
        return config, foreign_weights(path, config)
    payload = load_checkpoint(path)
    require_tokenizer(payload, path, tokenizer)
    saved = ModelConfig(**payload["config"])
    # The last two are the stage's to set; one of its flags has the name of the second.
    names = ({f.name for f in fields(ModelConfig)} - {"attention", "block_size"}) & given
    wrong = [name for name in sorted(names - set(ADJUSTABLE)) if getattr(config, name) != getattr(saved, name)]
    if wrong:
        told = ", ".join(
            f"--{n.replace('_', '-')} {getattr(config, n)} (the file has {getattr(saved, n)})" for n in wrong
        )
        raise ValueError(f"{path} was trained with another shape than {told}; leave these flags out")
    changed = {name: getattr(config, name) for name in ADJUSTABLE if name in given}
    return replace(saved, **changed), final_weights(payload)
