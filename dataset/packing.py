"""Documents to token rows: a memory-mapped cache of token streams, and the views that cut rows out of them.

Each document becomes [BOS] + ids + [EOS] and goes, whole, to the training or to the validation stream. A stream is two
flat files: the tokens of all its documents back to back, and the position of each document's first token. Batches are
gathered straight from there, so memory does not grow with the corpus.

Shapes: B rows of a batch, L = seq_len tokens per row.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.bad_rows import BadRows
from dataset.cache import ArrayFiles, stretches
from dataset.jsonl import Observer, content_hash, held_out_threshold, read_documents, text_format
from dataset.order import RowOrder
from dataset.spelling import spelling_check
from dataset.tokenise import FileTokeniser
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch, fingerprint, token_dtype

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenSplit:
    """One stream: `tokens` (uint16 or uint32) and `starts` (int64, ascending), the position of each document's BOS."""

    tokens: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class DocumentOptions:
    """Options of tokenising a file of documents.

    control: text that spells a control token becomes that token.
    """

    field: str = "text"
    separator: str | None = None
    val_fraction: float = 0.005
    control: bool = False
    on_bad_row: str = "error"


@dataclass(frozen=True)
class TokenCache:
    """Both streams of a corpus and what is known of them.

    `meta`: tokenizer_fingerprint, data_sha256 (of the unpacked file), rows, and of them empty_rows and skipped_rows;
    skipped_first, the reasons for the first of those; and per split documents, tokens (BOS and EOS included),
    characters and bytes (UTF-8) of their text.
    """

    train: TokenSplit
    validation: TokenSplit
    meta: dict[str, Any]

    @classmethod
    def build_or_open(
        cls, path: Path, tokenizer: PreTrainedTokenizerFast, cache_dir: Path, options: DocumentOptions
    ) -> "TokenCache":
        """Tokenise `path` into `cache_dir`, or open what an earlier call left there (see FileTokeniser).

        Validation documents are those of is_validation(text, val_fraction), of the text without `separator`. If there
        is none, those with the smallest content_hash are taken (copies of one document), provided that others remain;
        val_fraction 0 means none.
        """
        arrays, meta = _DocumentTokeniser(path, tokenizer, options).open(cache_dir)
        return cls(*(TokenSplit(arrays[f"{split}.tokens"], arrays[f"{split}.starts"]) for split in SPLITS), meta)


