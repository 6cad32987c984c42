"""Which texts a tokenizer is trained on: a random sample of bounded size, or all of few."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.reading.bad_rows import BadRows
from dataset.sample import Sample, sample_texts, texts_of_sources

TEXTS = st.lists(st.text(max_size=9), max_size=30)


def size_of(texts):
    return sum(len(text.encode()) for text in texts)


@given(TEXTS, st.integers(0, 3))
def test_what_is_no_larger_than_the_sample_is_used_whole(texts, spare):
    size = size_of(texts) + spare
    if size:
        assert sample_texts(iter(texts), size) == Sample(texts, size_of(texts), len(texts), size_of(texts))


@given(TEXTS, st.integers(1, 60), st.integers(0, 9))
def test_a_sample_is_texts_in_their_order_of_which_at_most_one_is_cut(texts, size, seed):
    texts = [f"{place:02}{text}" for place, text in enumerate(texts)]
    sample = sample_texts(iter(texts), size, seed)
    assert sample == sample_texts(iter(texts), size, seed)
    assert (sample.num_seen, sample.size_seen) == (len(texts), size_of(texts))
    assert min(size, size_of(texts)) - 4 < sample.size == size_of(sample.texts) <= size
    cut = [text for text in sample.texts if text not in texts]
    assert len(cut) <= 1 and all(any(text.startswith(part) for text in texts) for part in cut)
    assert [text for text in texts if text in sample.texts] == [text for text in sample.texts if text not in cut]


def test_a_larger_sample_with_the_same_seed_holds_the_smaller_one():
    texts = [f"{number:04}" for number in range(500)]
    samples = [set(sample_texts(texts, 4 * count).texts) for count in (10, 100, 500)]
    assert samples[0] < samples[1] < samples[2] == set(texts)


def test_every_text_is_as_likely_wherever_it_stands():
    """A tenth of 100 texts 400 times: each is drawn 40 times, with a standard deviation of 6."""
    texts, drawn = [f"{number:04}" for number in range(100)], dict.fromkeys(range(100), 0)
    for seed in range(400):
        for text in sample_texts(texts, 40, seed).texts:
            drawn[int(text)] += 1
    assert sum(drawn.values()) == 4000 and all(10 <= count <= 70 for count in drawn.values())
    thirds = [sum(drawn[i] for i in range(start, start + 33)) for start in (0, 33, 66)]
    assert max(thirds) - min(thirds) < 250


def test_memory_grows_with_the_sample_and_not_with_the_texts():
    tracemalloc.start()
    try:
        sample = sample_texts((f"{number:01000}" for number in range(20_000)), 100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sample.size == 100_000 and sample.size_seen == 20_000_000 and peak < 1_000_000


def test_a_text_larger_than_the_sample_is_cut():
    assert sample_texts(["ab", "老朋友" * 1000], 1000).size in range(998, 1001)
    assert sample_texts(["老朋友" * 1000], 10) == Sample(["老朋友"], 9, 1, 9000)


def test_weighted_sources_keep_their_weights_in_a_sample(tmp_path):
    """40 kB of each of two sources, one three times; a tenth of all that is a tenth of each, about."""
    (tmp_path / "labels.txt").write_text("\ufeff" + "a/en\nb\n" * 4000 + "c\n", encoding="utf-8")
    rows = [f"{'ab'[i % 2]}{i:09}" for i in range(8000)] + ["c"]
    texts = texts_of_sources(rows, tmp_path / "labels.txt", {"a": 1, "b": 3}, BadRows())
    sample = sample_texts(texts, 16_000)
    assert (sample.num_seen, sample.size_seen) == (16_000, 160_000)
    share = sum(text[0] == "b" for text in sample.texts) / len(sample.texts)
    assert share == pytest.approx(0.75, abs=0.04)
