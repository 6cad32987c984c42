from pathlib import Path

import pytest

from dataset.tokenizer import load_tokenizer, train_bpe, train_characters
from tests.dataset.sentences import CHINESE, ENGLISH

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shipped():
    return load_tokenizer(ROOT)


@pytest.fixture(scope="session")
def small():
    return train_bpe(ENGLISH + CHINESE + ["2026 2026 2026"] * 9, 330)


@pytest.fixture(scope="session")
def characters():
    return train_characters(ENGLISH + CHINESE + ["\n \t"])
