"""The benchmark of the data pipeline: its corpora, one measurement, and the lines that it fits."""

import itertools
from types import SimpleNamespace

import pytest

from dataset.corpus import bundled
from dataset.tokenizer import load_tokenizer
from scripts.engine.bench import data
from scripts.engine.bench.data import (
    TOKEN_COUNTS,
    DataBenchmarkConfig,
    build_cache,
    measure_data,
    open_corpus,
    read_epoch,
    write_corpus,
)
from scripts.engine.bench.memory import Peak
from scripts.engine.bench.timing import markdown
from tests.dataset.conftest import ROOT


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(bundled, "pretraining_rows", lambda: [{"text": f"sentence {i}."} for i in range(40)])


@pytest.fixture
def clock(monkeypatch):
    """Two seconds between two looks."""
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=itertools.count(0, 2).__next__))


@pytest.mark.parametrize("kind", TOKEN_COUNTS)
def test_a_measurement_counts_the_tokens_of_the_cache_and_the_batches_of_an_epoch(kind, tmp_path, clock):
    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, kind, 20_000)
    build, read = build_cache(kind, corpus, ROOT), read_epoch(kind, corpus, ROOT)
    tokens = sum(path.stat().st_size // 2 for path in (tmp_path / "cache").glob("*/*tokens"))
    assert tokens > 3000 and build["tokens/s"] == tokens / 2
    assert build["tokenised MB/s"] == pytest.approx(corpus.stat().st_size / 2e6)
    assert read["batches/s"] == (len(open_corpus(kind, corpus, load_tokenizer(ROOT)).train) // 32 + 1) / 2


def test_a_larger_corpus_begins_with_a_smaller_one(tmp_path):
    for size in (3000, 9000):
        write_corpus(tmp_path / str(size), "pairs", size)
    small, large = ((tmp_path / str(size)).read_bytes() for size in (3000, 9000))
    assert large.startswith(small) and len(large) >= 9000


def test_the_fitted_line_is_that_of_the_peaks(monkeypatch):
    """Peaks that grow by two bytes for each byte, of processes that are given nothing but the corpus."""

    def pretended(work, kind, corpus, *_):
        peak = Peak(5 * 10**6 + 2 * corpus.stat().st_size, None if work is read_epoch else 10**6)
        return {"batches/s": 3.5} if work is read_epoch else {"tokens/s": 5.0}, peak

    monkeypatch.setattr(data, "in_own_process", pretended)
    rows = measure_data(DataBenchmarkConfig(data_kinds=("documents",), data_megabytes=(2, 1)), ROOT)
    assert [round(row["MB"]) for row in rows if "MB" in row] == [1, 2]
    lines = {row["memory"]: (row["bytes per byte of corpus"], row["intercept MB"]) for row in rows if "memory" in row}
    assert lines.keys() == {"build: peak MB", "build: private MB", "read: peak MB"}
    assert lines["build: peak MB"] == pytest.approx((2, 5))
    assert lines["build: private MB"] == pytest.approx((0, 1), abs=1e-6)
    assert "| documents | build: peak MB | 2 | 5 | 40,005 |" in markdown(rows)


def test_the_measuring_process_runs_on_its_own(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", "documents", 5000)
    row, peak = data.in_own_process(build_cache, "documents", tmp_path / "corpus.jsonl", ROOT)
    assert row["tokens/s"] > 0 and peak.resident > 10**7
    assert peak.private is None or 10**6 < peak.private <= peak.resident
