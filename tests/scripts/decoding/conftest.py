"""Checkpoints of conversations or of plain text, chats with them, and what is decoded."""

import io
import itertools
import shutil
import sys

import pytest

from dataset.tokenizer import decode, encode_chat
from model.checkpoint import load_checkpoint, write_archive
from model.decoding.canvas import Decoded
from scripts import chat
from scripts.engine.decoding import generation

SMALL = ("--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def checkpoint(workspace, weights_of_one_step):
    """checkpoint(kind, chats=True, **config) -> the file of a run, fine-tuned on conversations or of plain text."""
    shutil.copytree(weights_of_one_step, workspace / "weights")

    def edit(kind, chats=True, **config):
        path = workspace / "weights" / f"{kind}_state_dict.pt"
        payload = load_checkpoint(path)
        write_archive(path, {**payload, "chat": chats, "config": payload["config"] | config})
        return str(path)

    return edit


@pytest.fixture
def flag(checkpoint):
    """flag(kind, chats=True, **config) -> the flag of that kind of checkpoint, and such a checkpoint."""
    names = {"ar": "--minimind-checkpoint", "dm": "--diffusion-checkpoint"}
    return lambda kind, *more, **config: [names[kind], checkpoint(kind, *more, **config)]


@pytest.fixture
def canvases(monkeypatch):
    """Every canvas that is decoded to its end, in order."""
    canvases, fill = [], generation.fill

    def noted(model, canvas, *more):
        canvases.append(canvas)
        return fill(model, canvas, *more)

    monkeypatch.setattr(generation, "fill", noted)
    return canvases


class Decoding:
    """What was decoded, how, and what came out, call by call."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.canvases, self.configs, self.seeds, self.replies = [], [], [], []
        self.interrupted = self.empty = None  # number of a call

    def __call__(self, model, canvas, config, seeds, watch):
        number = len(self.canvases)
        self.canvases.append(canvas)
        self.configs.append(config)
        self.seeds.append(seeds[0])
        if number == self.interrupted:
            steps = itertools.count(1)

            def stop(step):
                watch(step)
                if next(steps) == 2:
                    raise KeyboardInterrupt

            return self.fill(model, canvas, config, seeds, stop)
        decoded = self.fill(model, canvas, config, seeds, watch)
        if number == self.empty:
            decoded = Decoded(decoded.ids, [[self.tokenizer.eos_token_id]], [True], 1, [1])
        self.replies.append(decode(self.tokenizer, decoded.new[0]))
        return decoded

    def prompts(self):
        """The given tokens of every call up to the first open one."""
        return [c.ids[0, : int(c.open[0].int().argmax())].tolist() for c in self.canvases]


@pytest.fixture
def decoding(monkeypatch, tokenizer):
    made = Decoding(tokenizer)
    made.fill = generation.fill
    monkeypatch.setattr(generation, "fill", made)
    return made


@pytest.fixture
def flags(checkpoint, tokenizer_dir):
    """flags(kind, chats=True, **config): arguments of a chat with such a checkpoint."""
    return lambda *kind, **config: [
        *("--checkpoint", checkpoint(*kind, **config)),
        *("--tokenizer-dir", str(tokenizer_dir), *SMALL),
    ]


@pytest.fixture
def talk(command, flags, monkeypatch):
    """talk(kind, lines or bytes, *flags) -> standard output, of a chat that ended well."""

    def run(kind, lines, *more, chats=True):
        stdin = io.TextIOWrapper(io.BytesIO(lines)) if isinstance(lines, bytes) else io.StringIO("\n".join(lines))
        monkeypatch.setattr(sys, "stdin", stdin)
        result = command(chat, [*flags(kind, chats), *more])
        assert result.code == 0 and not result.complaints, result
        return result.out

    return run


def history(tokenizer, *contents, more=True, system=None):
    """Ids of a conversation of these contents in turn, behind a system prompt if there is one."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(tokenizer, [*opening, *messages], more)
