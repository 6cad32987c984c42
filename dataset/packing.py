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
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.cache import (
    ArrayFiles,
    cached_directory,
    fault_of_sizes,
    map_array,
    read_meta,
    source_key,
    stretches,
    unchanged,
)
from dataset.jsonl import BadRows, chunked, content_hash, is_gzip_name, open_text, read_documents, text_format
from dataset.order import RowOrder
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch, fingerprint, token_dtype

FORMAT = 2  # counts changes of what the cache files mean; part of the key
SPLITS = ("train", "validation")
CHUNK_CHARACTERS = 1_000_000  # of text tokenised at a time: enough to keep all cores busy, some 50 MB of Python lists


@dataclass(frozen=True)
class TokenSplit:
    """One stream: `tokens` (uint16 or uint32) and `starts` (int64, ascending), the position of each document's BOS."""

    tokens: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class TokenCache:
    """Both streams of a corpus and what is known of them.

    `meta`: format, dtype, options, tokenizer (fingerprint), data_sha256 (of the unpacked file), rows, and of them
    empty_rows and skipped_rows; skipped_first, what was wrong with the first of those; and per split documents, tokens
    (BOS and EOS included), characters and bytes (UTF-8) of the text behind them.
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
        control: bool = False,
        on_bad_row: str = "error",
    ) -> "TokenCache":
        """Tokenise `path` into `cache_dir`, or open what an earlier call left there for this file and these options.

        The key holds the file's path, size and modification time; a warm open does not read it. Which documents are
        validation says is_validation(text, val_fraction), of the text without `separator`. Where that picks none of
        several documents, the one with the smallest content_hash is taken, copies of it included, provided that
        others remain; val_fraction 0 means none. control: text that spells a control token becomes that token.
        ValueError, FileNotFoundError: see dataset/jsonl.py, as for on_bad_row.
        """
        options = {"field": field, "separator": separator, "val_fraction": val_fraction}
        options |= {"control": control, "on_bad_row": on_bad_row}
        build = _Build(Path(path), tokenizer, options)
        text_format(path)  # a wrong kind of file, or none, is refused before anything is made for it
        open_text(path).close()
        key = source_key(path, FORMAT, build.fingerprint, options)
        folder = cached_directory(Path(cache_dir), key, build.run, _fault)
        meta = read_meta(folder)
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
        # Extents are computed when asked for: the largest corpus costs nothing here, or 8 bytes for each document.
        self._first_rows = None if packing else _first_rows(split.starts, total, seq_len)
        self._num_rows = -(-total // seq_len) if packing else int(self._first_rows[-1])

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
        if self._first_rows is None:
            starts, ends = indices * self.seq_len, len(self.split.tokens)
        else:
            documents = np.searchsorted(self._first_rows, indices, side="right") - 1
            starts = self.split.starts[documents] + (indices - self._first_rows[documents]) * self.seq_len
            ends = _document_ends(self.split.starts, len(self.split.tokens), documents)
        return starts, np.minimum(starts + self.seq_len, ends)

    def _count_documents(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(B, L): how many documents have begun since the row did, its first token not counted."""
        first = np.searchsorted(self.split.starts, starts, side="right")
        counts = np.searchsorted(self.split.starts, ends, side="left") - first
        rows = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        boundaries = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        boundaries[rows, self.split.starts[first[rows] + within] - starts[rows]] = 1
        return np.cumsum(boundaries, axis=1)