class PackedRows:
    """Rows of `seq_len` tokens cut out of one stream.

    packing=True: row i is tokens[i*L:(i+1)*L], documents back to back, a long one going on in the next row; only the
    last row has padding. packing=False: each document alone, in as many rows as it needs, each padded.
    Either way every token of the stream is in exactly one row.
    separate_documents=False: the documents of a row see each other, so all of them get id 0.
    """

    def __init__(self, split: TokenSplit, seq_len: int, packing: bool, pad_id: int, separate_documents: bool = True):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, expected at least 1 token per row")
        self.split, self.seq_len, self.pad_id = split, seq_len, pad_id
        self.separate_documents = separate_documents
        total = len(split.tokens)
        # Packed rows need nothing in memory; unpacked ones 8 bytes for each document.
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
        """The rows `indices` (B,) as (B, L) tensors.

        input_ids int64; loss_mask bool, True on every real token, BOS and EOS included; document_ids int64, 0, 1, 2...
        along each row (all 0 unless separate_documents), -1 on padding. IndexError for a row that does not exist.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"row indices from {indices.min()} to {indices.max()}, but there are {len(self)} rows")
        starts, ends = self._extent(indices)
        positions = starts[:, None] + np.arange(self.seq_len)
        real = positions < ends[:, None]
        # After the row's end stands padding: what is read there is overwritten, but must exist.
        ids = self.split.tokens[np.minimum(positions, len(self.split.tokens) - 1)].astype(np.int64)
        ids[~real] = self.pad_id
        documents = self._count_documents(starts, ends) if self.separate_documents else np.zeros_like(ids)
        documents[~real] = -1
        arrays = {"input_ids": ids, "loss_mask": real, "document_ids": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _extent(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream of the first token of each row, and of the one after its last."""
        if self._first_rows is None:
            starts, ends = indices * self.seq_len, len(self.split.tokens)
        else:
            documents = np.searchsorted(self._first_rows, indices, side="right") - 1
            starts = self.split.starts[documents] + (indices - self._first_rows[documents]) * self.seq_len
            ends = _document_ends(self.split.starts, len(self.split.tokens), documents)
        return starts, np.minimum(starts + self.seq_len, ends)

    def _count_documents(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(B, L): number of documents that begin in the row after its first token, up to each position."""
        first = np.searchsorted(self.split.starts, starts, side="right")
        counts = np.searchsorted(self.split.starts, ends, side="left") - first
        rows = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        boundaries = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        boundaries[rows, self.split.starts[first[rows] + within] - starts[rows]] = 1
        return np.cumsum(boundaries, axis=1)


def _first_rows(starts: np.ndarray, total: int, seq_len: int) -> np.ndarray:
    """(documents + 1,) the first row of each document when no two share a row, and the number of rows."""
    first = np.zeros(len(starts) + 1, dtype=np.int64)
    for documents in stretches(len(starts)):
        pieces = -(-(_document_ends(starts, total, documents) - starts[documents]) // seq_len)
        first[documents + 1] = first[documents[0]] + np.cumsum(pieces)
    return first


def _document_ends(starts: np.ndarray, total: int, documents: np.ndarray) -> np.ndarray:
    """One past the last token of each of `documents` (N,)."""
    following = starts[np.minimum(documents + 1, len(starts) - 1)]
    return np.where(documents + 1 < len(starts), following, total)


class _DocumentTokeniser(FileTokeniser):
    """One pass over a corpus, from text to the streams of both splits."""

    unit, version = "rows", 3

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast, options: DocumentOptions):
        super().__init__(path, tokenizer, options.on_bad_row)
        self.document_options, self.options = options, (asdict(options),)
        self.separator = (options.separator or "") if text_format(path) == ".jsonl" else ""
        self.threshold: float = options.val_fraction * 2.0**64  # hashes below it are those of validation documents

    def dtypes(self) -> dict[str, Any]:
        kinds = {"tokens": token_dtype(self.tokenizer), "starts": np.int64}
        return {f"{split}.{name}": kind for split in SPLITS for name, kind in kinds.items()}

    def read_file(self, files: ArrayFiles) -> dict[str, Any]:
        meta = super().read_file(files)
        threshold = held_out_threshold(self.document_options.val_fraction, *self.hash_range)
        if threshold != self.threshold:  # so few documents that none was held out: once more, with one
            self.threshold = threshold
            files.clear()
            meta = super().read_file(files)
        return meta

    def read(self, observe: Observer, bad: BadRows) -> Iterator[str]:
        """The texts that are not empty."""
        self.rows = self.empty_rows = 0  # without the bad ones
        self.hash_range = 2**64, -1
        self.split_counts = {
            split: dict.fromkeys(("documents", "tokens", "characters", "bytes"), 0) for split in SPLITS
        }
        check = spelling_check(self.tokenizer, self.document_options.control)
        field = self.document_options.field
        for text in read_documents(self.path, field, bad, lambda text: check(text + self.separator), observe=observe):
            self.rows += 1
            if text:
                yield text
            else:
                self.empty_rows += 1

    def size(self, row: str) -> int:
        return len(row)

    def append(self, files: ArrayFiles, rows: list[str]) -> None:
        hashes = [content_hash(text) for text in rows]
        self.hash_range = min(self.hash_range[0], *hashes), max(self.hash_range[1], *hashes)
        texts = [text + self.separator for text in rows]
        encoded = encode_batch(self.tokenizer, texts, self.document_options.control)
        documents = [*zip(hashes, texts, encoded, strict=True)]
        self._append(files, "train", [(text, ids) for value, text, ids in documents if value >= self.threshold])
        self._append(files, "validation", [(text, ids) for value, text, ids in documents if value < self.threshold])

    def _append(self, files: ArrayFiles, split: str, documents: list[tuple[str, list[int]]]) -> None:
        """Append [BOS] + ids + [EOS] of every (text, ids) to a stream, and count them."""
        lengths = np.fromiter((len(ids) + 2 for _, ids in documents), np.int64, len(documents))
        ends = np.cumsum(lengths)
        begins = ends - lengths
        tokens = np.empty(lengths.sum(), files.dtypes[f"{split}.tokens"])
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[begins] = is_text[ends - 1] = False
        tokens[begins], tokens[ends - 1] = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = chain.from_iterable(ids for _, ids in documents)
        tokens[is_text] = np.fromiter(ids, tokens.dtype, len(tokens) - 2 * len(documents))
        files.append(f"{split}.starts", files.lengths[f"{split}.tokens"] + begins)
        files.append(f"{split}.tokens", tokens)
        counts = self.split_counts[split]
        counts["documents"] += len(documents)
        counts["tokens"] += len(tokens)
        counts["characters"] += sum(len(text) for text, _ in documents)
        counts["bytes"] += sum(len(text.encode("utf-8")) for text, _ in documents)

    def counts(self, files: ArrayFiles, bad: BadRows) -> dict[str, Any]:
        rows = {"rows": self.rows + bad.count, "empty_rows": self.empty_rows}
        return {"tokenizer_fingerprint": fingerprint(self.tokenizer), **rows, **self.split_counts}
