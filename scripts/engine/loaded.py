"""Checkpoints ready for use, and what a result computed with them depends on."""

import hashlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from dataset.reading.files import read_chunks
from dataset.tokenizer import PreTrainedTokenizerFast, fingerprint, load_tokenizer
from model.checkpoint import load_checkpoint, model_of
from model.transformer import Transformer
from scripts.engine.flags import settings_of
from scripts.engine.runtime import RuntimeConfig, provenance

KINDS = {"autoregressive": "--minimind-checkpoint", "diffusion": "--diffusion-checkpoint"}  # and the flag of each
COMMANDS = {"autoregressive": "scripts.eval.eval_minimind", "diffusion": "scripts.eval.eval_diffusion"}


@dataclass(frozen=True)
class CheckpointConfig:
    """The model."""

    checkpoint: Annotated[
        Path | None, "any checkpoint file of a run: <run>_state_dict.pt, <run>_best.pt or <run>.pt"
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the model is given, in tokens", "--seq-len", "at least 2"] = 256

    def load(self, runtime: RuntimeConfig, kind: str | None = None) -> "Loaded":
        """Return the model; one of joint weights as `kind`, one of KINDS."""
        if self.checkpoint is None:
            raise ValueError(
                "--checkpoint is missing: give a file that training wrote, such as weights/<run>_state_dict.pt"
            )
        return load_for_use(self.checkpoint, load_tokenizer(self.tokenizer_dir), self.max_seq_len, runtime, kind)


@dataclass(frozen=True)
class AnyCheckpointConfig(CheckpointConfig):
    """The model, of any kind."""

    write_as: Annotated[
        Literal[*KINDS] | None, "how joint weights are used, which can be either (none: diffusion, in their blocks)"
    ] = None

    def load_any(self, runtime: RuntimeConfig) -> "Loaded":
        """Return the model; raise ValueError for --write-as without joint weights."""
        loaded = self.load(runtime, self.write_as)
        if self.write_as and len(loaded.kinds) == 1:
            raise ValueError(f"--write-as has no effect: {loaded.path} is {loaded.described} alone; leave it out")
        return loaded


@dataclass(frozen=True)
class ModelsConfig:
    """The models."""

    minimind_checkpoint: Annotated[Path | None, "autoregressive model"] = None
    diffusion_checkpoint: Annotated[Path | None, "diffusion model"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len", "at least 2"] = 512

    def __post_init__(self):
        if not self.checkpoints:
            raise ValueError("give --minimind-checkpoint, --diffusion-checkpoint or both")

    @property
    def checkpoints(self) -> dict[str, Path]:
        """kind -> file"""
        paths = zip(KINDS, (self.minimind_checkpoint, self.diffusion_checkpoint), strict=True)
        return {kind: path for kind, path in paths if path is not None}

    def load(self, runtime: RuntimeConfig) -> "dict[str, Loaded]":
        """kind -> model. ValueError for a checkpoint of the other kind."""
        tokenizer = load_tokenizer(self.tokenizer_dir)
        return {
            kind: load_kind(path, kind, tokenizer, self.max_seq_len, runtime) for kind, path in self.checkpoints.items()
        }


@dataclass(frozen=True)
class Loaded:
    """A model together with everything that its use takes."""

    model: Transformer
    tokenizer: PreTrainedTokenizerFast
    runtime: RuntimeConfig
    max_length: int  # tokens of the longest sequence that it is given
    path: Path | None = None  # None: the model was never saved
    sha256: str | None = None  # of the file
    stage: str = ""  # the module that trained it
    chat: bool = False  # trained on conversations, so a prompt belongs into the chat template
    kinds: tuple[str, ...] = ()  # those of KINDS that its weights can be used as
    control_tokens: bool = False  # trained on documents in which a spelled control token is that token
    whole_blocks: bool = False  # trained on texts whose last block is filled with EOS

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "autoregressive" if self.model.config.autoregressive else "diffusion"

    @property
    def described(self) -> str:
        """The kind, the block size if there is one, and whether the weights are joint."""
        size, joint = self.model.config.block_size, " (joint weights)" * (len(self.kinds) > 1)
        return f"{self.kind}{f' in blocks of {size} token' + 's' * (size > 1) if size else ''}{joint}"

    @property
    def attention(self) -> dict[str, Any]:
        """Attention and block size (0: no blocks), as result files record them."""
        return {"attention": self.model.config.attention, "block_size": self.model.config.block_size}

    @property
    def file(self) -> dict[str, Any]:
        """Path, digest and stage of the checkpoint, as result files record them."""
        return {"checkpoint": str(self.path), "sha256": self.sha256, "stage": self.stage}


def load_for_use(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    runtime: RuntimeConfig,
    kind: str | None = None,
) -> Loaded:
    """Load a checkpoint, joint weights as `kind` (none: diffusion). ValueError if the file is damaged or not one of
    ours, or was trained with another tokenizer or for a shorter context."""
    payload = load_checkpoint(path, runtime.torch_device)
    model = model_of(payload, path, runtime.torch_device, fingerprint(tokenizer))
    model.set_context(max_length)
    kinds = model.config.kinds
    if kind in kinds:
        model.config = model.config.as_kind(kind)
    settings = payload.get("settings", {})
    trained = settings.get("max_seq_len")
    if trained and max_length > trained:
        print(
            f"note: {path} was trained on at most {trained} tokens; --max-seq-len {max_length} goes beyond",
            file=sys.stderr,
        )
    return Loaded(
        model,
        tokenizer,
        runtime,
        max_length,
        path,
        payload.sha256,
        payload["stage"],
        chat=payload["chat"],
        kinds=kinds,
        control_tokens=bool(settings.get("control_tokens")),
        whole_blocks=bool(settings.get("quantize_effective_length")),
    )


def load_kind(
    path: Path, kind: str, tokenizer: PreTrainedTokenizerFast, max_length: int, runtime: RuntimeConfig
) -> Loaded:
    """Load a checkpoint given with the flag of a kind. ValueError, with the right flag, if it is of the other kind."""
    loaded = load_for_use(path, tokenizer, max_length, runtime, kind)
    if loaded.kind != kind:
        raise ValueError(
            f"{path}, given as {KINDS[kind]}, is {loaded.described}; give it as {KINDS[loaded.kind]} "
            + shlex.quote(str(path))
        )
    return loaded


def require_kind(loaded: Loaded, kind: str) -> None:
    """Raise ValueError, with the right command, for a checkpoint of the other kind."""
    if loaded.kind != kind:
        command = shlex.join(["uv", "run", "python", "-m", COMMANDS[loaded.kind], "--checkpoint", str(loaded.path)])
        raise ValueError(f"{loaded.path} is {loaded.described}; it is used by: {command}")


def circumstances(
    command: str,
    runtime: RuntimeConfig,
    tokenizer: PreTrainedTokenizerFast,
    data: Path | Sequence[Path] | None,
    models: Iterable[Loaded],
    *configs: Any,
) -> dict[str, Any]:
    """Everything that a result depends on, for its file: command and settings, checkpoints, tokenizer, SHA-256 of the
    unpacked data, code, versions, device, precision, seed."""
    return {
        "command": command,
        "settings": settings_of(*configs, runtime),
        "checkpoints": [loaded.file for loaded in models],
        "tokenizer": fingerprint(tokenizer),
        "data_sha256": data_digest([data] if isinstance(data, Path) else data) if data else None,
        **provenance(runtime),
    }


def data_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the text of files, unpacked, one after the other."""
    digest = hashlib.sha256()
    for chunk in chain.from_iterable(map(read_chunks, files)):
        digest.update(chunk)
    return digest.hexdigest()
