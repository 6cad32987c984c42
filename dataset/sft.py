"""Supervised fine-tuning data: conversations in four row formats, and the rows that learn their replies.

To add a row format, write a function (row) -> messages and list it in FORMATS with the fields that it needs.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from dataset.cache import ArrayFiles, cached_arrays, stretches
from dataset.corpus.bundled import bundled_file
from dataset.jsonl import (
    JSON_TYPES,
    BadRows,
    Check,
    OnBadRow,
    chunked,
    content_hash,
    open_text,
    read_as,
    read_lines,
    text_format,
    told_skipped,
)
from dataset.order import STEPS_PER_WINDOW
from dataset.replies import (
    Conversations,
    ReplyRows,
    StreamedRows,
    apart,
    items_of,
    rows_begin,
    shortened,
)
from dataset.spelling import spelling_check
from dataset.tokenizer import (
    ChatIds,
    PreTrainedTokenizerFast,
    checked_messages,
    encode_conversations,
    fingerprint,
    render_chat,
    token_dtype,
)

FORMAT = 3  # counts changes of what the cache files mean; part of the key
CHUNK_CHARACTERS = 1_000_000  # of messages tokenised at a time
TEMPLATE_CHARACTERS = 30  # that a message has around it, about
STREAM_VALIDATION = 256, 20_000  # streaming: held-out conversations wanted, and rows read in search of them
SKETCH = 1 << 20  # bytes by which a stream is known
SKETCHED = f"its first {SKETCH:,} bytes, unpacked"

Messages = list[dict[str, str]]


def _instruction(row: dict[str, Any]) -> Messages:
    asked, more = _text(row, "instruction"), "" if row.get("input") is None else _text(row, "input")
    return _exchange(f"{asked}\n{more}" if more else asked, _text(row, "output"))


def _exchange(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(row[name])]}, expected a string')
    return row[name]


class RowFormat(NamedTuple):
    fields: tuple[str, ...]  # that a row of this format has
    messages: Callable[[dict[str, Any]], Messages]


FORMATS = {
    "conversations": RowFormat(("conversations",), lambda row: row["conversations"]),
    "messages": RowFormat(("messages",), lambda row: row["messages"]),
    "instruction": RowFormat(("instruction", "output"), _instruction),
    "prompt": RowFormat(("prompt", "response"), lambda row: _exchange(_text(row, "prompt"), _text(row, "response"))),
}


def messages_of(row: dict[str, Any]) -> Messages:
    """The conversation of a row, [{"role", "content"}, ...]. ValueError: no known format, or no proper conversation."""
    for row_format in FORMATS.values():
        if all(name in row for name in row_format.fields):
            messages = row_format.messages(row)
            break
    else:
        known = ", ".join(" + ".join(row_format.fields) for row_format in FORMATS.values())
        raise ValueError(f"expected the fields of a conversation ({known}); fields present: {', '.join(row) or 'none'}")
    if not isinstance(messages, list):
        raise ValueError(f"the conversation is {JSON_TYPES[type(messages)]}, expected an array of messages")
    if not any(role == "assistant" for role, _ in checked_messages(messages)):
        raise ValueError("the conversation has no assistant message, so nothing can be learnt from it")
    return messages


@dataclass(frozen=True)
class SFTData:
    """Where the conversations are and how they become rows; every field is a flag. ValueError on impossible values."""

    data: Annotated[
        Path | None,
        "conversations: JSONL, may be .gz; rows of conversations, messages, instruction or prompt "
        "(none: the bundled ones)",
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest row, in tokens; longer ones are shortened", "--seq-len"] = 512
    val_fraction: Annotated[float, "share of rows held out for validation, 0 to below 1, by content hash"] = 0.005
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time"] = Path("dataset/.cache")
    streaming: Annotated[bool, "read and tokenise while training, in the order of the file; keeps no cache"] = False
    steps_per_epoch: Annotated[int | None, "with --streaming: optimizer steps that count as one epoch"] = None
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        if self.max_seq_len < 16:
            raise ValueError(f"--max-seq-len {self.max_seq_len}: expected at least 16 tokens per row")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: expected a share from 0 to below 1")
        if self.streaming != (self.steps_per_epoch is not None):
            raise ValueError("--streaming and --steps-per-epoch need each other: how long a stream is, is not known")
        if self.steps_per_epoch is not None and not 1 <= self.steps_per_epoch <= 10**9:
            raise ValueError(f"--steps-per-epoch {self.steps_per_epoch}: expected 1 to a billion")
        if self.data is not None and text_format(self.data) != ".jsonl":
            raise ValueError(f"--data {self.data}: expected JSONL rows, one conversation each")

    @property
    def source(self) -> Path:
        """--data, or without it the bundled conversations, which are written into the cache first."""
        return self.data or bundled_file("sft", self.cache_dir)


@dataclass(frozen=True)
class DiffusionSFTData(SFTData):
    """Where the conversations are and how they become rows."""

    eos_fill: Annotated[
        int, "a reply's EOS is followed by a random number of others, up to so many: the empty end of the canvas"
    ] = 128
    quantize_effective_length: Annotated[
        bool,
        "block diffusion: EOS fill the reply's last block and nothing behind it, as decoding ends there",
        "--llada2-quantize-effective-length",
    ] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eos_fill <= 2**20:
            raise ValueError(f"--eos-fill {self.eos_fill}: expected 0 to {2**20}")


class SFTDataset:
    """`train` and `validation` rows (ReplyRows) and what is known of the file.

    all_replies: whether the replies of a conversation are learnt in one row (autoregressive) or one row each
    (diffusion). rows_per_step is needed for streaming only. block_size: see ReplyRows. `meta` is flat, for logs.
    ValueError with file and row for a bad row, and if nothing is left to train on.
    """

    def __init__(
        self,
        config: SFTData,
        tokenizer: PreTrainedTokenizerFast,
        all_replies: bool,
        rows_per_step: int,
        block_size: int = 0,
    ) -> None:
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ValueError(
                f"the tokenizer in {config.tokenizer_dir} pads with EOS, which is to be learnt; it needs both"
            )
        try:
            encode_conversations(tokenizer, [[{"role": "user", "content": ""}]])
        except ValueError as error:
            raise ValueError(
                f"the tokenizer in {config.tokenizer_dir} cannot spell the chat template: {error}"
            ) from None
        self.config, self.tokenizer, self.all_replies, self.source = config, tokenizer, all_replies, config.source
        self.block_size = block_size
        if config.streaming:
            self._open_stream(STEPS_PER_WINDOW * rows_per_step, config.steps_per_epoch * rows_per_step)
        else:
            self._open_file()

    def describe(self) -> str:
        """Lines for people."""
        meta, train = self.meta, self.train
        if self.config.streaming:
            source, train = f"streamed, with an epoch of {len(train):,} rows; of the first window:", train.window
        else:
            source = f"{meta['conversations']:,} conversations, {meta['replies']:,} replies"
        bundled = "" if self.config.data else "no --data, so the bundled conversations are used: "
        left_out = f" ({meta['empty_replies']:,} empty replies left out)" if meta["empty_replies"] else ""
        told = (
            f"{bundled}{self.source}: {source}{left_out}\n"
            f"train {len(train):,} rows of {train.real_token_share * train.seq_len:.0f} tokens on average; EOS is "
            f"{train.eos_share:.1%} of what is learnt; {meta['shortened']:,} shortened to {train.seq_len} "
            f"({meta['cut_prompts']:,} lost the beginning of the prompt, {meta['cut_replies']:,} the end of the reply)"
            f"\nvalidation {len(self.validation):,} rows"
        )
        return "\n".join(filter(None, (told, told_skipped(meta))))

    def _rows(
        self,
        chats: Conversations,
        kept: Callable[[np.ndarray], np.ndarray] | None = None,
        by_length: bool = False,
    ) -> ReplyRows:
        """Rows of all conversations, or of those of whose hashes (C,) kept(hashes) is True."""
        seq_len, parts = self.config.max_seq_len, [np.empty(0, dtype=np.int64)]
        for replies in stretches(len(chats.reply_begins)):
            if kept is not None:
                replies = replies[kept(chats.hashes[chats.reply_owners[replies]])]
            parts.append(replies[rows_begin(chats, replies, seq_len, self.all_replies)])
        first = np.concatenate(parts)
        if by_length:
            lengths = shortened(items_of(chats, first, seq_len, self.all_replies), seq_len).lengths
            first = first[np.argsort(lengths, kind="stable")]
        ids = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        fill = getattr(self.config, "eos_fill", 0)
        return ReplyRows(chats, first, self.all_replies, seq_len, *ids, fill, not self.all_replies, self.block_size)

    def _open_file(self) -> None:
        chats, meta = self._conversations()
        held_out = self._held_out(chats.hashes)
        self.train = self._rows(chats, lambda hashes: ~held_out(hashes))
        self.validation = self._rows(chats, held_out, by_length=True)
        self.meta = meta | self._counts(self.train)
        if not meta["replies"]:
            raise ValueError(f"{self.source} has nothing to train on: every reply is empty")
        if not len(self.train):
            raise ValueError(
                f"{self.source} has nothing to train on: of {meta['replies']:,} replies that are not empty, all "
                f"are held out by --val-fraction {self.config.val_fraction}; lower it, or give more data"
            )

    def _held_out(self, hashes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Which of some hashes are those of validation conversations, where all have `hashes` (C,)."""
        threshold, smallest = self.config.val_fraction * 2.0**64, hashes.min()
        if threshold > 0 and not smallest < threshold and hashes.max() > smallest:
            return lambda some: some == smallest  # copies of it included; others remain
        return lambda some: some < threshold

    def _conversations(self) -> tuple[Conversations, dict[str, Any]]:
        """Those of the file, mapped, and what is known of them; tokenised into the cache unless they are there."""
        open_text(self.source).close()  # a missing file gets its message here
        options = "sft", FORMAT, fingerprint(self.tokenizer), self.config.on_bad_row
        dtypes = dict.fromkeys(Conversations.__dataclass_fields__, np.int64)
        dtypes |= {"tokens": token_dtype(self.tokenizer), "hashes": np.uint64}
        arrays, meta = cached_arrays(self.source, self.config.cache_dir, options, dtypes, self._tokenise)
        return Conversations(**arrays), meta

    def _tokenise(self, files: ArrayFiles) -> dict[str, Any]:
        """Append the file's conversations, a chunk at a time; returns what is to be known of them."""
        began, digest, replies, lengths = time.monotonic(), hashlib.sha256(), 0, files.lengths
        bad = BadRows(self.config.on_bad_row)
        files.append("starts", np.zeros(1, dtype=np.int64))
        for chunk in _chunks(self._read(bad, digest.update)):
            chats = _encoded(self.tokenizer, chunk)
            replies += _num_replies(chunk)
            tokens, conversations = lengths["tokens"], lengths["hashes"]
            files.append("tokens", chats.tokens)
            files.append("starts", chats.starts[1:] + tokens)
            files.append("reply_begins", chats.reply_begins + tokens)
            files.append("reply_ends", chats.reply_ends + tokens)
            files.append("reply_owners", chats.reply_owners + conversations)
            files.append("hashes", chats.hashes)
        print(
            f"tokenised {lengths['hashes']:,} conversations, {lengths['tokens'] / 1e6:.1f}M tokens in "
            f"{time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )
        return {
            "conversations": lengths["hashes"],
            "replies": lengths["reply_begins"],
            "empty_replies": replies - lengths["reply_begins"],
            "tokens": lengths["tokens"],
            **bad.meta,
            "data_sha256": digest.hexdigest(),
            "tokenizer_fingerprint": fingerprint(self.tokenizer),
        }

    def _read(self, bad: BadRows, observe: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, Messages]]:
        return read_conversations(self.source, observe, bad, spelling_check(self.tokenizer))

    def _open_stream(self, rows_per_window: int, num_rows: int) -> None:
        threshold = self.config.val_fraction * 2.0**64
        wanted, searched = STREAM_VALIDATION
        self.bad = BadRows(self.config.on_bad_row, tell=True)
        head, found = [], 0
        for pair in islice(self._read(self.bad), searched if threshold else 0):
            head.append((_hash(pair[1]), pair))
            found += head[-1][0] < threshold
            if found == wanted:
                break
        hashes = {value for value, _ in head}
        if not found and len(head) < searched and len(hashes) > 1:  # all was read: as of a small file in the cache
            threshold = min(hashes) + 1
        held_out = [pair for value, pair in head if value < threshold]
        self.validation = self._rows(_encoded(self.tokenizer, held_out), by_length=True)

        def windows(first: int) -> Iterator[ReplyRows]:
            stream = self._stream(threshold)
            for number in count():
                window = list(islice(stream, rows_per_window))
                if number >= first:
                    yield self._rows(Conversations.of(window, [0] * len(window)))

        self.empty_replies, self.meta = 0, {"data_sha256": _sketch_of(self.source), "data_sha256_of": SKETCHED}
        self.meta["streaming"] = True
        self.train = StreamedRows(windows, rows_per_window, num_rows)
        self.meta |= {"empty_replies": self.empty_replies} | self._counts(self.train.window)

    def _counts(self, train: ReplyRows) -> dict[str, Any]:
        return {
            "train_rows": len(train),
            "validation_rows": len(self.validation),
            "cut_prompts": train.totals.cut_prompts,
            "cut_replies": train.totals.cut_replies,
            "shortened": train.totals.shortened,
            "eos_share": train.eos_share if len(train) else 0.0,
            "real_token_share": train.real_token_share,
        }

    def _stream(self, threshold: float) -> Iterator[ChatIds]:
        """The items of the training conversations, over and over again."""
        while True:
            empty = True
            kept = (pair for pair in self._read(self.bad) if _hash(pair[1]) >= threshold)
            for chunk in _chunks(kept):
                chats = _encoded(self.tokenizer, chunk)
                self.meta |= self.bad.meta  # which a checkpoint holds: a stream is not read to its end beforehand
                self.empty_replies += _num_replies(chunk) - len(chats.reply_begins)
                rows = self._rows(chats)
                for item in apart(chats, items_of(chats, rows.first, rows.seq_len, rows.together)):
                    empty = False
                    yield item
            if empty:
                raise ValueError(f"{self.source} has nothing to train on: no reply that is not empty is left")


