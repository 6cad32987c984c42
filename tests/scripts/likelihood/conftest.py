"""Files to evaluate, and checkpoints to evaluate them with."""

import pytest

from scripts.engine.likelihood.windows import DataEvalConfig
from tests.scripts.models import ready, save


@pytest.fixture
def data(workspace, jsonl):
    """data(texts, name, **more) -> the evaluation of a file with these documents."""
    return lambda texts, name="eval.jsonl", **more: DataEvalConfig(
        eval_data=jsonl(workspace / name, texts), **{"num_samples": 3} | more
    )


@pytest.fixture
def saved(tokenizer, tokenizer_dir, workspace):
    """saved(kind, *more, stage="test") -> arguments of a command with a checkpoint of that kind, m.pt."""

    def build(kind, *more, stage="test"):
        save("m.pt", ready(tokenizer, kind), stage)
        return [
            "--checkpoint",
            "m.pt",
            "--tokenizer-dir",
            tokenizer_dir,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            *more,
        ]

    return build
