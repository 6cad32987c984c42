"""The benchmark of the data pipeline: its corpora, one measurement, and the lines that it fits."""

import json
from pathlib import Path

import pytest

from dataset.corpus import bundled
from scripts.engine.bench import data as benchmark_data
from scripts.engine.bench.data import KINDS, DataBenchmarkConfig, measure, table
from tests.dataset.conftest import ROOT


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(bundled, "pretraining_rows", lambda: [{"text": f"sentence {i}."} for i in range(40)])


def worked(capsys, phase: str, kind: str, corpus) -> dict:
    benchmark_data._work(phase, kind, str(corpus), str(ROOT), "4")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_counts_the_tokens_of_the_cache_and_the_batches_of_an_epoch(kind, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    benchmark_data._write(corpus, kind, 20_000)
    build, read = (worked(capsys, phase, kind, corpus) for phase in ("build", "read"))
    tokens = sum(path.stat().st_size // 2 for path in (tmp_path / "cache").glob("*/*tokens"))
    dataset = KINDS[kind].open(corpus, benchmark_data.load_tokenizer(ROOT))
    assert build["tokens"] == tokens > 3000 and build["seconds"] > 0
    assert read["batches"] == len(dataset.train) // 4 + 1
    for found in (build, read):
        assert found["resident"] > 10**7 and (found["private"] is None or 10**6 < found["private"] <= found["resident"])


def test_a_larger_corpus_begins_with_a_smaller_one(tmp_path):
    sizes = (3000, 9000)
    for size in sizes:
        benchmark_data._write(tmp_path / str(size), "pairs", size)
    small, large = ((tmp_path / str(size)).read_bytes() for size in sizes)
    assert large.startswith(small) and len(large) >= 9000


def test_the_fitted_line_is_that_of_the_peaks(monkeypatch):
    """Peaks that grow by two bytes for each byte, read from processes that are told nothing but the corpus."""

    def pretended(phase, kind, corpus, *_):
        size = Path(corpus).stat().st_size
        slopes = {"resident": 5 * 10**6 + 2 * size, "private": None if phase == "read" else 10**6}
        return {"tokens": 10, "seconds": 2.0, "batches": 7} | slopes

    monkeypatch.setattr(benchmark_data, "_in_a_process", pretended)
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
    benchmark_data._write(tmp_path / "corpus.jsonl", "documents", 5000)
    found = benchmark_data._in_a_process("build", "documents", str(tmp_path / "corpus.jsonl"), str(ROOT), "4")
    assert found["tokens"] > 500


@pytest.mark.parametrize(
    "flags", [{"data_kinds": ("poems",)}, {"data_megabytes": (4, 4)}, {"data_megabytes": (0, 4)}, {"data_kinds": ()}]
)
def test_an_impossible_flag_is_refused_by_name(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags)).replace('_', '-')} .*"):
        DataBenchmarkConfig(**flags)
