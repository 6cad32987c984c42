"""Speed and memory of the data pipeline on growing synthetic corpora; every measurement has a process of its own.

Memory is a line in the size of the corpus, bytes = intercept + slope * corpus bytes; a slope near zero is what lets a
corpus be larger than memory. Private bytes are what a process holds for itself and cannot give back; resident bytes
count the pages of mapped files besides, which the system takes back when it needs them.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from dataset.corpus import bundled
from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.sft import DiffusionSFTData, SFTDataset
from dataset.tokenizer import load_tokenizer
from scripts.engine.runtime import most_resident

ROOT = Path(__file__).resolve().parents[3]
MEGABYTE = 10**6
LARGE = 20 * 10**9  # bytes of the corpus for which the table extrapolates
MEMORIES = ("resident", "private")
PHASES = ("build", "read")
SAMPLED_EVERY = 0.005  # seconds between two looks at the memory that the system keeps no peak of
CHILD = "import sys; from scripts.engine.bench.data import _work; _work(*sys.argv[1:])"


@dataclass(frozen=True)
class DataBenchmarkConfig:
    """Measuring the data pipeline."""

    data_kinds: Annotated[tuple[str, ...], "kinds of synthetic corpora: documents, conversations, pairs"] = (
        "documents",
        "conversations",
        "pairs",
    )
    data_megabytes: Annotated[tuple[int, ...], "sizes of the synthetic corpora, in MB; two at least"] = (8, 16, 32)
    data_rows_per_batch: Annotated[int, "rows of a batch that is read"] = 32
    data_tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")

    def __post_init__(self) -> None:
        unknown = set(self.data_kinds) - KINDS.keys()
        if unknown or not self.data_kinds:
            raise ValueError(f"--data-kinds {','.join(self.data_kinds)}: expected some of {', '.join(KINDS)}")
        if len(set(self.data_megabytes)) < 2 or min(self.data_megabytes) < 1:
            sizes = ",".join(map(str, self.data_megabytes))
            raise ValueError(f"--data-megabytes {sizes}: a slope takes two sizes of at least 1 MB")
        if self.data_rows_per_batch < 1:
            raise ValueError(f"--data-rows-per-batch {self.data_rows_per_batch}: expected at least 1")


def measure(config: DataBenchmarkConfig) -> list[dict[str, Any]]:
    """A row for each kind and size, and behind those of a kind one for each fitted line.

    Of a corpus: seconds, bytes_per_second and tokens_per_second of tokenisation, batches_per_second of one epoch of
    shuffled reading and one batch more, and the peaks build_resident_bytes, build_private_bytes, read_resident_bytes,
    read_private_bytes (private: None where the system does not tell). Of a line: memory (the peak's name), slope and
    intercept_bytes.
    """
    rows = []
    for kind in config.data_kinds:
        measured = []
        for megabytes in sorted(set(config.data_megabytes)):
            print(f"data: {megabytes} MB of {kind}", file=sys.stderr, flush=True)
            measured.append(_measured(kind, megabytes * MEGABYTE, config))
        rows += measured
        sizes = [row["corpus_bytes"] for row in measured]
        for name in (f"{phase}_{memory}_bytes" for phase in PHASES for memory in MEMORIES):
            peaks = [row[name] for row in measured]
            if None not in peaks:
                slope, intercept = np.polyfit(sizes, peaks, 1).tolist()
                rows.append({"kind": kind, "memory": name, "slope": slope, "intercept_bytes": intercept})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Two Markdown tables of what `measure` returns: the corpora, and the lines of memory."""
    lines = [
        "| corpus | MB | tokenised MB/s | tokens/s | batches/s | build: peak MB (private) | read: peak MB (private) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "corpus_bytes" in row:
            peaks = [
                f"{row[f'{phase}_resident_bytes'] / MEGABYTE:.0f} ({_megabytes(row[f'{phase}_private_bytes'])})"
                for phase in PHASES
            ]
            lines.append(
                f"| {row['kind']} | {row['corpus_bytes'] / MEGABYTE:.0f} | {row['bytes_per_second'] / MEGABYTE:.2f} | "
                f"{row['tokens_per_second']:,.0f} | {row['batches_per_second']:,.0f} | {' | '.join(peaks)} |"
            )
    lines += [
        "",
        f"| corpus | memory | bytes per byte of corpus | intercept MB | at {LARGE / 1e9:.0f} GB: MB |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        if "slope" in row:
            phase, memory, _ = row["memory"].split("_")
            large = row["intercept_bytes"] + row["slope"] * LARGE
            lines.append(
                f"| {row['kind']} | {phase}, {memory} | {row['slope']:+.3f} | {row['intercept_bytes'] / MEGABYTE:.0f} "
                f"| {large / MEGABYTE:,.0f} |"
            )
    return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / MEGABYTE:.0f}"


def _measured(kind: str, size: int, config: DataBenchmarkConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        _write(corpus, kind, size)
        arguments = [kind, str(corpus), str(config.data_tokenizer_dir.resolve()), str(config.data_rows_per_batch)]
        found = {phase: _in_a_process(phase, *arguments) for phase in PHASES}
        build, corpus_bytes = found["build"], corpus.stat().st_size
    return {
        "kind": kind,
        "corpus_bytes": corpus_bytes,
        "tokens": build["tokens"],
        "seconds": build["seconds"],
        "bytes_per_second": corpus_bytes / build["seconds"],
        "tokens_per_second": build["tokens"] / build["seconds"],
        "batches_per_second": found["read"]["batches"] / found["read"]["seconds"],
        **{f"{phase}_{memory}_bytes": found[phase][memory] for phase in PHASES for memory in MEMORIES},
    }


def _in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measuring process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(phase: str, kind: str, corpus: str, tokenizer_dir: str, rows_per_batch: str) -> None:
    """One measurement, in a process of its own; prints it as JSON."""
    tokenizer = load_tokenizer(Path(tokenizer_dir))
    path = Path(corpus)
    with _PrivatePeak() as private:
        began = time.perf_counter()
        dataset = KINDS[kind].open(path, tokenizer)
        if phase == "build":
            found = {"tokens": sum(KINDS[kind].tokens(dataset.meta)), "seconds": time.perf_counter() - began}
        else:
            found = _read_an_epoch(dataset.train, int(rows_per_batch))
    print(json.dumps(found | {"resident": most_resident(), "private": private.bytes}))


def _read_an_epoch(rows: Any, size: int) -> dict[str, Any]:
    """Shuffled as in training, and into the second epoch, which has an order of its own."""
    began = time.perf_counter()
    order, batches = rows.order(0, size), len(rows) // size + 1
    for number in range(batches):
        rows.batch(order(number * size, size))
    return {"batches": batches, "seconds": time.perf_counter() - began}


class _PrivatePeak:
    """The most memory seen that the process holds for itself alone; None where the system does not tell."""

    def __enter__(self) -> "_PrivatePeak":
        self.bytes = _status("RssAnon")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.bytes is not None and not self._ended.wait(SAMPLED_EVERY):
            self.bytes = max(self.bytes, _status("RssAnon"))


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith(name + ":")]
    return int(found[0]) * 1024 if found else None


def _write(path: Path, kind: str, size: int) -> None:
    """Rows of the kind, at least `size` bytes, made of the bundled texts in random order; the same for the same size,
    and a larger file begins with a smaller one."""
    texts, draw = [row["text"] for row in bundled.pretraining_rows()], np.random.default_rng(0)

    def some(most: int) -> str:
        return " ".join(texts[i] for i in draw.integers(0, len(texts), draw.integers(1, most + 1)))

    written = 0
    with path.open("wb") as file:
        while written < size:
            written += file.write((json.dumps(KINDS[kind].row(some), ensure_ascii=False) + "\n").encode("utf-8"))


@dataclass(frozen=True)
class _Kind:
    row: Callable[[Callable[[int], str]], dict[str, Any]]
    open: Callable[..., Any]
    tokens: Callable[[dict[str, Any]], Iterator[int]]


def _cache(path: Path) -> dict[str, Path]:
    return {"data": path, "cache_dir": path.parent / "cache"}


def _conversation(some: Callable[[int], str]) -> dict[str, Any]:
    turns = [("user", some(4)), ("assistant", some(16)), ("user", some(2)), ("assistant", some(8))]
    return {"conversations": [{"role": role, "content": content} for role, content in turns]}


KINDS = {
    "documents": _Kind(
        lambda some: {"text": some(40)},
        lambda path, tokenizer: PretrainDataset(PretrainData(**_cache(path)), tokenizer),
        lambda meta: (meta[name] for name in ("train_tokens", "validation_tokens")),
    ),
    "conversations": _Kind(
        _conversation,
        lambda path, tokenizer: SFTDataset(DiffusionSFTData(**_cache(path)), tokenizer, False, 0),
        lambda meta: (meta[name] for name in ("tokens",)),
    ),
    "pairs": _Kind(
        lambda some: {"prompt": some(4), "chosen": some(12), "rejected": some(12)},
        lambda path, tokenizer: PreferenceDataset(PreferenceData(**_cache(path)), tokenizer, "full", 0),
        lambda meta: (meta[name] for name in ("tokens",)),
    ),
}
