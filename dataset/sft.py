"""Supervised fine-tuning data: conversations of a file as rows that learn their replies, from the cache or streamed."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from dataset.content import held_out_threshold
from dataset.conversations import Conversations, ConversationTokeniser, conversation_hash, count_replies
from dataset.corpus.bundled import bundled_file
from dataset.order import STEPS_PER_WINDOW, LengthOrder
from dataset.reading.bad_rows import OnBadRow, skipped_line
from dataset.reading.files import DATA_HELP, data_files, is_plain_text, read_chunks
from dataset.reading.rows import chunked
from dataset.replies import ReplyRows, RowLayout
from dataset.rows.kinds import note_on_training
from dataset.rows.messages import Messages
from dataset.tokenise import CHUNK_CHARACTERS
from dataset.tokenizer import ChatIds, PreTrainedTokenizerFast, encode_conversations

VALIDATION_ROWS, SEARCHED_ROWS = 256, 20_000  # of a stream: conversations held out, and rows read in search of them
SKETCH = 1 << 20  # bytes by which a stream is identified

OPEN_END = "an open end of the canvas (--no-quantize-effective-length)"


@dataclass(frozen=True)
class SFTData:
    """Where the conversations are and how they become rows; every field is a flag. ValueError on impossible values."""

    data: Annotated[
        Path | None,
        f"conversations, in the formats of dataset/rows/formats.py; {DATA_HELP} (none: the bundled ones)",
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest row, in tokens; longer ones are shortened", "--seq-len", "at least 16"] = 512
    val_fraction: Annotated[float, "share of rows held out for validation, by content hash", "in [0, 1)"] = 0.005
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time", "without --streaming"] = (
        Path("dataset/.cache")
    )
    streaming: Annotated[bool, "read and tokenise while training, in the order of the file; keeps no cache"] = False
    steps_per_epoch: Annotated[
        int | None, "optimizer steps that count as one epoch", "in [1, 10^9]", "with --streaming"
    ] = None
    on_bad_row: OnBadRow = "error"

    eos_fill: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.streaming and self.steps_per_epoch is None:
            raise ValueError("--streaming needs --steps-per-epoch: how long a stream is, is not known")
        if self.data is not None and is_plain_text(data_files(self.data)[0]):
            raise ValueError(f"--data {self.data}: expected rows, one conversation each")

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of --data, or without it the bundled conversations, which are written into the cache first."""
        return data_files(self.data) if self.data else (bundled_file("sft", self.cache_dir),)


@dataclass(frozen=True)
class DiffusionSFTData(SFTData):
    """Where the conversations are and how they become rows."""

    eos_fill: Annotated[
        int,
        "a reply's EOS is followed by a random number of others, up to so many: the empty end of the canvas",
        "in [0, 2^20]",
        f"with {OPEN_END}",
    ] = 128
    quantize_effective_length: Annotated[
        bool,
        "EOS fill the reply's last block and nothing behind it, as decoding ends there",
        "with block diffusion",
        "--llada2-quantize-effective-length",
    ] = True


