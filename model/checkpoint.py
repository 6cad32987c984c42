"""One file per checkpoint: config, weights, where they come from and, for resuming, the training state.

Files are plain torch archives of tensors and built-in types, read with `weights_only=True`: loading one never runs
code. Nothing is inferred from tensor shapes, and nothing is loaded "where it fits". A file ends with the SHA-256 of all
before it (as the comment of a zip archive, which torch and other programs read over), so no byte of it can be lost or
changed without being noticed.
"""

import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.config import ModelConfig
from model.files import DAMAGED, NO_CHECKPOINT, checkpoint_fault, is_out_of_memory, no_checkpoint, replacing
from model.transformer import Transformer

FORMAT, VERSION = "nano-llada", 4  # 2 added block_size to the config, 3 the seal, 4 head_dim and rope_variant
SEAL = b"sha256:"
SEAL_BYTES = len(SEAL) + 64


def save_checkpoint(
    path: Path, model_config: ModelConfig, weights: dict[str, Tensor], tokenizer: str, stage: str, **extras: Any
) -> None:
    """Write atomically and durably: whatever happens, `path` holds the old file or the new one, whole.

    tokenizer: its fingerprint. stage: the module that trained the weights. extras: built-in types and tensors.
    """
    payload = {"format": FORMAT, "version": VERSION, "config": asdict(model_config), "weights": weights}
    write_archive(path, payload | {"tokenizer": tokenizer, "stage": stage} | extras)


def write_archive(path: Path, payload: Any) -> None:
    """Write tensors and built-in types as a sealed torch archive."""
    with replacing(Path(path)) as file:
        torch.save(dict(payload) if isinstance(payload, Payload) else payload, file)  # only built-in types are read
        file.seek(-2, os.SEEK_END)  # a zip archive ends with its comment, after the length of it
        file.write(SEAL_BYTES.to_bytes(2, "little"))
        file.seek(0)
        seal = SEAL + hashlib.file_digest(file, "sha256").hexdigest().encode()
        file.write(seal)


class Payload(dict[str, Any]):
    """The contents of a file, with the SHA-256 of the file."""

    sha256 = ""


# What torch and zipfile raise for bytes that are no archive; which of them depends on the byte.
DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, AssertionError, TypeError),
    *(OverflowError, zipfile.BadZipFile, SafetensorError),
)


def read_archive(path: Path, device: torch.device | str = "cpu") -> Any:
    """Return the contents of a torch archive of tensors and built-in types, a dict as a Payload, or of a safetensors
    file; raise ValueError if the file is neither, or not as it was written."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(no_checkpoint(path))
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        with path.open("rb") as file:  # once: a run in training may replace it meanwhile
            return _read_torch(file, device)
    except pickle.UnpicklingError:
        raise ValueError(checkpoint_fault(path, NO_CHECKPOINT)) from None
    except DAMAGE as error:
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        raise ValueError(checkpoint_fault(path, DAMAGED)) from None


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights in a folder; raise ValueError if there are none, or if a shard is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "config.json").is_file():
            raise ValueError(no_checkpoint(folder))
        raise ValueError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; give a folder that "
            "transformers' save_pretrained wrote, or a checkpoint file"
        )
    shards = sorted(set(_weight_map(index).values()))
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{index} names {missing[0]}, which is not beside it; copy all {len(shards)} shards")
    return [folder / name for name in shards]


def read_folder(folder: Path) -> Any:
    """Return the tensors of all files of weights in a folder by name; raise ValueError if one is missing."""
    files = weight_files(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, which says how its weights compute; copy it there, or give a "
            "checkpoint file"
        )
    if len(files) == 1 and files[0].name in ("model.safetensors", "pytorch_model.bin"):
        return read_archive(files[0])
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_archive(file)  # a shard is a safetensors file, which holds nothing but tensors
    index = folder / "model.safetensors.index.json"
    missing = _weight_map(index).keys() - weights.keys()
    if missing:
        raise ValueError(f"{index} names {min(missing)}, which no shard holds; copy the folder again")
    return weights


def _weight_map(index: Path) -> dict[str, str]:
    table = read_object(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index} holds no weight_map from tensors to files; copy it again")
    return table


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object; copy it again")
    return value


def _read_torch(file: BinaryIO, device: torch.device | str) -> Any:
    sealed, sha256 = _digests(file)
    # torch does not compare the checksums that every zip archive has.
    if not sealed and zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
        raise ValueError
    file.seek(0)
    payload = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(payload, dict):
        return payload
    if not sealed and payload.get("format") == FORMAT and payload["version"] >= 3:
        raise ValueError
    payload = Payload(payload)
    payload.sha256 = sha256
    return payload


def _digests(file: BinaryIO) -> tuple[bool, str]:
    """Return whether the file is sealed, and the SHA-256 of the whole file; raise ValueError if the seal does not match
    the bytes before it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - SEAL_BYTES, 0))
    seal = file.read()
    file.seek(0)
    digest, left = hashlib.sha256(), max(size - SEAL_BYTES, 0)
    while left and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    sealed = seal.startswith(SEAL)
    if sealed and seal != SEAL + digest.hexdigest().encode():
        raise ValueError
    digest.update(seal)
    return sealed, digest.hexdigest()


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Payload:
    """Return a checkpoint of this project; raise FileNotFoundError, or ValueError for any other file."""
    return require_checkpoint(read_archive(path, device), path)


