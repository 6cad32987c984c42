"""Documents to token rows: a memory-mapped cache of token streams, and the views that cut rows out of them.

Each document becomes [BOS] + ids + [EOS] and goes, whole, to the training or to the validation stream. A stream is two
flat files, the tokens of all its documents back to back and the position where each document begins; batches are
gathered straight from there, so memory does not grow with the corpus.

Shapes: B rows asked for, L = seq_len tokens per row.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.disk_cache import cached_directory, source_key
from dataset.jsonl import content_hash, is_gzip_name, open_text, read_documents, text_format
from dataset.order import RowOrder
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch, fingerprint

FORMAT = 1  # counts changes of what the cache files mean; part of the key
SPLITS = ("train", "validation")
CHUNK_CHARACTERS = 2_000_000  # of text tokenised at a time: enough to keep all cores busy, some 100 MB of Python lists


@dataclass(frozen=True)
class TokenSplit:
    """One stream: `tokens` (uint16 or uint32) and `starts` (int64, ascending), the position of each document's BOS."""

    tokens: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class TokenCache:
    """Both streams of a corpus and what is known of them.

    `meta`: format, dtype, options, tokenizer (fingerprint), data_sha256 (of the unpacked file), rows, empty_rows, and
    per split documents, tokens (BOS and EOS included), characters and bytes (UTF-8) of the text behind them.
    """

    train: TokenSplit
    validation: TokenSplit
    meta: dict[str, Any]

    @classmethod
    def build_or_open(
        cls,
        path: Path,
        tokenizer: PreTrainedTokenizerFast,
        *,
        cache_dir: Path,
        field: str = "text",
        separator: str | None = None,
        val_fraction: float = 0.005,
    ) -> "TokenCache":
        """Tokenise `path` into `cache_dir`, or open what an earlier call left there for this file and these options.

        The key holds the file's path, size and modification time; a warm open does not read it. Which documents are
        validation says is_validation(text, val_fraction), of the text without `separator`. Where that picks none of
        several documents, the one with the smallest content_hash is taken, copies of it included, provided that
        others remain; val_fraction 0 means none. ValueError, FileNotFoundError: see dataset/jsonl.py.
        """
        options = {"field": field, "separator": separator, "val_fraction": val_fraction}
        build = _Build(Path(path), tokenizer, options)
        text_format(path)  # a wrong kind of file, or none, is refused before anything is made for it
        open_text(path).close()
        key = source_key(path, FORMAT, build.fingerprint, options)
        folder = cached_directory(Path(cache_dir), key, build.run, _fault)
        meta = _read_meta(folder)
        return cls(*(_open_split(folder, split, meta) for split in SPLITS), meta)