def read_conversations(
    path: Path,
    observe: Callable[[bytes], object] | None = None,
    bad: BadRows | None = None,
    check: Check = str,
) -> Iterator[tuple[int, Messages]]:
    """(row number from 1, conversation) as `read_as`; a row is bad of whose contents check(content) raises ValueError,
    too."""

    def conversation(row: dict[str, Any]) -> Messages:
        messages = messages_of(row)
        for message in messages:
            check(message["content"])
        return messages

    return read_as(path, conversation, observe, bad)


def _chunks(pairs: Iterable[tuple[int, Messages]]) -> Iterator[list[tuple[int, Messages]]]:
    def size(pair: tuple[int, Messages]) -> int:
        return sum(len(message["content"]) + TEMPLATE_CHARACTERS for message in pair[1])

    return chunked(pairs, size, CHUNK_CHARACTERS)


def _encoded(tokenizer: PreTrainedTokenizerFast, chunk: list[tuple[int, Messages]]) -> Conversations:
    hashes, messages = [_hash(messages) for _, messages in chunk], [messages for _, messages in chunk]
    return Conversations.of(encode_conversations(tokenizer, messages), hashes, token_dtype(tokenizer))


def _num_replies(chunk: list[tuple[int, Messages]]) -> int:
    return sum(message["role"] == "assistant" for _, messages in chunk for message in messages)


def _hash(messages: Messages) -> int:
    return content_hash(render_chat(messages, add_generation_prompt=False))


def _sketch_of(path: Path) -> str:
    """What tells a stream from another without reading it all: SHA-256 of its beginning. A later row may be
    corrected."""
    digest, left = hashlib.sha256(), SKETCH
    for _, line in read_lines(path):
        digest.update(line[:left])
        left -= len(line)
        if left <= 0:
            break
    return digest.hexdigest()