class SFTDataset:
    """`train` and `validation` rows (ReplyRows, or StreamedRows) and what is known of the file.

    all_replies: the replies of a conversation are learnt in one row (autoregressive), else one row each (diffusion).
    rows_per_step is needed for streaming only. block_size: see RowLayout. `meta` is flat, for logs. ValueError with
    file and row for a bad row, and if nothing is left to train on.
    """

    def __init__(
        self,
        config: SFTData,
        tokenizer: PreTrainedTokenizerFast,
        all_replies: bool,
        rows_per_step: int,
        block_size: int = 0,
    ) -> None:
        _check_tokenizer(tokenizer, config.tokenizer_dir)
        self.config = config
        ids = tokenizer.pad_token_id, tokenizer.eos_token_id
        layout = RowLayout(all_replies, config.max_seq_len, *ids, config.eos_fill, block_size)
        tokeniser = ConversationTokeniser(config.files, tokenizer, config.on_bad_row)
        self.source = tokeniser.source
        if config.streaming:
            self._open_stream(tokeniser, layout, rows_per_step)
        else:
            self._open_file(tokeniser, layout)

    def _open_file(self, tokeniser: ConversationTokeniser, layout: RowLayout) -> None:
        arrays, meta = tokeniser.open(self.config.cache_dir)
        chats = Conversations(**arrays)
        smallest, largest = int(chats.hashes.min()), int(chats.hashes.max())
        threshold = held_out_threshold(self.config.val_fraction, smallest, largest)
        self.train = ReplyRows.of(chats, layout, lambda hashes: ~(hashes < threshold))
        self.validation = ReplyRows.of(chats, layout, lambda hashes: hashes < threshold, by_length=True)
        self.meta = meta | _counts(self.train, self.validation)
        if not meta["replies"]:
            raise ValueError(f"{self.source} has nothing to train on: every reply is empty")
        if not len(self.train):
            raise ValueError(
                f"{self.source} has nothing to train on: of {meta['replies']:,} replies that are not empty, all "
                f"are held out by --val-fraction {self.config.val_fraction}; lower it, or give more data"
            )

    def _open_stream(self, tokeniser: ConversationTokeniser, layout: RowLayout, rows_per_step: int) -> None:
        self.train = StreamedRows(tokeniser, layout, rows_per_step, self.config.steps_per_epoch)
        self.validation = self.train.hold_out(self.config.val_fraction)
        self.train.open(0)
        self.meta = self.train.meta
        self.meta |= {"empty_replies": self.train.empty_replies} | _counts(self.train.window, self.validation)

    def describe(self) -> str:
        """Lines for people."""
        meta, train = self.meta, self.train
        if self.config.streaming:
            source, train = f"streamed, with an epoch of {len(train):,} rows; of the first window:", train.window
        else:
            source = f"{meta['conversations']:,} conversations, {meta['replies']:,} replies"
        bundled = "" if self.config.data else "no --data, so the bundled conversations are used: "
        left_out = f" ({meta['empty_replies']:,} empty replies left out)" if meta["empty_replies"] else ""
        lines = (
            f"{bundled}{self.source}: {source}{left_out}\n"
            f"train {len(train):,} rows of {train.real_token_share * train.seq_len:.0f} tokens on average; EOS is "
            f"{train.eos_share:.1%} of what is learnt; {meta['shortened']:,} shortened to {train.seq_len} "
            f"({meta['cut_prompts']:,} lost the beginning of the prompt, {meta['cut_replies']:,} the end of the reply)"
            f"\nvalidation {len(self.validation):,} rows"
        )
        note = note_on_training(self.config.data, "chat")
        return "\n".join(filter(None, (lines, skipped_line(meta), note)))


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"the tokenizer in {directory} pads with EOS, which is to be learnt; it needs both")
    try:
        encode_conversations(tokenizer, [[{"role": "user", "content": ""}]])
    except ValueError as error:
        raise ValueError(f"the tokenizer in {directory} cannot spell the chat template: {error}") from None


def _counts(train: ReplyRows, validation: ReplyRows) -> dict[str, Any]:
    return {
        "train_rows": len(train),
        "validation_rows": len(validation),
        "cut_prompts": train.totals.cut_prompts,
        "cut_replies": train.totals.cut_replies,
        "shortened": train.totals.shortened,
        "eos_share": train.eos_share if len(train) else 0.0,
        "real_token_share": train.real_token_share,
    }


# -- streaming ---------------------------------------------------------------------------------------------------------


