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
from dataset.tokenizer import PreTrainedTokenizerFast, load_tokenizer
from scripts.engine.bench.memory import in_own_process
from scripts.engine.bench.timing import Row

ROWS_PER_BATCH = 32
PEAKS = ("build: peak MB", "build: private MB", "read: peak MB", "read: private MB")
TOKEN_COUNTS = {"documents": ("train_tokens", "validation_tokens"), "conversations": ("tokens",), "pairs": ("tokens",)}


@dataclass(frozen=True)
class DataBenchmarkConfig:
    """Measuring the data pipeline."""

    data_kinds: Annotated[tuple[Literal[*TOKEN_COUNTS], ...], "kinds of synthetic corpora"] = tuple(TOKEN_COUNTS)
    data_megabytes: Annotated[tuple[int, ...], "sizes of the corpora, two of them", "at least 1"] = (8, 16, 32)

    def __post_init__(self) -> None:
        if len(set(self.data_megabytes)) < 2:
            sizes = ",".join(map(str, self.data_megabytes))
            raise ValueError(f"--data-megabytes {sizes}: a slope takes two sizes")


def measure_data(config: DataBenchmarkConfig, tokenizer_dir: Path) -> list[Row]:
    """A row for each kind and size, and one for each line of memory that is fitted to those of a kind."""
    rows = []
    for kind in config.data_kinds:
        corpora = []
        for megabytes in sorted(set(config.data_megabytes)):
            print(f"data: {megabytes} MB of {kind}", file=sys.stderr, flush=True)
            corpora.append(measured(kind, megabytes * 10**6, tokenizer_dir))
        rows += corpora
        for memory in PEAKS:
            peaks = [corpus[memory] for corpus in corpora]
            if None not in peaks:
                slope, intercept = np.polyfit([corpus["MB"] for corpus in corpora], peaks, 1).tolist()
                line = {"corpus": kind, "memory": memory, "bytes per byte of corpus": slope, "intercept MB": intercept}
                rows.append(line | {"at 20 GB: MB": intercept + slope * 20_000})
    return rows


def measured(kind: str, size: int, tokenizer_dir: Path) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, kind, size)
        row = {"corpus": kind, "MB": corpus.stat().st_size / 1e6}
        build, of_build = in_own_process(build_cache, kind, corpus, tokenizer_dir)
        read, of_read = in_own_process(read_epoch, kind, corpus, tokenizer_dir)
    peaks = [peak and peak / 1e6 for peak in (*of_build, *of_read)]
    return row | build | read | dict(zip(PEAKS, peaks, strict=True))


def build_cache(kind: str, corpus: Path, tokenizer_dir: Path) -> Row:
    """Tokenise a corpus."""
    tokenizer = load_tokenizer(tokenizer_dir)
    began = time.perf_counter()
    meta = open_corpus(kind, corpus, tokenizer).meta
    seconds = time.perf_counter() - began
    tokens = sum(meta[name] for name in TOKEN_COUNTS[kind])
    return {"tokenised MB/s": corpus.stat().st_size / 1e6 / seconds, "tokens/s": tokens / seconds}


def read_epoch(kind: str, corpus: Path, tokenizer_dir: Path) -> Row:
    """Read a tokenised corpus shuffled as in training, and into the second epoch, which has an order of its own."""
    rows = open_corpus(kind, corpus, load_tokenizer(tokenizer_dir)).train
    began = time.perf_counter()
    order, batches = rows.order(0, ROWS_PER_BATCH), len(rows) // ROWS_PER_BATCH + 1
    for number in range(batches):
        rows.batch(order(number * ROWS_PER_BATCH, ROWS_PER_BATCH))
    return {"batches/s": batches / (time.perf_counter() - began)}


def open_corpus(kind: str, path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The dataset of a kind; its cache, beside the corpus, is built if there is none."""
    place = {"data": path, "cache_dir": path.parent / "cache"}
    if kind == "documents":
        return PretrainDataset(PretrainData(**place), tokenizer)
    if kind == "conversations":
        return SFTDataset(DiffusionSFTData(**place), tokenizer, False, 0)
    return PreferenceDataset(PreferenceData(**place), tokenizer, "full", 0)


def write_corpus(path: Path, kind: str, size: int) -> None:
    """Rows of the kind, at least `size` bytes, made of the bundled texts in random order; the same for the same size,
    and a larger file begins with a smaller one."""
    texts, draw = [row["text"] for row in bundled.pretraining_rows()], np.random.default_rng(0)

    def text(most: int) -> str:
        return " ".join(texts[i] for i in draw.integers(0, len(texts), draw.integers(1, most + 1)))

    written = 0
    with path.open("wb") as file:
        while written < size:
            written += file.write((json.dumps(row_of(kind, text), ensure_ascii=False) + "\n").encode("utf-8"))


def row_of(kind: str, text: Callable[[int], str]) -> dict[str, Any]:
    """text(most): up to so many bundled texts."""
    if kind == "documents":
        return {"text": text(40)}
    if kind == "pairs":
        return {"prompt": text(4), "chosen": text(12), "rejected": text(12)}
    turns = [("user", text(4)), ("assistant", text(16)), ("user", text(2)), ("assistant", text(8))]
    return {"conversations": [{"role": role, "content": content} for role, content in turns]}
