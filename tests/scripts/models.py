"""Networks of no training for tests of evaluations, and how to read a canvas and a terminal."""

import io
from pathlib import Path

import torch

from dataset.tokenizer import fingerprint, token_ids
from model.checkpoint import save_checkpoint
from model.config import ModelConfig
from model.decoding.canvas import Canvas
from model.transformer import Transformer
from scripts.engine.loaded import Loaded
from scripts.engine.runtime import RuntimeConfig


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


RUNTIME = RuntimeConfig(device="cpu", dtype="float32", seed=11)


def untrained(tokenizer, kind: str, uniform: bool = False) -> Transformer:
    """A tiny model for `tokenizer`, its logits far from uniform, or all 0; kind: "causal", "full" or "block <size>"."""
    attention, _, size = kind.partition(" ")
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attention=attention,
        block_size=int(size or 0),
        **token_ids(tokenizer),
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0 if uniform else 8)
    return model.eval()


def ready(
    tokenizer, kind: str, max_length: int = 256, uniform: bool = False, runtime: RuntimeConfig = RUNTIME
) -> Loaded:
    """An `untrained` model as if it had been loaded from a checkpoint."""
    return Loaded(untrained(tokenizer, kind, uniform), tokenizer, runtime, max_length)


def given_tokens(canvas: Canvas, row: int = 0) -> list[int | None]:
    """The given tokens of a row, None where its text is open."""
    ids, is_open = canvas.text(row)
    return [None if blank else token for token, blank in zip(ids.tolist(), is_open.tolist(), strict=True)]


def save(path: Path | str, loaded: Loaded, stage: str = "test", **settings) -> None:
    """Write a checkpoint of the model; settings: flags of the command that trained it."""
    about = {"tokenizer": fingerprint(loaded.tokenizer), "stage": stage}
    if settings:
        about["settings"] = settings
    save_checkpoint(Path(path), loaded.model.config, loaded.model.state_dict(), **about)
