"""Conversations read and tokenised while training: rows of an endless stream, a window of steps at a time."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dataset.bad_rows import BadRows
from dataset.conversations import Conversations, ConversationTokeniser, conversation_hash, count_replies
from dataset.formats import Messages
from dataset.jsonl import chunked, held_out_threshold, read_lines
from dataset.order import LengthOrder
from dataset.replies import ReplyRows, RowLayout
from dataset.tokenise import CHUNK_CHARACTERS
from dataset.tokenizer import ChatIds

VALIDATION_ROWS, SEARCHED_ROWS = 256, 20_000  # held-out conversations wanted, and rows read in search of them
SKETCH = 1 << 20  # bytes by which a stream is identified


class ConversationStream:
    """The training conversations of a file, read over and over.

    `meta` counts the bad rows so far: it changes while the stream is read.
    """

    def __init__(self, tokeniser: ConversationTokeniser, layout: RowLayout, rows_per_window: int):
        self.tokeniser, self.layout, self.rows_per_window = tokeniser, layout, rows_per_window
        self.bad = BadRows(tokeniser.on_bad_row, verbose=True)
        self.threshold = 0.0  # conversations with a smaller hash are held out
        self.meta: dict[str, Any] = {
            "data_sha256": _sketch_of(tokeniser.path),
            "data_sha256_of": f"its first {SKETCH:,} bytes, unpacked",
            "streaming": True,
        }
        self.empty_replies = 0  # so far

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

    def windows(self, first: int) -> Iterator[ReplyRows]:
        """Yield the rows of one window after another, beginning with window number `first`."""
        items = self._items()
        for number in count():
            window = list(islice(items, self.rows_per_window))
            if number >= first:
                yield ReplyRows.of(Conversations.of(window, [0] * len(window)), self.layout)

    def _read(self) -> Iterator[Messages]:
        return self.tokeniser.read(None, self.bad)

    def _items(self) -> Iterator[ChatIds]:
        """Yield the items of the training conversations, over and over."""
        tokeniser = self.tokeniser
        while True:
            empty = True
            training = (messages for messages in self._read() if conversation_hash(messages) >= self.threshold)
            for rows in chunked(training, tokeniser.size, CHUNK_CHARACTERS):
                chats = tokeniser.encode(rows)
                self.meta |= self.bad.meta
                self.empty_replies += count_replies(rows) - len(chats.reply_begins)
                for item in _single_items(ReplyRows.of(chats, self.layout)):
                    empty = False
                    yield item
            if empty:
                raise ValueError(f"{tokeniser.path} has nothing to train on: no reply that is not empty is left")


class StreamedRows:
    """Rows of an endless stream, read no sooner than they are needed.

    They keep the order of the file, except that those of a window are sorted by length. windows(first) yields the
    ReplyRows of one window after another, each of `rows_per_window` items, beginning with window number `first`.
    """

    def __init__(self, windows: Callable[[int], Iterator[ReplyRows]], rows_per_window: int, num_rows: int):
        self.windows, self.rows_per_window, self.num_rows = windows, rows_per_window, num_rows
        self._open(0)

    def _open(self, number: int) -> None:
        self._iterator, self._number = self.windows(number), number
        self.window = next(self._iterator)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def seq_len(self) -> int:
        return self.window.seq_len

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
        if not self._number <= number <= self._number + 1:
            self._open(number)
        while self._number < number:
            self.window, self._number = next(self._iterator), self._number + 1
        return self.window


def _single_items(rows: ReplyRows) -> Iterator[ChatIds]:
    """Every item as a conversation of its own, with the replies that it learns."""
    chats, items = rows.chats, rows.whole_items()
    for begin, middle, end in zip(items.begin.tolist(), items.middle.tolist(), items.end.tolist(), strict=True):
        replies = slice(*np.searchsorted(chats.reply_begins, (middle, end)))
        spans = zip(chats.reply_begins[replies].tolist(), chats.reply_ends[replies].tolist(), strict=True)
        yield ChatIds(chats.tokens[begin:end].tolist(), [(first - begin, last - begin) for first, last in spans])


def _sketch_of(path: Path) -> str:
    """SHA-256 of the beginning of a file, by which a stream is identified without reading it all."""
    digest, left = hashlib.sha256(), SKETCH
    for _, line in read_lines(path):
        digest.update(line[:left])
        left -= len(line)
        if left <= 0:
            break
    return digest.hexdigest()
