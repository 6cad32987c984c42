"""Checkpoints of conversations or of plain text, and what is decoded."""

import shutil

import pytest

from model.checkpoint import load_checkpoint, write_archive
from scripts.engine.decoding import generation


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
