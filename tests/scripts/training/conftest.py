"""Runs that are signalled or killed at a chosen step, and checkpoints of a tiny model."""

import os
from pathlib import Path

import pytest

from model.checkpoint import save_checkpoint
from scripts.engine.training.run_files import RunFiles
from scripts.engine.training.trainer import Trainer
from tests.soak.state import difference_of_runs, events


@pytest.fixture
def saved(tiny_model, tmp_path):
    """saved(**changes to TINY) -> (model, path of its checkpoint)."""

    def save(**changes):
        model = tiny_model(**changes)
        path = tmp_path / "folder" / "model.pt"
        save_checkpoint(path, model.config, model.state_dict(), tokenizer="abc", stage="test")
        return model, path

    return save


@pytest.fixture
def at(monkeypatch):
    """at(method, steps, action): when the trainer, or its files, have run `method` at one of `steps`, do `action`."""

    def plan(method, steps, action, before=False):
        owner = Trainer if hasattr(Trainer, method) else RunFiles
        original, left = getattr(owner, method), set(steps)

        def wrapped(self, *args):
            def act():
                if self.state.progress.step in left:  # once each
                    left.remove(self.state.progress.step)
                    action()

            if before:
                act()
            result = original(self, *args)
            if not before:
                act()
            return result

        monkeypatch.setattr(owner, method, wrapped)

    return plan


def send(number):
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(run_name: str) -> None:
    """The run in whole/ and the one in parts/ left the same weights, optimizer, averages, counters and losses."""
    assert (found := difference_of_runs(Path("whole"), Path("parts"), run_name)) is None, found
    assert {f"{run_name}{end}.pt" for end in ("", "_state_dict", "_best")} <= {p.name for p in Path("whole").iterdir()}
    assert [row["event"] for row in events(Path(f"whole/{run_name}_log.jsonl"))].count("eval") >= 2