def is_checkpoint(payload: Any) -> bool:
    """Return whether `payload` was written by this project."""
    return isinstance(payload, dict) and payload.get("format") == FORMAT


def require_checkpoint(payload: Any, path: Path) -> Payload:
    """Return `payload`, read from `path`, with the fields that older versions lack; raise ValueError if it is not a
    checkpoint that this version can use."""
    if not is_checkpoint(payload):
        raise ValueError(
            f"{path} is not a nano-llada checkpoint; "
            "weights of MiniMind or Hugging Face are read by --load-from of the training commands"
        )
    if payload.get("version") not in range(1, VERSION + 1):
        raise ValueError(
            f"{path} has checkpoint version {payload.get('version')}, this code reads versions 1 to {VERSION}; "
            "update the code, or train anew"
        )
    missing = {"config", "weights", "tokenizer", "stage"} - payload.keys()
    if missing:
        raise ValueError(f"{path} is incomplete: {', '.join(sorted(missing))} is missing")
    payload["config"] = _complete(payload["config"], payload["version"])
    faults = _config_faults(payload["config"]) or weight_faults(payload["weights"])
    average = payload.get("average")
    if average is not None and (not isinstance(average, dict) or weight_faults(average.get("shadow"))):
        faults.append("its moving average is not tensors by name")
    if faults:
        raise ValueError(f"{path} is not what training writes: {'; '.join(faults[:3])}")
    for name, value in _from_stage(payload["stage"]).items():
        payload.setdefault(name, value)
    return payload


def _complete(config: Any, version: int) -> Any:
    """Return the settings of a model with those that files of this version did not have yet."""
    if not isinstance(config, dict) or version == VERSION:
        return config
    width, heads = (config.get(name) for name in ("hidden_size", "num_attention_heads"))
    added = {"rope_variant": "yarn"} | ({"block_size": 0} if version == 1 else {})
    if type(width) is int and type(heads) is int and heads:
        added["head_dim"] = width // heads
    return added | config


def _from_stage(stage: str) -> dict[str, Any]:
    """Return what files of before these fields tell by the name of their stage alone.

    chat: the weights were trained on conversations, so prompts get the template. unit: of the validation loss.
    """
    preferences = "dpo" in stage
    return {"chat": preferences or "sft" in stage, "unit": "per pair" if preferences else "nats per token"}


def _config_faults(config: Any) -> list[str]:
    """Return the reasons why `config` cannot be the settings of a model."""
    if not isinstance(config, dict):
        return ["its config is not a table of settings"]
    known = asdict(ModelConfig())
    faults = [f"unknown setting {name}" for name in config.keys() - known.keys()]
    faults += [f"{name} is missing" for name in known.keys() - config.keys()]
    for name, value in config.items():
        right = type(known.get(name))
        if name in known and type(value) is not right and not (right is float and type(value) is int):
            faults.append(f"{name} is {value!r}, expected {right.__name__}")
    if not faults:
        try:
            ModelConfig(**config)
        except ValueError as error:
            faults.append(str(error))
    return faults