class PackedRows:
    """Rows of `seq_len` tokens cut out of one stream; row order is the caller's business.

    packing=True: row i is tokens[i*L:(i+1)*L], documents back to back, a long one going on in the next row; only the
    last row has padding. packing=False: each document alone, in as many rows as it needs, each padded.
    Either way every token of the stream is in exactly one row.
    """

    def __init__(self, split: TokenSplit, seq_len: int, packing: bool, pad_id: int):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, expected at least 1 token per row")
        self.split, self.seq_len, self.packing, self.pad_id = split, seq_len, packing, pad_id
        total = len(split.tokens)
        self._row_starts: np.ndarray | None = None
        if packing:  # extents are computed when asked for, so that the largest corpus costs nothing here
            self._num_rows = -(-total // seq_len)
        else:
            self._row_starts, self._row_ends = _document_rows(split.starts, total, seq_len)
            self._num_rows = len(self._row_starts)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def real_token_share(self) -> float:
        """Tokens that are not padding, as a share of all positions of all rows; 0 without rows."""
        return len(self.split.tokens) / (len(self) * self.seq_len) if len(self) else 0.0

    def order(self, seed: int, rows_per_step: int) -> RowOrder:
        return RowOrder(len(self), seed)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The rows (B,) as (B, L) tensors.

        input_ids int64; loss_mask bool, True on every real token, BOS and EOS included; document_ids int64, 0, 1, 2...
        along each row, -1 on padding. IndexError for a row that does not exist.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"row indices from {indices.min()} to {indices.max()}, but there are {len(self)} rows")
        starts, ends = self._extent(indices)
        positions = starts[:, None] + np.arange(self.seq_len)
        real = positions < ends[:, None]
        # Positions behind the row's end are padding, whatever is read for them; they must only exist.
        ids = self.split.tokens[np.minimum(positions, len(self.split.tokens) - 1)].astype(np.int64)
        ids[~real] = self.pad_id
        documents = self._count_documents(starts, ends)
        documents[~real] = -1
        arrays = {"input_ids": ids, "loss_mask": real, "document_ids": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _extent(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First position in the stream and one past the last, of each row."""
        if self._row_starts is not None:
            return self._row_starts[indices], self._row_ends[indices]
        starts = indices * self.seq_len
        return starts, np.minimum(starts + self.seq_len, len(self.split.tokens))

    def _count_documents(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(B, L): how many documents have begun since the row did, its first token not counted."""
        first = np.searchsorted(self.split.starts, starts, side="right")
        counts = np.searchsorted(self.split.starts, ends, side="left") - first
        rows = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        boundaries = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        boundaries[rows, self.split.starts[first[rows] + within] - starts[rows]] = 1
        return np.cumsum(boundaries, axis=1)


def _document_rows(starts: np.ndarray, total: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Extents of the rows when no two documents share one."""
    starts = np.asarray(starts)
    ends = np.append(starts[1:], total)[: len(starts)]
    pieces = -(-(ends - starts) // seq_len)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    row_starts = np.repeat(starts, pieces) + within * seq_len
    return row_starts, np.minimum(row_starts + seq_len, np.repeat(ends, pieces))


class _SplitWriter:
    """Appends documents to the two files of one stream and counts them."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.dtype = dtype
        self.counts = {"documents": 0, "tokens": 0, "characters": 0, "bytes": 0}
        self._tokens = (folder / f"{split}.tokens").open("wb")
        self._starts = (folder / f"{split}.starts").open("wb")

    def add(self, texts: list[str], documents: list[list[int]]) -> None:
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        starts = self.counts["tokens"] + np.cumsum(lengths) - lengths
        np.fromiter(chain.from_iterable(documents), self.dtype, int(lengths.sum())).tofile(self._tokens)
        starts.tofile(self._starts)
        self.counts["documents"] += len(documents)
        self.counts["tokens"] += int(lengths.sum())
        self.counts["characters"] += sum(map(len, texts))
        self.counts["bytes"] += sum(len(text.encode("utf-8")) for text in texts)

    def close(self) -> None:
        self._tokens.close()
        self._starts.close()


@dataclass
class _Smallest:
    """The training documents with the smallest content hash so far: who they are and how much text they hold."""

    value: int = 2**64
    documents: list[int] = field(default_factory=list)
    characters: int = 0
    bytes: int = 0

    def see(self, value: int, document: int, text: str) -> None:
        if value > self.value:
            return
        if value < self.value:
            self.value, self.documents, self.characters, self.bytes = value, [], 0, 0
        self.documents.append(document)
        self.characters += len(text)
        self.bytes += len(text.encode("utf-8"))


class _Build:
    """One pass over the corpus, from text to the files of a cache directory."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]):
        self.path, self.tokenizer, self.options = path, tokenizer, options
        self.fingerprint = fingerprint(tokenizer)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.rows = self.empty_rows = 0
        self.smallest = _Smallest()
        self.digest = hashlib.sha256()
        self.writers: dict[str, _SplitWriter] = {}

    def run(self, folder: Path) -> None:
        """Fill an empty directory; once per object."""
        began = time.monotonic()
        before = self.path.stat()
        self.writers = {split: _SplitWriter(folder, split, self.dtype) for split in SPLITS}
        try:
            for texts in _chunks(self._documents(before.st_size)):
                self._add(texts)
        finally:
            for writer in self.writers.values():
                writer.close()
        after = self.path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ValueError(f"{self.path} changed while it was read; run again when it is complete")
        counts = {split: writer.counts for split, writer in self.writers.items()}
        documents = self.smallest.documents
        others = counts["train"]["documents"] - len(documents)
        if self.options["val_fraction"] > 0 and counts["validation"]["documents"] == 0 and others:
            _move_to_validation(folder, self.smallest, counts, self.dtype)
        self._write_meta(folder, counts)
        tokens = sum(count["tokens"] for count in counts.values())
        seconds = time.monotonic() - began
        print(f"tokenised {self.rows:,} rows, {tokens / 1e6:.1f}M tokens in {seconds:.1f} s", file=sys.stderr)

    def _documents(self, file_size: int) -> Iterator[str]:
        """The non-empty texts; on the way the digest, the row counts and, on a terminal, the progress bar advance."""
        # How much text a .gz holds is not known, so its bar has a speed but no end. disable=None: terminals only.
        total = None if is_gzip_name(self.path) else file_size
        with tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def observe(line: bytes) -> None:
                self.digest.update(line)
                bar.update(len(line))

            for text in read_documents(self.path, self.options["field"], observe=observe):
                self.rows += 1
                self.empty_rows += not text
                if text:
                    yield text

    def _add(self, texts: list[str]) -> None:
        threshold = self.options["val_fraction"] * 2.0**64
        separator = (self.options["separator"] or "") if text_format(self.path) == ".jsonl" else ""
        hashes = [content_hash(text) for text in texts]
        texts = [text + separator for text in texts]
        try:
            encoded = encode_batch(self.tokenizer, texts)
        except ValueError as error:  # it knows the character, but not the file
            raise ValueError(f"{self.path}: {error}") from None
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        chosen: dict[str, tuple[list[str], list[list[int]]]] = {split: ([], []) for split in SPLITS}
        for value, text, ids in zip(hashes, texts, encoded, strict=True):
            # The comparison of is_validation, whose hash is needed for the smallest one, too.
            split_texts, documents = chosen["validation" if value < threshold else "train"]
            if value >= threshold:
                self.smallest.see(value, self.writers["train"].counts["documents"] + len(documents), text)
            split_texts.append(text)
            documents.append([bos, *ids, eos])
        for split, writer in self.writers.items():
            writer.add(*chosen[split])

    def _write_meta(self, folder: Path, counts: dict[str, dict[str, int]]) -> None:
        meta = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "options": self.options,
            "tokenizer": self.fingerprint,
            "data_sha256": self.digest.hexdigest(),
            "rows": self.rows,
            "empty_rows": self.empty_rows,
            **counts,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about CHUNK_CHARACTERS together; a single longer text is one list."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _move_to_validation(folder: Path, smallest: _Smallest, counts: dict[str, dict[str, int]], dtype: np.dtype) -> None:
    """Take documents out of the training stream to be the validation stream, and put the counts right."""
    tokens = np.memmap(folder / "train.tokens", dtype, mode="r")
    edges = np.append(np.fromfile(folder / "train.starts", np.int64), len(tokens))
    moved = np.array(smallest.documents)
    begins, ends = edges[moved], edges[moved + 1]
    _write_spans(folder / "validation.tokens", tokens, begins, ends)
    _write_spans(folder / "kept.tokens", tokens, np.append(0, ends), np.append(begins, len(tokens)))
    del tokens  # Windows replaces no file that is mapped
    os.replace(folder / "kept.tokens", folder / "train.tokens")
    lengths = np.diff(edges)
    for split, mine in (("validation", lengths[moved]), ("train", np.delete(lengths, moved))):
        (np.cumsum(mine) - mine).tofile(folder / f"{split}.starts")
        counts[split]["documents"], counts[split]["tokens"] = len(mine), int(mine.sum())
    for name in ("characters", "bytes"):
        counts["validation"][name] = getattr(smallest, name)
        counts["train"][name] -= counts["validation"][name]


def _write_spans(path: Path, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
    with path.open("wb") as file:
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            tokens[begin:end].tofile(file)


def _read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def _expected_sizes(meta: dict[str, Any]) -> dict[str, int]:
    item = np.dtype(meta["dtype"]).itemsize
    return {
        f"{split}.{name}": meta[split][count] * size
        for split in SPLITS
        for name, count, size in (("tokens", "tokens", item), ("starts", "documents", 8))
    }


def _fault(folder: Path) -> str | None:
    """What is wrong with a cache directory, judged by the sizes of its files, or None."""
    try:
        for name, size in _expected_sizes(_read_meta(folder)).items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable: {error!r}"
    return None


def _open_split(folder: Path, split: str, meta: dict[str, Any]) -> TokenSplit:
    return TokenSplit(
        _map(folder / f"{split}.tokens", np.dtype(meta["dtype"])), _map(folder / f"{split}.starts", np.dtype(np.int64))
    )


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
