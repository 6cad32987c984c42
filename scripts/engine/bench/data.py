"""Speed and memory of the data pipeline on growing synthetic corpora; every measurement has a process of its own.

Memory is a line in the size of the corpus, bytes = intercept + slope * corpus bytes; a slope near zero is what lets a
corpus be larger than memory. Private bytes are what a process holds for itself and cannot give back; resident bytes
count the pages of mapped files besides, which the system takes back when it needs them.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from dataset.corpus import bundled
from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.sft import DiffusionSFTData, SFTDataset
from dataset.tokenizer import load_tokenizer
from scripts.engine.bench.memory import PrivatePeak, in_own_process, most_resident
from scripts.engine.bench.timing import markdown

MEGABYTE = 10**6
LARGE = 20 * 10**9  # bytes of the corpus to which the table extrapolates
PEAKS = [f"{phase}_{memory}_bytes" for phase in ("build", "read") for memory in ("resident", "private")]


@dataclass(frozen=True)
class DataBenchmarkConfig:
    """Measuring the data pipeline."""

    data_kinds: Annotated[tuple[Literal["documents", "conversations", "pairs"], ...], "kinds of synthetic corpora"] = (
        "documents",
        "conversations",
        "pairs",
    )
    data_megabytes: Annotated[tuple[int, ...], "sizes of the synthetic corpora, in MB; two at least", "at least 1"] = (
        8,
        16,
        32,
    )
    data_rows_per_batch: Annotated[int, "rows of a batch that is read", "at least 1"] = 32
    data_tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")

    def __post_init__(self) -> None:
        if len(set(self.data_megabytes)) < 2:
            sizes = ",".join(map(str, self.data_megabytes))
            raise ValueError(f"--data-megabytes {sizes}: a slope takes two sizes")


def measure(config: DataBenchmarkConfig) -> list[dict[str, Any]]:
    """A row for each kind and size, and after those of a kind one for each fitted line.

    Of a corpus: seconds, bytes_per_second and tokens_per_second of tokenisation, batches_per_second of one epoch of
    shuffled reading and one batch more, and PEAKS (private: None if the system does not tell). Of a line: memory (the
    peak's name), slope and intercept_bytes.
    """
    rows = []
    for kind in config.data_kinds:
        corpora = []
        for megabytes in sorted(set(config.data_megabytes)):
            print(f"data: {megabytes} MB of {kind}", file=sys.stderr, flush=True)
            corpora.append(_measured(kind, megabytes * MEGABYTE, config))
        rows += corpora
        sizes = [corpus["corpus_bytes"] for corpus in corpora]
        for name in PEAKS:
            peaks = [corpus[name] for corpus in corpora]
            if None not in peaks:
                slope, intercept = np.polyfit(sizes, peaks, 1).tolist()
                rows.append({"kind": kind, "memory": name, "slope": slope, "intercept_bytes": intercept})
    return rows


def _measured(kind: str, size: int, config: DataBenchmarkConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, kind, size)
        build = in_own_process(build_cache, kind, corpus, config.data_tokenizer_dir)
        read = in_own_process(read_epoch, kind, corpus, config.data_tokenizer_dir, config.data_rows_per_batch)
        corpus_bytes = corpus.stat().st_size
    return {
        "kind": kind,
        "corpus_bytes": corpus_bytes,
        "tokens": build["tokens"],
        "seconds": build["seconds"],
        "bytes_per_second": corpus_bytes / build["seconds"],
        "tokens_per_second": build["tokens"] / build["seconds"],
        "batches_per_second": read["batches"] / read["seconds"],
        **dict(zip(PEAKS, [*build["peaks"], *read["peaks"]], strict=True)),
    }


def build_cache(kind: str, corpus: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Tokenise a corpus, in this process."""
    tokenizer = load_tokenizer(tokenizer_dir)
    with PrivatePeak() as private:
        began = time.perf_counter()
        meta = KINDS[kind].open(corpus, tokenizer).meta
        tokens = sum(meta[name] for name in KINDS[kind].token_counts)
        seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "peaks": (most_resident(), private.bytes)}