def weight_faults(weights: Any) -> list[str]:
    """Return the reasons why `weights` are not tensors by name."""
    if not isinstance(weights, dict):
        return ["its weights are not tensors by name"]
    return [f"{name} is not a tensor" for name, value in weights.items() if not isinstance(value, Tensor)] + [
        f"{name!r} is not a name" for name in weights if not isinstance(name, str)
    ]


def require_tokenizer(payload: dict[str, Any], path: Path, fingerprint: str) -> None:
    """Raise ValueError if the weights in `path` were trained with another tokenizer than the one of `fingerprint`."""
    if payload["tokenizer"] != fingerprint:
        raise ValueError(
            f"{path} was trained with another tokenizer (fingerprint {payload['tokenizer']}, the one in use has "
            f"{fingerprint}); give its directory with --tokenizer-dir"
        )


def build_model(config: ModelConfig, weights: dict[str, Tensor], source: str) -> Transformer:
    """Return a model of this config with these weights, on the host."""
    with torch.random.fork_rng(devices=[]):  # the initial weights, soon replaced, cost no random number of the caller
        model = Transformer(config)
    load_weights(model, weights, source)
    return model


def load_model(path: Path, device: torch.device | str = "cpu", tokenizer: str | None = None) -> Transformer:
    """Return the model that the file describes, in eval mode; names and shapes must match exactly.

    tokenizer: fingerprint of the tokenizer in use; raises ValueError if the weights were trained with another.
    """
    return model_of(load_checkpoint(path, device), path, device, tokenizer)


def model_of(
    payload: dict[str, Any], path: Path, device: torch.device | str = "cpu", tokenizer: str | None = None
) -> Transformer:
    """Return the model of a payload that `load_checkpoint` has read from `path`."""
    if tokenizer is not None:
        require_tokenizer(payload, path, tokenizer)
    return build_model(ModelConfig(**payload["config"]), final_weights(payload), str(path)).to(device).eval()


def final_weights(payload: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights that a run stands for: their moving average, if it keeps one."""
    average = payload.get("average")
    if not average:
        return payload["weights"]
    weights = payload["weights"] | average["shadow"]
    if payload["config"]["tie_embeddings"]:  # a tied head is one parameter under two names
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def average_weights(members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor over the members, summed in float64, so that equal members are their mean.

    Raises ValueError unless all have the same names and shapes.
    """
    first = members[0]
    for other in members[1:]:
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in first.items()}:
            raise ValueError("weights of different models cannot be averaged")
    return {
        name: (sum(member[name].double() for member in members) / len(members)).to(tensor.dtype)
        for name, tensor in first.items()
    }


def load_weights(model: Transformer, weights: dict[str, Tensor], source: str) -> None:
    """Copy every tensor; raise ValueError, naming the first faults, if tensors are missing, unknown, of another shape,
    or not finite."""
    own = model.state_dict()
    faults = unusable(weights)
    faults += [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        shape, expected = tuple(weights[name].shape), tuple(own[name].shape)
        if shape != expected:
            faults.append(f"{name} has shape {shape}, the model {expected} ({_flag_for(name)})")
    if faults:
        rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(sorted(faults)[:3])}{rest}")
    if model.config.tie_embeddings and not torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"]):
        raise ValueError(
            f"{source} has a head of its own, the model ties it to the embedding; leave out --tie-embeddings"
        )
    model.load_state_dict(weights)


def unusable(weights: dict[str, Tensor]) -> list[str]:
    """Return the reasons why tensors cannot be weights. Shards were searched when they were whole."""
    faults = []
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            faults.append(f"{name} is {tensor.layout} of {tensor.dtype}, expected dense floating-point numbers")
        elif not hasattr(tensor, "full_tensor") and not tensor.isfinite().all():
            faults.append(f"{name} has entries that are not finite numbers")
    return faults


def _flag_for(name: str) -> str:
    """Return advice on the flags that decide the shape of a tensor."""
    if name.startswith(("embed_tokens", "lm_head")):
        return "check --hidden-size and --tokenizer-dir"
    if ".mlp." in name:
        return "check --hidden-size and --intermediate-size"
    if "k_proj" in name or "v_proj" in name:
        return "check --hidden-size and --num-key-value-heads"
    return "check --hidden-size and --num-attention-heads"
