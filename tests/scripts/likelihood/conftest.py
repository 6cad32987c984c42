"""Files to evaluate, and checkpoints to evaluate them with."""

import pytest
import torch

from scripts.engine.likelihood.windows import DataEvalConfig
from tests.scripts.conftest import write_jsonl, write_rows
from tests.scripts.models import ready, save

QUESTIONS = [
    {"question": "the cat sees", "choices": ["the river.", "my old friend", "那条河"], "answer": 1},
    {"question": "一只小猫", "choices": ["看见了", "喜欢老朋友"], "answer": "A"},
    {"question": "my old friend ", "choices": ["likes", "follows", "remembers the cat"], "answer": "follows"},
]


@pytest.fixture
def data(workspace):
    """data(texts, name, **more) -> the evaluation of a file with these documents."""
    return lambda texts, name="eval.jsonl", **more: DataEvalConfig(
        eval_data=write_jsonl(workspace / name, texts), **{"num_samples": 3} | more
    )


@pytest.fixture
def saved(tokenizer, tokenizer_dir, workspace):
    """saved(kind, *more, stage="test") -> arguments of a command with a checkpoint of that kind, m.pt."""

    def build(kind, *more, stage="test"):
        save("m.pt", ready(tokenizer, kind), stage)
        flags = ["--checkpoint", "m.pt", "--tokenizer-dir", tokenizer_dir, "--device", "cpu"]
        return [*flags, "--dtype", "float32", *more]

    return build


@pytest.fixture
def file(workspace):
    """file(rows, name, **more) -> the evaluation of a file of these rows."""

    return lambda rows, name="rows.jsonl", **more: DataEvalConfig(
        eval_data=write_rows(name, rows), **{"num_samples": 3} | more
    )


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def cost(model, ids: list[int], begin: int) -> float:
    """Nats of ids[begin:] by the chain rule, in one plain pass."""
    with torch.no_grad():
        logs = model(torch.tensor([ids]), is_causal=True)[0, :-1].double().log_softmax(-1)
    return -float(logs.gather(1, torch.tensor(ids)[1:, None])[begin - 1 :].sum())
