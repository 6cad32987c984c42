"""Shared tiny pieces: everything in this suite runs on a CPU in float32 unless a test says otherwise."""

import dataclasses
import os

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
    torch.set_num_threads(1)

# Files of more than some seconds, the longest first: they start first, so that the processes end together, and
# `-m "not slow"` leaves them out.
SLOW = (
    "test_quickstart_learns.py",
    "test_distributed.py",
    "test_crash.py",
    "test_resume.py",
    "test_mutated_rows.py",
    "test_experiments.py",
    "test_readme.py",
    "test_quickstart.py",
    "test_bundled.py",
    "test_evaluation.py",
    "test_benchmark.py",
    "test_invariance.py",
    "test_dpo.py",
    "test_benchmark_decoding.py",
    "test_health.py",
)

TINY = ModelConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=24,
    max_position_embeddings=64,
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        if item.path.name in places:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_model():
    """tiny_model(**changes to TINY) -> a float32 model in eval mode whose logits are far from uniform."""

    def build(**changes):
        model = Transformer(dataclasses.replace(TINY, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(12)
        return model.eval()

    return build
