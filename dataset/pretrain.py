"""Pretraining data: a corpus of documents as token streams, and the rows that are cut out of them.

Each document becomes [BOS] + ids + [EOS] and goes, whole, to the training or to the validation stream. A stream is two
flat files: the tokens of all its documents back to back, and the position of each document's first token. Batches are
gathered straight from there, so memory does not grow with the corpus.

A canvas that ended with its document would give away the end: its length alone says where EOS stands, but a decoder's
canvas goes on. So for diffusion further EOS stand behind it: to the end of its last block, or so many at random.

Shapes: B rows of a batch, L = seq_len tokens per row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.cache import ArrayFiles, stretches
from dataset.content import content_hash, held_out_threshold
from dataset.corpus.bundled import bundled_file
from dataset.order import RowOrder
from dataset.reading.bad_rows import BadRows, OnBadRow, skipped_line
from dataset.reading.documents import read_documents
from dataset.reading.files import DATA_HELP, Observer, data_files, is_plain_text
from dataset.replies import log_uniform
from dataset.rows.kinds import note_on_training
from dataset.spelling import spelling_check
from dataset.tokenise import FileTokeniser
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch, fingerprint, token_dtype

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class PretrainData:
    """Where the corpus is and how it becomes rows; every field is a flag. ValueError on an impossible value."""

    data: Annotated[Path | None, f"corpus, rows or plain text; {DATA_HELP} (none: the bundled corpus)"] = None
    jsonl_field: Annotated[str, "field of a row that holds the document"] = "text"
    jsonl_sep: Annotated[
        str | None, r"text appended to each row; \n and \t mean line break and tab", "with character mode"
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "tokens per row", "--seq-len", "at least 2"] = 256
    packing: Annotated[bool, "documents back to back in a row; without it one document per row, padded"] = True
    use_doc_attention_mask: Annotated[bool, "the documents of a packed row do not see each other"] = True
    val_fraction: Annotated[float, "share of documents held out for validation, by content hash", "in [0, 1)"] = 0.005
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time"] = Path("dataset/.cache")
    control_tokens: Annotated[
        bool,
        "documents that spell control tokens, such as <|im_end|>, hold those tokens; BOS or EOS inside of one does not "
        "end it for attention, and one that spells the mask or padding token is a bad row",
    ] = False
    on_bad_row: OnBadRow = "error"

    eos_fill: ClassVar[int] = 0
    quantize_effective_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.jsonl_field:
            raise ValueError('--jsonl-field "": expected the name of a field')
        if self.data is not None and is_plain_text(data_files(self.data)[0]):
            if self.jsonl_sep is not None:
                raise ValueError(f"--jsonl-sep {self.jsonl_sep!r}: {self.data} has no rows; leave the flag out")
            if self.jsonl_field != "text":
                raise ValueError(f"--jsonl-field {self.jsonl_field}: {self.data} has no fields; leave the flag out")

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of --data, or without it the bundled corpus, which is written into the cache first."""
        return data_files(self.data) if self.data else (bundled_file("pretrain", self.cache_dir),)

    @property
    def separator(self) -> str | None:
        """jsonl_sep with \\n and \\t as the characters they stand for: a shell passes them on as two characters."""
        return self.jsonl_sep and self.jsonl_sep.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(frozen=True)
class DiffusionPretrainData(PretrainData):
    """Where the corpus is and how it becomes rows; every field is a flag."""

    quantize_effective_length: Annotated[
        bool,
        "EOS fill a document's last block, as decoding ends there; without it that block ends with the document",
        "with block diffusion",
        "--llada2-quantize-effective-length",
    ] = True
    eos_fill: Annotated[
        int,
        "a document's EOS is followed by a random number of others, up to so many: the empty end of the canvas",
        "in [0, 2^20]",
        "without block diffusion",
    ] = 16


@dataclass(frozen=True)
class TokenSplit:
    """One stream: `tokens` (uint16 or uint32) and `starts` (int64, ascending), the position of each document's BOS."""

    tokens: np.ndarray
    starts: np.ndarray


