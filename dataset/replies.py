"""Conversations to rows that learn their replies: token arrays, the items cut out of them, and batches.

An item is what one row shows: a prompt, which is given, and a body, of which the replies are learnt. For a diffusion
model it is one reply given all before it, since a later turn must not be seen. An autoregressive model sees nothing to
the right, so all replies of a conversation share one item; if it does not fit the row, each reply gets its own.
Of a row no more is held in memory than the number of its first reply; items are made of those rows that are asked for.
Shapes: B rows asked for, W tokens of the widest of them, L = seq_len.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.cache import stretches
from dataset.order import LengthOrder, RowOrder
from dataset.tokenizer import ChatIds

WIDTH_MULTIPLE = 8  # of a batch, in tokens: what matrix units like


@dataclass(frozen=True)
class Conversations:
    """Conversations back to back. An empty reply teaches nothing but to say nothing, and is left out."""

    tokens: np.ndarray  # (T,) of all conversations
    starts: np.ndarray  # (C + 1,) where each begins, and the end
    reply_begins: np.ndarray  # (R,) first content token of each reply
    reply_ends: np.ndarray  # (R,) one past its EOS
    reply_owners: np.ndarray  # (R,) its conversation
    hashes: np.ndarray  # (C,) uint64, content_hash of the conversation

    @classmethod
    def of(cls, encoded: list[ChatIds], hashes: list[int], dtype: type = np.int64) -> "Conversations":
        starts = np.cumsum([0, *(len(chat.ids) for chat in encoded)])
        spans = [
            (starts[owner] + begin, starts[owner] + end, owner)
            for owner, chat in enumerate(encoded)
            for begin, end in chat.replies
            if end - begin > 1
        ]
        replies = np.array(spans, dtype=np.int64).reshape(-1, 3).T
        tokens = np.fromiter(chain.from_iterable(chat.ids for chat in encoded), dtype, int(starts[-1]))
        return cls(tokens, starts, *replies, np.array(hashes, dtype=np.uint64))


@dataclass(frozen=True)
class Items:
    """Item i is the prompt tokens[begin:middle] and the body tokens[middle:end]; (N,) int64 each."""

    begin: np.ndarray
    middle: np.ndarray
    end: np.ndarray
    cut_prompts: int = 0  # items that lost the beginning of their prompt
    cut_bodies: int = 0  # items that lost the end of their reply
    num_shortened: int = 0  # items that lost either

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.begin


def rows_begin(chats: Conversations, replies: np.ndarray, seq_len: int, together: bool) -> np.ndarray:
    """Which of `replies` (B,) are the first of a row, (B,) bool: every one, or, with `together`, the first of each
    conversation that fits `seq_len` and every one of the others."""
    if not together:
        return np.ones(len(replies), dtype=bool)
    first, last = _neighbours(chats, replies)
    return (first == replies) | (_whole(chats, replies, last) > seq_len)


def items_of(chats: Conversations, replies: np.ndarray, seq_len: int, together: bool) -> Items:
    """The items that begin with `replies` (B,): a reply, or, with `together`, all of a conversation that fits
    `seq_len`."""
    end = chats.reply_ends[replies]
    if together:
        _, last = _neighbours(chats, replies)
        end = np.where(_whole(chats, replies, last) <= seq_len, chats.reply_ends[last], end)
    return Items(chats.starts[chats.reply_owners[replies]], chats.reply_begins[replies], end)


def _neighbours(chats: Conversations, replies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last reply of the conversation of each of `replies`."""
    owners = chats.reply_owners[replies]
    first, end = (np.searchsorted(chats.reply_owners, owners, side=side) for side in ("left", "right"))
    return first, end - 1