def _first_rows(starts: np.ndarray, total: int, seq_len: int) -> np.ndarray:
    """(documents + 1,) the number of each document's first row when no two share one, and the number of rows."""
    first = np.zeros(len(starts) + 1, dtype=np.int64)
    for documents in stretches(len(starts)):
        pieces = -(-(_document_ends(starts, total, documents) - starts[documents]) // seq_len)
        first[documents + 1] = first[documents[0]] + np.cumsum(pieces)
    return first


def _document_ends(starts: np.ndarray, total: int, documents: np.ndarray) -> np.ndarray:
    """One past the last token of each of `documents` (N,)."""
    following = starts[np.minimum(documents + 1, len(starts) - 1)]
    return np.where(documents + 1 < len(starts), following, total)


class _SplitWriter:
    """Appends documents to the two arrays of one stream and counts them."""

    def __init__(self, files: ArrayFiles, split: str, bos_id: int, eos_id: int):
        self.files, self.split, self.bos_id, self.eos_id = files, split, bos_id, eos_id
        self.counts = {"documents": 0, "tokens": 0, "characters": 0, "bytes": 0}

    def add(self, texts: list[str], documents: list[list[int]]) -> None:
        """`documents`: the ids of each text, without BOS and EOS."""
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 2
        ends = np.cumsum(lengths)
        tokens = np.empty(lengths.sum(), self.files.dtypes[f"{self.split}.tokens"])
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[ends - lengths] = is_text[ends - 1] = False
        tokens[ends - lengths], tokens[ends - 1] = self.bos_id, self.eos_id
        tokens[is_text] = np.fromiter(chain.from_iterable(documents), tokens.dtype, len(tokens) - 2 * len(documents))
        self.files.append(f"{self.split}.tokens", tokens)
        self.files.append(f"{self.split}.starts", self.counts["tokens"] + ends - lengths)
        self.counts["documents"] += len(documents)
        self.counts["tokens"] += int(lengths.sum())
        self.counts["characters"] += sum(map(len, texts))
        self.counts["bytes"] += sum(len(text.encode("utf-8")) for text in texts)


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
        self.dtype = token_dtype(tokenizer)
        self.rows = self.empty_rows = 0  # without the bad ones
        self.bad = BadRows(options["on_bad_row"])
        self.separator = (options["separator"] or "") if text_format(path) == ".jsonl" else ""
        self.smallest = _Smallest()
        self.digest = hashlib.sha256()
        self.writers: dict[str, _SplitWriter] = {}

    def run(self, folder: Path) -> None:
        """Fill an empty directory; once per object."""
        began = time.monotonic()
        kinds = {"tokens": self.dtype, "starts": np.int64}
        dtypes = {f"{split}.{name}": kind for split in SPLITS for name, kind in kinds.items()}
        with unchanged(self.path), ArrayFiles(folder, dtypes) as files:
            ids = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            self.writers = {split: _SplitWriter(files, split, *ids) for split in SPLITS}
            for texts in chunked(self._documents(), len, CHUNK_CHARACTERS):
                self._add(texts)
        counts = {split: writer.counts for split, writer in self.writers.items()}
        documents = self.smallest.documents
        others = counts["train"]["documents"] - len(documents)
        if self.options["val_fraction"] > 0 and counts["validation"]["documents"] == 0 and others:
            _move_to_validation(folder, self.smallest, counts, self.dtype)
        self._write_meta(folder, counts)
        tokens = sum(count["tokens"] for count in counts.values())
        seconds = time.monotonic() - began
        print(
            f"tokenised {self.rows + self.bad.count:,} rows, {tokens / 1e6:.1f}M tokens in {seconds:.1f} s",
            file=sys.stderr,
        )

    def _documents(self) -> Iterator[str]:
        """The non-empty texts; on the way the digest, the row counts and, on a terminal, the progress bar advance."""
        # How much text a .gz holds is not known, so its bar has a speed but no end. disable=None: terminals only.
        total = None if is_gzip_name(self.path) else self.path.stat().st_size
        check = spelling_check(self.tokenizer, self.options["control"])
        with tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def observe(line: bytes) -> None:
                self.digest.update(line)
                bar.update(len(line))

            checked = self.bad, lambda text: check(text + self.separator)
            for text in read_documents(self.path, self.options["field"], *checked, observe=observe):
                self.rows += 1
                self.empty_rows += not text
                if text:
                    yield text

    def _add(self, texts: list[str]) -> None:
        threshold = self.options["val_fraction"] * 2.0**64
        hashes = [content_hash(text) for text in texts]
        texts = [text + self.separator for text in texts]
        encoded = encode_batch(self.tokenizer, texts, self.options["control"])
        chosen: dict[str, tuple[list[str], list[list[int]]]] = {split: ([], []) for split in SPLITS}
        for value, text, ids in zip(hashes, texts, encoded, strict=True):
            # The comparison of is_validation, whose hash is needed for the smallest one, too.
            split_texts, documents = chosen["validation" if value < threshold else "train"]
            if value >= threshold and not self.writers["validation"].counts["documents"]:
                self.smallest.see(value, self.writers["train"].counts["documents"] + len(documents), text)
            split_texts.append(text)
            documents.append(ids)
        for split, writer in self.writers.items():
            writer.add(*chosen[split])

    def _write_meta(self, folder: Path, counts: dict[str, dict[str, int]]) -> None:
        meta = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "options": self.options,
            "tokenizer": self.fingerprint,
            "data_sha256": self.digest.hexdigest(),
            "rows": self.rows + self.bad.count,
            "empty_rows": self.empty_rows,
            **self.bad.meta,
            **counts,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


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
        (folder / f"{split}.starts").write_bytes((np.cumsum(mine) - mine).data)
        counts[split]["documents"], counts[split]["tokens"] = len(mine), int(mine.sum())
    for name in ("characters", "bytes"):
        counts["validation"][name] = getattr(smallest, name)
        counts["train"][name] -= counts["validation"][name]


def _write_spans(path: Path, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
    with path.open("wb") as file:
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            file.write(tokens[begin:end].data)


def _expected_sizes(meta: dict[str, Any]) -> dict[str, int]:
    item = np.dtype(meta["dtype"]).itemsize
    return {
        f"{split}.{name}": meta[split][count] * size
        for split in SPLITS
        for name, count, size in (("tokens", "tokens", item), ("starts", "documents", 8))
    }


def _fault(folder: Path) -> str | None:
    """What is wrong with a cache directory, judged by the sizes of its files, or None."""
    return fault_of_sizes(folder, _expected_sizes)


def _open_split(folder: Path, split: str, meta: dict[str, Any]) -> TokenSplit:
    kinds = {"tokens": meta["dtype"], "starts": np.int64}
    return TokenSplit(*(map_array(folder / f"{split}.{name}", kind) for name, kind in kinds.items()))