class DocumentFill(NamedTuple):
    """EOS behind each document: up to the end of its last block, or without blocks up to `longest`, at random."""

    eos_id: int
    block_size: int = 0
    longest: int = 0

    def after(self, lengths: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """How many stand behind each of `documents` (N,), numbered in their stream, of these lengths (N,)."""
        return -lengths % self.block_size if self.block_size else log_uniform(lengths, self.longest, documents)


class PackedRows:
    """Rows of `seq_len` tokens cut out of one stream.

    packing=True: row i is tokens[i*L:(i+1)*L], documents back to back, a long one going on in the next row; only the
    last row has padding. packing=False: each document alone, in as many rows as it needs, each padded.
    Either way every token of the stream is in exactly one row.
    separate_documents=False: the documents of a row see each other, so all of them get id 0.

    fill: rows are cut out of the stream in which each document is followed by its fill. In blocks, of which rows must
    be a multiple, every block of every row is then whole, and begins where it would if its document were alone. Fill at
    the beginning of a row, where no token of its document is seen, is left out as padding.
    """

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        packing: bool,
        pad_id: int,
        separate_documents: bool = True,
        fill: DocumentFill | None = None,
    ):
        self.split, self.seq_len, self.pad_id = split, seq_len, pad_id
        self.separate_documents, self.fill = separate_documents, fill
        # Where documents begin in the stream that rows are cut out of, and its length. Packed rows without fill need
        # nothing in memory, others 8 bytes for each document, or 16.
        self._starts, self._total = split.starts, len(split.tokens)
        if fill:
            filled = _filled_starts(split, fill, 0 if packing else seq_len)
            self._starts, self._total = filled[:-1], int(filled[-1])
        self._first_rows = None if packing else _first_rows(self._starts, self._total, seq_len)
        self._num_rows = -(-self._total // seq_len) if packing else int(self._first_rows[-1])

    def __len__(self) -> int:
        return self._num_rows

    @property
    def real_token_share(self) -> float:
        """Tokens that are not padding, fill included, as a share of all positions of all rows; 0 without rows."""
        return self._total / (len(self) * self.seq_len) if len(self) else 0.0

    @property
    def fill_share(self) -> float:
        """Fill as a share of these tokens."""
        return 1 - len(self.split.tokens) / max(self._total, 1)

    def order(self, seed: int, rows_per_step: int) -> RowOrder:
        return RowOrder(len(self), seed)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The rows `indices` (B,) as (B, L) tensors.

        input_ids int64; loss_mask bool, True on every real token, BOS and EOS included, and on the fill; document_ids
        int64, 0, 1, 2... along each row (all 0 unless separate_documents), -1 on padding. If there is a fill, `fill`
        bool, True on the EOS that are learnt but count as no tokens. IndexError for a row that does not exist.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"row indices from {indices.min()} to {indices.max()}, but there are {len(self)} rows")
        starts, ends = self._extent(indices)
        positions = starts[:, None] + np.arange(self.seq_len)
        real = positions < ends[:, None]
        owners = self._owners(starts, ends)
        if self.fill:
            shift = self.split.starts[owners] - self._starts[owners]  # to places in the stream without fill
            owner_ends = _document_ends(self.split.starts, len(self.split.tokens), owners)
            real &= starts[:, None] + shift < owner_ends
            positions, fill = positions + shift, real & (positions + shift >= owner_ends)
        # After the row's end stands padding: what is read there is overwritten, but must exist.
        ids = self.split.tokens[np.minimum(positions, len(self.split.tokens) - 1)].astype(np.int64)
        ids[~real] = self.pad_id
        documents = owners - owners[:, :1] if self.separate_documents else np.zeros_like(ids)
        documents[~real] = -1
        arrays = {"input_ids": ids, "loss_mask": real, "document_ids": documents}
        if self.fill:
            ids[fill] = self.fill.eos_id
            arrays["fill"] = fill
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _extent(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream of the first token of each row, and of the one after its last."""
        if self._first_rows is None:
            starts, ends = indices * self.seq_len, self._total
        else:
            documents = np.searchsorted(self._first_rows, indices, side="right") - 1
            starts = self._starts[documents] + (indices - self._first_rows[documents]) * self.seq_len
            ends = _document_ends(self._starts, self._total, documents)
        return starts, np.minimum(starts + self.seq_len, ends)

    def _owners(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(B, L): the number in the stream of each position's document; behind the row's end that of its last."""
        first = np.searchsorted(self._starts, starts, side="right")
        counts = np.searchsorted(self._starts, ends, side="left") - first
        rows = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        boundaries = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        boundaries[rows, self._starts[first[rows] + within] - starts[rows]] = 1
        return first[:, None] - 1 + np.cumsum(boundaries, axis=1)


def _filled_starts(split: TokenSplit, fill: DocumentFill, seq_len: int) -> np.ndarray:
    """(documents + 1,) where each document begins behind those before it and their fill, and where the last fill ends;
    seq_len > 0: within the last row of its document."""
    starts = np.zeros(len(split.starts) + 1, dtype=np.int64)
    for documents in stretches(len(split.starts)):
        lengths = _document_ends(split.starts, len(split.tokens), documents) - split.starts[documents]
        fills = fill.after(lengths, documents)
        if seq_len:
            fills = np.minimum(fills, -lengths % seq_len)
        elif not fill.block_size:
            fills[documents == len(split.starts) - 1] = 0  # no row of fill alone behind the others
        starts[documents + 1] = starts[documents[0]] + np.cumsum(lengths + fills)
    return starts


def _first_rows(starts: np.ndarray, total: int, seq_len: int) -> np.ndarray:
    """(documents + 1,) the first row of each document when no two share a row, and the number of rows."""
    first = np.zeros(len(starts) + 1, dtype=np.int64)
    for documents in stretches(len(starts)):
        pieces = -(-(_document_ends(starts, total, documents) - starts[documents]) // seq_len)
        first[documents + 1] = first[documents[0]] + np.cumsum(pieces)
    return first


def _document_ends(starts: np.ndarray, total: int, documents: np.ndarray) -> np.ndarray:
    """One past the last token of each of `documents`, of any shape."""
    following = starts[np.minimum(documents + 1, len(starts) - 1)]
    return np.where(documents + 1 < len(starts), following, total)


class DocumentTokeniser(FileTokeniser):
    """One pass over a corpus, from text to the streams of both splits."""

    unit, version, kind = "rows", 4, "text"

    def __init__(self, config: PretrainData, tokenizer: PreTrainedTokenizerFast):
        super().__init__(config.files, tokenizer, config.on_bad_row)
        self.field, self.control, self.val_fraction = config.jsonl_field, config.control_tokens, config.val_fraction
        self.separator = "" if is_plain_text(self.files[0]) else config.separator or ""
        self.options = self.field, self.separator, self.control, self.val_fraction
        self.threshold: float = self.val_fraction * 2.0**64  # hashes below it are those of validation documents

    def streams(self, cache_dir: Path) -> tuple[dict[str, TokenSplit], dict[str, Any]]:
        """(the stream of each split, what is known of the corpus), tokenised into the cache or found there.

        Validation documents are those of is_validation(text, val_fraction), of the text without separator. If there is
        none, those with the smallest content_hash are taken (copies of one document), provided that others remain;
        val_fraction 0 means none.
        """
        arrays, meta = self.open(cache_dir)
        return {split: TokenSplit(arrays[f"{split}.tokens"], arrays[f"{split}.starts"]) for split in SPLITS}, meta

    def dtypes(self) -> dict[str, Any]:
        kinds = {"tokens": token_dtype(self.tokenizer), "starts": np.int64}
        return {f"{split}.{name}": kind for split in SPLITS for name, kind in kinds.items()}

    def read_file(self, files: ArrayFiles) -> dict[str, Any]:
        meta = super().read_file(files)
        threshold = held_out_threshold(self.val_fraction, *self.hash_range)
        if threshold != self.threshold:  # so few documents that none was held out: once more, with one
            self.threshold = threshold
            files.clear()
            meta = super().read_file(files)
        return meta

    def read(self, observe: Observer, bad: BadRows) -> Iterator[str]:
        """The texts that are not empty."""
        self.rows = self.empty_rows = 0  # without the bad ones
        self.hash_range = 2**64, -1
        names = "documents", "tokens", "characters", "bytes"
        self.split_counts = {f"{split}_{name}": 0 for split in SPLITS for name in names}
        spellable = spelling_check(self.tokenizer, self.control)

        def check(text: str) -> None:
            spellable(text + self.separator)

        for file in self.files:
            for text in read_documents(file, self.field, bad, check, observe=observe):
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
        encoded = encode_batch(self.tokenizer, texts, self.control)
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
        counts = self.split_counts
        counts[f"{split}_documents"] += len(documents)
        counts[f"{split}_tokens"] += len(tokens)
        counts[f"{split}_characters"] += sum(len(text) for text, _ in documents)
        counts[f"{split}_bytes"] += sum(len(text.encode("utf-8")) for text, _ in documents)

    def counts(self, files: ArrayFiles, bad: BadRows) -> dict[str, Any]:
        return {
            "tokenizer_fingerprint": fingerprint(self.tokenizer),
            "rows": self.rows + bad.count,
            "empty_rows": self.empty_rows,
            **self.split_counts,
        }


class PretrainDataset:
    """`train` and `validation` rows (see PackedRows) and what is known of the corpus.

    `meta` is flat, for logs: tokenizer_fingerprint, data_sha256 (of the unpacked file), rows, and of them empty_rows
    and skipped_rows; skipped_first, the reasons for the first of those; for each split train_documents, train_tokens
    (BOS and EOS included), train_characters and train_bytes (UTF-8) of their text; real_token_share of the training
    rows. ValueError if nothing is left to train on.

    block_size > 0: every document ends with a block, and every row: a shorter one if max_seq_len ends within a block.
    """

    def __init__(self, config: PretrainData, tokenizer: PreTrainedTokenizerFast, block_size: int = 0):
        tokeniser = DocumentTokeniser(config, tokenizer)
        self.config, self.source = config, tokeniser.source
        streams, self.meta = tokeniser.streams(config.cache_dir)
        size = min(block_size, config.max_seq_len) if config.quantize_effective_length else 0
        seq_len = config.max_seq_len - config.max_seq_len % max(size, 1)
        longest = 0 if block_size else min(config.eos_fill, seq_len - 1)
        fill = DocumentFill(tokenizer.eos_token_id, size, longest) if size or longest else None
        layout = seq_len, config.packing, tokenizer.pad_token_id, config.use_doc_attention_mask, fill
        self.train = PackedRows(streams["train"], *layout)
        self.validation = PackedRows(streams["validation"], *layout)
        self.meta["real_token_share"] = self.train.real_token_share
        if not len(self.train):
            raise ValueError(self._why_empty())

    def describe(self) -> str:
        """Two lines for people, and one on bad rows if there are any."""
        meta = self.meta
        characters = meta["train_characters"] + meta["validation_characters"]
        text_tokens = meta["train_tokens"] + meta["validation_tokens"]
        text_tokens -= 2 * (meta["train_documents"] + meta["validation_documents"])  # without BOS and EOS
        empty = f" ({meta['empty_rows']:,} empty ones skipped)" if meta["empty_rows"] else ""
        bundled = "" if self.config.data else "no --data, so the bundled corpus is used: "
        real = f"{self.train.real_token_share:.1%} real tokens"
        real += f", {self.train.fill_share:.1%} of them EOS behind documents" if self.train.fill else ""
        lines = (
            f"{bundled}{self.source}: {meta['rows']:,} rows{empty}, "
            f"{characters / max(text_tokens, 1):.2f} characters per token\n"
            f"train {meta['train_documents']:,} documents, {meta['train_tokens']:,} tokens, "
            f"{len(self.train):,} rows of {self.train.seq_len} with {real}; "
            f"validation {meta['validation_documents']:,} documents, {meta['validation_tokens']:,} tokens"
        )
        note = note_on_training(self.config.data, "text", self.config.jsonl_field)
        return "\n".join(filter(None, (lines, skipped_line(meta), note)))

    def _why_empty(self) -> str:
        path, meta = self.source, self.meta
        if not meta["validation_documents"]:
            bad = " or bad" if meta["skipped_rows"] else ""
            return f"{path} has nothing to train on: all {meta['rows']:,} rows are empty{bad}"
        return (
            f"{path} has nothing to train on: all {meta['validation_documents']:,} documents are held out by "
            f"--val-fraction {self.config.val_fraction}; lower it, or give more data"
        )