class StreamedRows:
    """Rows of the training conversations of a file, read over and over, and no sooner than they are needed.

    They keep the order of the file, except that those of a window of steps are sorted by length. `meta` counts the bad
    rows so far: it changes while the stream is read.
    """

    def __init__(self, tokeniser: ConversationTokeniser, layout: RowLayout, rows_per_step: int, steps_per_epoch: int):
        self.tokeniser, self.layout = tokeniser, layout
        self.rows_per_window, self.num_rows = STEPS_PER_WINDOW * rows_per_step, steps_per_epoch * rows_per_step
        self.bad = tokeniser.bad_rows(verbose=True)
        self.threshold = 0.0  # conversations with a smaller hash are held out
        self.empty_replies = 0  # so far
        self.meta: dict[str, Any] = {
            "data_sha256": _sketch_of(tokeniser.files),
            "data_sha256_of": f"its first {SKETCH:,} bytes, unpacked",
            "streaming": True,
        }

    def hold_out(self, fraction: float) -> ReplyRows:
        """Rows of the first conversations that belong to validation, which the stream then leaves out."""
        self.threshold = threshold = fraction * 2.0**64
        head: list[tuple[int, Messages]] = []
        num_held_out = 0
        for messages in islice(self._read(), SEARCHED_ROWS if threshold else 0):
            head.append((conversation_hash(messages), messages))
            num_held_out += head[-1][0] < threshold
            if num_held_out == VALIDATION_ROWS:
                break
        if head and len(head) < SEARCHED_ROWS:  # all of a small file: as if it were in the cache
            hashes = [value for value, _ in head]
            self.threshold = held_out_threshold(fraction, min(hashes), max(hashes))
        held_out = [messages for value, messages in head if value < self.threshold]
        return ReplyRows.of(self.tokeniser.encode(held_out), self.layout, by_length=True)

    def open(self, number: int) -> None:
        """Read the file from its beginning up to window `number`."""
        self._items, self._number = self._training_items(), number
        for _ in islice(self._items, number * self.rows_per_window):
            pass
        self._read_window()

    def _read_window(self) -> None:
        items = list(islice(self._items, self.rows_per_window))
        self.window = ReplyRows.of(Conversations.of(items, [0] * len(items)), self.layout)

    def _training_items(self) -> Iterator[ChatIds]:
        """Yield the items of the training conversations, over and over."""
        while True:
            empty = True
            training = (messages for messages in self._read() if conversation_hash(messages) >= self.threshold)
            for rows in chunked(training, self.tokeniser.size, CHUNK_CHARACTERS):
                chats = self.tokeniser.encode(rows)
                self.meta |= self.bad.meta
                self.empty_replies += count_replies(rows) - len(chats.reply_begins)
                for item in _single_items(ReplyRows.of(chats, self.layout)):
                    empty = False
                    yield item
            if empty:
                raise ValueError(f"{self.tokeniser.source} has nothing to train on: no reply that is not empty is left")

    def _read(self) -> Iterator[Messages]:
        return self.tokeniser.read(None, self.bad)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def seq_len(self) -> int:
        return self.layout.seq_len

    @property
    def real_token_share(self) -> float:
        """Share of tokens that are not padding, in the current window."""
        return self.window.real_token_share

    def order(self, seed: int, rows_per_step: int) -> LengthOrder:
        return LengthOrder(
            lambda start, count: np.arange(start, start + count), self.lengths, 2**62, seed, rows_per_step
        )

    def lengths(self, visits: np.ndarray) -> np.ndarray:
        return self._window_of(visits).lengths(visits)

    def batch(self, visits: np.ndarray) -> dict[str, Tensor]:
        return self._window_of(visits).batch(visits)

    def _window_of(self, visits: np.ndarray) -> ReplyRows:
        number = int(visits[0]) // self.rows_per_window
        if number == self._number + 1:
            self._read_window()
            self._number = number
        elif number != self._number:
            self.open(number)
        return self.window


def _single_items(rows: ReplyRows) -> Iterator[ChatIds]:
    """Every item as a conversation of its own, with the replies that it learns."""
    chats, items = rows.chats, rows.whole_items()
    for begin, middle, end in zip(items.begin.tolist(), items.middle.tolist(), items.end.tolist(), strict=True):
        replies = slice(*np.searchsorted(chats.reply_begins, (middle, end)))
        spans = zip(chats.reply_begins[replies].tolist(), chats.reply_ends[replies].tolist(), strict=True)
        yield ChatIds(chats.tokens[begin:end].tolist(), [(first - begin, last - begin) for first, last in spans])


def _sketch_of(files: Sequence[Path]) -> str:
    """SHA-256 of the beginnings of files, by which a stream is identified without reading it all."""
    digest = hashlib.sha256()
    for file in files:
        left = SKETCH
        for chunk in read_chunks(file):
            digest.update(chunk[:left])
            left -= len(chunk)
            if left <= 0:
                break
    return digest.hexdigest()