def read_epoch(kind: str, corpus: Path, tokenizer_dir: Path, batch_size: int) -> dict[str, Any]:
    """Read a tokenised corpus shuffled as in training, and into the second epoch, which has an order of its own."""
    tokenizer = load_tokenizer(tokenizer_dir)
    with PrivatePeak() as private:
        rows = KINDS[kind].open(corpus, tokenizer).train
        began = time.perf_counter()
        order, batches = rows.order(0, batch_size), len(rows) // batch_size + 1
        for number in range(batches):
            rows.batch(order(number * batch_size, batch_size))
        seconds = time.perf_counter() - began
    return {"batches": batches, "seconds": seconds, "peaks": (most_resident(), private.bytes)}


def write_corpus(path: Path, kind: str, size: int) -> None:
    """Rows of the kind, at least `size` bytes, made of the bundled texts in random order; the same for the same size,
    and a larger file begins with a smaller one."""
    texts, draw = [row["text"] for row in bundled.pretraining_rows()], np.random.default_rng(0)

    def text(most: int) -> str:
        return " ".join(texts[i] for i in draw.integers(0, len(texts), draw.integers(1, most + 1)))

    written = 0
    with path.open("wb") as file:
        while written < size:
            written += file.write((json.dumps(KINDS[kind].row(text), ensure_ascii=False) + "\n").encode("utf-8"))


def _conversation(text: Callable[[int], str]) -> dict[str, Any]:
    turns = [("user", text(4)), ("assistant", text(16)), ("user", text(2)), ("assistant", text(8))]
    return {"conversations": [{"role": role, "content": content} for role, content in turns]}


def _cache(path: Path) -> dict[str, Path]:
    return {"data": path, "cache_dir": path.parent / "cache"}


@dataclass(frozen=True)
class Kind:
    """A kind of corpus: a row made of texts, the dataset, and the entries of its `meta` that count tokens."""

    row: Callable[[Callable[[int], str]], dict[str, Any]]
    open: Callable[..., Any]
    token_counts: tuple[str, ...]


KINDS = {
    "documents": Kind(
        lambda text: {"text": text(40)},
        lambda path, tokenizer: PretrainDataset(PretrainData(**_cache(path)), tokenizer),
        ("train_tokens", "validation_tokens"),
    ),
    "conversations": Kind(
        _conversation,
        lambda path, tokenizer: SFTDataset(DiffusionSFTData(**_cache(path)), tokenizer, False, 0),
        ("tokens",),
    ),
    "pairs": Kind(
        lambda text: {"prompt": text(4), "chosen": text(12), "rejected": text(12)},
        lambda path, tokenizer: PreferenceDataset(PreferenceData(**_cache(path)), tokenizer, "full", 0),
        ("tokens",),
    ),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Two Markdown tables of what `measure` returns: the corpora, and the lines of memory."""
    corpora = {
        "corpus": lambda row: row["kind"],
        "MB": lambda row: _megabytes(row["corpus_bytes"]),
        "tokenised MB/s": lambda row: f"{row['bytes_per_second'] / MEGABYTE:.2f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "batches/s": lambda row: f"{row['batches_per_second']:,.0f}",
    }
    for phase in ("build", "read"):
        corpora[f"{phase}: peak MB (private)"] = lambda row, phase=phase: (
            f"{_megabytes(row[f'{phase}_resident_bytes'])} ({_megabytes(row[f'{phase}_private_bytes'])})"
        )
    lines = {
        "corpus": lambda row: row["kind"],
        "memory": lambda row: ", ".join(row["memory"].split("_")[:2]),
        "bytes per byte of corpus": lambda row: f"{row['slope']:+.3f}",
        "intercept MB": lambda row: _megabytes(row["intercept_bytes"]),
        f"at {LARGE / 1e9:.0f} GB: MB": lambda row: (
            f"{(row['intercept_bytes'] + row['slope'] * LARGE) / MEGABYTE:,.0f}"
        ),
    }
    tables = (
        markdown((row for row in rows if "corpus_bytes" in row), corpora),
        markdown((row for row in rows if "slope" in row), lines),
    )
    return "\n\n".join(tables)


def _megabytes(count: float | None) -> str:
    return "unknown" if count is None else f"{count / MEGABYTE:.0f}"
