"""Starting weights: ours, or those that MiniMind and Hugging Face's Llama and Qwen3 write."""

import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import (
    build_model,
    final_weights,
    is_checkpoint,
    read_archive,
    require_checkpoint,
    require_tokenizer,
    unusable,
    weight_faults,
)
from model.config import ADJUSTABLE, ModelConfig
from model.transformer import Transformer

# What no shape tells, and Hugging Face's config.json does, under the same names.
IN_CONFIG_JSON = ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "hidden_act")


@dataclass(frozen=True)
class StartingWeights:
    """The weights that a stage starts from, read from a file once."""

    path: Path
    config: ModelConfig  # as the file and the flags say; the objective settles the rest
    weights: dict[str, Tensor]
    payload: dict[str, Any] = field(default_factory=dict)  # the rest of a checkpoint of ours

    def model(self, config: ModelConfig) -> Transformer:
        """Return a network of `config` with these weights."""
        return build_model(config, self.weights, str(self.path))


def starting_weights(path: Path, config: ModelConfig, given: frozenset[str], tokenizer: str) -> StartingWeights:
    """Return the weights in `path`, ours or foreign, and their config with the settings that a stage may change.

    config: from the flags, `given` being those that were typed. For our own checkpoints the architecture comes from the
    file; ValueError names the typed flags that contradict it. tokenizer: fingerprint of the one in use.
    """
    payload = read_archive(path)
    if not is_checkpoint(payload):
        config_json = Path(path).parent / "config.json"
        if config_json.is_file():
            _require_agreement(config_json, config)
        elif "num_attention_heads" not in given:
            raise ValueError(
                f"{path} does not say how many heads its model has; give --num-attention-heads with it, and "
                f"--rope-theta and --rms-norm-eps if they are not {config.rope_theta:g} and {config.rms_norm_eps:g}"
            )
        return StartingWeights(path, config, foreign_weights(payload, path, config))
    payload = require_checkpoint(payload, path)
    require_tokenizer(payload, path, tokenizer)
    saved = ModelConfig(**payload["config"])
    # Attention and block size are the stage's to settle; one of its flags has the name of the second.
    names = ({f.name for f in fields(ModelConfig)} - {"attention", "block_size"}) & given
    wrong = [name for name in sorted(names - set(ADJUSTABLE)) if getattr(config, name) != getattr(saved, name)]
    if wrong:
        flags = ", ".join(
            f"--{n.replace('_', '-')} {getattr(config, n)} (the file has {getattr(saved, n)})" for n in wrong
        )
        raise ValueError(f"{path} was trained with another shape than {flags}; leave these flags out")
    changes = {name: getattr(config, name) for name in ADJUSTABLE if name in given}
    return StartingWeights(path, replace(saved, **changes), final_weights(payload), payload)


def import_foreign(path: Path, config: ModelConfig) -> Transformer:
    """Return a model of shape `config` with the foreign weights in `path`."""
    return build_model(config, foreign_weights(read_archive(path), path, config), str(path))


def foreign_weights(payload: Any, path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a model of shape `config`, under our names, from what another program wrote to `path`.

    Those files say nothing of heads, rotary base or context, so `config` must. A vocabulary that is one short gets a
    row for the mask token at its end, the mean of the others. Raises ValueError if names or shapes differ.
    """
    weights = payload.get("model_state_dict", payload) if isinstance(payload, dict) else payload
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
    layers = {match[1] for name in weights if (match := re.match(r"layers\.(\d+)\.", name))}
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


def _require_agreement(config_json: Path, config: ModelConfig) -> None:
    """Raise ValueError, with the flags that are right, if Hugging Face's config.json contradicts `config`."""
    try:
        theirs = json.loads(config_json.read_text(encoding="utf-8"))
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        values = {name: theirs.get(name, rope.get(name)) for name in IN_CONFIG_JSON}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config_json} is not the config of a model ({error}); copy it again") from None
    if kind != "default":
        raise ValueError(f"{config_json} has rotary positions of type {kind!r}; only plain ones can be imported")
    wrong = {name: value for name, value in values.items() if value is not None and value != getattr(config, name)}
    if wrong:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wrong.items())
        raise ValueError(f"{config_json}, beside the weights, describes another model than the flags; give {flags}")