def _whole(chats: Conversations, replies: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Tokens of each one's conversation up to its last reply."""
    return chats.reply_ends[last] - chats.starts[chats.reply_owners[replies]]


def apart(chats: Conversations, items: Items) -> Iterator[ChatIds]:
    """Every item as a conversation of its own, with the replies that it learns."""
    for begin, middle, end in zip(items.begin.tolist(), items.middle.tolist(), items.end.tolist(), strict=True):
        replies = slice(*np.searchsorted(chats.reply_begins, (middle, end)))
        spans = zip(chats.reply_begins[replies].tolist(), chats.reply_ends[replies].tolist(), strict=True)
        yield ChatIds(chats.tokens[begin:end].tolist(), [(first - begin, last - begin) for first, last in spans])


def shortened(items: Items, seq_len: int) -> Items:
    """Every item within `seq_len`: the end of its prompt and the start of its body, the latter at least half the row
    where it has so much."""
    prompt, body = items.middle - items.begin, items.end - items.middle
    kept_body = np.minimum(body, np.maximum(seq_len - prompt, seq_len // 2))
    kept_prompt = np.minimum(prompt, seq_len - kept_body)
    return Items(
        items.middle - kept_prompt,
        items.middle,
        items.middle + kept_body,
        int((kept_prompt < prompt).sum()),
        int((kept_body < body).sum()),
        int((kept_prompt + kept_body < prompt + body).sum()),
    )


@dataclass(frozen=True)
class ReplyRows:
    """Items as rows. Asked for by visit number, epoch * len + row, since an item's fill is drawn anew in every epoch.

    eos_fill: behind a complete reply follow up to so many EOS, the empty end of the canvas on which a diffusion decoder
    writes; 0 for none. Reply plus fill is log-uniform from the reply's own length to the longest allowed, lest the
    canvas tell where the reply ends.

    block_size > 0: instead, EOS fill the block of so many tokens, counted from the beginning of the row, in which the
    reply ends: its effective length in LLaDA 2.0 (section 5.1). What lies behind is never seen by that block.
    """

    chats: Conversations
    first: np.ndarray  # (N,) int64, the reply with which each row begins
    together: bool  # whether a row learns all replies of a conversation that fits it, or one
    seq_len: int
    pad_id: int
    eos_id: int
    eos_fill: int
    hide_padding: bool  # whether padding must be hidden by a mask; a causal model does not see it anyway
    block_size: int = 0

    def __len__(self) -> int:
        return len(self.first)

    def items(self, rows: np.ndarray) -> Items:
        """Those of the rows (B,), as they are shown: shortened."""
        return shortened(items_of(self.chats, self.first[rows], self.seq_len, self.together), self.seq_len)

    @cached_property
    def totals(self) -> "Totals":
        """Sums over all rows in their first epoch."""
        sums = np.zeros(len(Totals._fields), dtype=np.int64)
        for rows in stretches(len(self)):
            items = self.items(rows)
            fill = self._fill(items, rows)
            first, last = self._replies(items, rows)
            replies, _ = _expanded(first, last)
            cut = self.chats.reply_ends[last - 1] - items.end
            learnt = (self.chats.reply_ends[replies] - self.chats.reply_begins[replies]).sum() - cut.sum() + fill.sum()
            eos = (last - first - (cut > 0)).sum() + fill.sum()
            counts = items.cut_prompts, items.cut_bodies, items.num_shortened
            sums += [(items.lengths + fill).sum(), learnt, eos, *counts]
        return Totals(*sums.tolist())

    @property
    def real_token_share(self) -> float:
        """Tokens that are not padding, fill included, as a share of len * seq_len."""
        return self.totals.tokens / len(self) / self.seq_len if len(self) else 0.0

    @property
    def eos_share(self) -> float:
        """EOS as a share of all learnt tokens, fill included."""
        return self.totals.eos / max(self.totals.learnt, 1)

    def _replies(self, items: Items, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First reply and one past the last reply in the body of each row."""
        return self.first[rows], np.searchsorted(self.chats.reply_begins, items.end, side="left")

    def order(self, seed: int, rows_per_step: int) -> LengthOrder:
        return LengthOrder(RowOrder(len(self), seed).visits, self.lengths, len(self), seed, rows_per_step)

    def fill(self, visits: np.ndarray) -> np.ndarray:
        """EOS behind the reply of each visit, (B,) int64."""
        return self._fill(self.items(visits % len(self)), visits)

    def _fill(self, items: Items, visits: np.ndarray) -> np.ndarray:
        if self.block_size:
            return np.minimum(-items.lengths % self.block_size, self.seq_len - items.lengths)
        reply = items.end - items.middle
        room = np.minimum(self.seq_len - items.lengths, self.eos_fill)  # none behind a reply that was cut
        length = (reply * (1 + (room + 1) / reply) ** _uniform(visits)).astype(np.int64)
        return np.minimum(length - reply, room)

    def lengths(self, visits: np.ndarray) -> np.ndarray:
        """Tokens of each visit's row, fill included, (B,) int64."""
        items = self.items(visits % len(self))
        return items.lengths + self._fill(items, visits)

    def batch(self, visits: np.ndarray) -> dict[str, Tensor]:
        """(B, W) tensors: input_ids int64; loss_mask bool, True on replies, their EOS and the fill; document_ids int64,
        0 or -1 on padding, where that is to be hidden. And reply_tokens (B,) int64: what loss_mask counts, less fill.
        """
        visits = np.asarray(visits, dtype=np.int64)
        rows = visits % len(self)
        items = self.items(rows)
        fill = self._fill(items, visits)
        own, lengths = items.lengths[:, None], (items.lengths + fill)[:, None]
        width = min(-(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.seq_len)
        place = np.arange(width)
        # Positions behind the row's end are fill or padding, whatever is read for them; they must only exist.
        tokens = self.chats.tokens[np.minimum(items.begin[:, None] + place, len(self.chats.tokens) - 1)]
        ids = np.where(place < own, tokens, np.where(place < lengths, self.eos_id, self.pad_id)).astype(np.int64)
        scored = self._is_reply(items, rows, width) | ((place >= own) & (place < lengths))
        batch = {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(scored),
            "reply_tokens": torch.from_numpy(scored.sum(axis=1) - fill),
        }
        if self.hide_padding:
            batch["document_ids"] = torch.from_numpy(np.where(place < lengths, 0, -1))
        return batch

    def _is_reply(self, items: Items, rows: np.ndarray, width: int) -> np.ndarray:
        """(B, width) bool: tokens of replies, their EOS included."""
        replies, owners = _expanded(*self._replies(items, rows))
        edges = np.zeros((len(rows), width + 1), dtype=np.int8)
        edges[owners, self.chats.reply_begins[replies] - items.begin[owners]] = 1
        edges[owners, np.minimum(self.chats.reply_ends[replies] - items.begin[owners], width)] = -1
        return np.cumsum(edges[:, :width], axis=1, dtype=np.int8).astype(bool)


class Totals(NamedTuple):
    tokens: int  # that are not padding, fill included
    learnt: int  # of them, fill included
    eos: int  # of what is learnt
    cut_prompts: int
    cut_replies: int
    shortened: int


def _expanded(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all ranges begins[i] .. ends[i], and the i of each."""
    counts = ends - begins
    owners = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + begins[owners], owners


class StreamedRows:
    """Rows of an endless reading of conversations, a window of steps at a time: nothing is read before it is needed.

    The order is that of the file, but for the sorting by length within a window. `windows(first)` -> an endless
    iterator of ReplyRows, each of `rows_per_window` items, beginning with window number `first`.
    """

    def __init__(self, windows: Callable[[int], Iterator[ReplyRows]], rows_per_window: int, num_rows: int):
        self.windows, self.rows_per_window, self.num_rows = windows, rows_per_window, num_rows
        self._iterator, self._number = windows(0), 0
        self.window = next(self._iterator)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def seq_len(self) -> int:
        return self.window.seq_len

    @property
    def real_token_share(self) -> float:
        """That of the window at hand."""
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
        if number < self._number:
            self._iterator, self._number = self.windows(number), number
            self.window = next(self._iterator)
        elif number > self._number + 1:
            self._iterator, self._number = self.windows(number), number - 1
        while self._number < number:
            self.window, self._number = next(self._iterator), self._number + 1
        return self.window


def _uniform(visits: np.ndarray) -> np.ndarray:
    """(B,) float64 in [0, 1), a scrambled function of the visit number (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (visits.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
