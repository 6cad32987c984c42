"""The benchmark of the data pipeline: its corpora, one measurement, and the lines that it fits."""

import json

import pytest

from dataset.corpus import bundled
from dataset.tokenizer import load_tokenizer
from scripts.engine.bench import data
from scripts.engine.bench.data import KINDS, DataBenchmarkConfig, build_cache, measure, read_epoch, table, write_corpus
from tests.dataset.conftest import ROOT


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(bundled, "pretraining_rows", lambda: [{"text": f"sentence {i}."} for i in range(40)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_counts_the_tokens_of_the_cache_and_the_batches_of_an_epoch(kind, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, kind, 20_000)
    build, read = build_cache(kind, corpus, ROOT), read_epoch(kind, corpus, ROOT, 4)
    tokens = sum(path.stat().st_size // 2 for path in (tmp_path / "cache").glob("*/*tokens"))
    assert build["tokens"] == tokens > 3000 and build["seconds"] > 0
    assert read["batches"] == len(KINDS[kind].open(corpus, load_tokenizer(ROOT)).train) // 4 + 1
    for resident, private in (build["peaks"], read["peaks"]):
        assert resident > 10**7 and (private is None or 10**6 < private <= resident)


def test_a_larger_corpus_begins_with_a_smaller_one(tmp_path):
    for size in (3000, 9000):
        write_corpus(tmp_path / str(size), "pairs", size)
    small, large = ((tmp_path / str(size)).read_bytes() for size in (3000, 9000))
    assert large.startswith(small) and len(large) >= 9000


def test_the_fitted_line_is_that_of_the_peaks(monkeypatch):
    """Peaks that grow by two bytes for each byte, read from processes that are given nothing but the corpus."""

    def pretended(work, kind, corpus, *_):
        size = corpus.stat().st_size
        peaks = (5 * 10**6 + 2 * size, None if work is read_epoch else 10**6)
        return {"tokens": 10, "seconds": 2.0, "batches": 7, "peaks": peaks}

    monkeypatch.setattr(data, "in_own_process", pretended)
    rows = measure(DataBenchmarkConfig(data_kinds=("documents",), data_megabytes=(2, 1)))
    corpora = [row for row in rows if "corpus_bytes" in row]
    assert [row["corpus_bytes"] // 10**6 for row in corpora] == [1, 2]
    assert corpora[0]["batches_per_second"] == 3.5 and corpora[0]["tokens_per_second"] == 5
    lines = {row["memory"]: (row["slope"], row["intercept_bytes"]) for row in rows if "slope" in row}
    assert lines.keys() == {"build_resident_bytes", "build_private_bytes", "read_resident_bytes"}
    assert lines["build_resident_bytes"] == pytest.approx((2, 5 * 10**6))
    assert lines["build_private_bytes"] == pytest.approx((0, 10**6), abs=1e-6)
    assert json.loads(json.dumps(rows)) == rows
    assert "| documents | build, resident | +2.000 | 5 | 40,005 |" in table(rows) and "unknown" in table(rows)


def test_the_measuring_process_runs_on_its_own(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", "documents", 5000)
    assert data.in_own_process(build_cache, "documents", tmp_path / "corpus.jsonl", ROOT)["tokens"] > 500
