"""Shared tiny pieces: everything in this suite runs on a CPU in float32 unless a test says otherwise."""

import dataclasses
import os

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # which share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

TINY = ModelConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=24,
    max_position_embeddings=64,
)


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
