"""Conversations to rows that learn their replies: the items cut out of token arrays, and batches.

An item is what one row shows: a prompt, and a body, whose replies are learnt. For a diffusion model it is one reply
after its whole context, since a later turn must not be seen. An autoregressive model sees nothing to the right, so all
replies of a conversation share one item; if that does not fit the row, each reply gets its own.
Only the number of a row's first reply is kept in memory; items are made for the rows of a batch.
Shapes: C conversations with R replies, B rows of a batch, W tokens of the widest of them, L = seq_len.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.cache import stretches
from dataset.conversations import Conversations
from dataset.order import LengthOrder, RowOrder

WIDTH_MULTIPLE = 8  # of a batch, in tokens: fits the matrix units of GPUs


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


def starts_row(chats: Conversations, replies: np.ndarray, seq_len: int, all_replies: bool) -> np.ndarray:
    """(B,) bool: whether each of `replies` begins a row. All do; with `all_replies`, of a conversation that fits
    `seq_len` only the first."""
    if not all_replies:
        return np.ones(len(replies), dtype=bool)
    first, last = _first_and_last(chats, replies)
    return (first == replies) | (_length_up_to(chats, last) > seq_len)


def items_of(chats: Conversations, replies: np.ndarray, seq_len: int, all_replies: bool) -> Items:
    """The items that begin with `replies` (B,): one reply each, or, with `all_replies`, all replies of a conversation
    that fits `seq_len`."""
    end = chats.reply_ends[replies]
    if all_replies:
        _, last = _first_and_last(chats, replies)
        end = np.where(_length_up_to(chats, last) <= seq_len, chats.reply_ends[last], end)
    return Items(chats.starts[chats.reply_owners[replies]], chats.reply_begins[replies], end)


def _first_and_last(chats: Conversations, replies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last reply of the conversation of each of `replies`."""
    owners = chats.reply_owners[replies]
    first, end = (np.searchsorted(chats.reply_owners, owners, side=side) for side in ("left", "right"))
    return first, end - 1


def _length_up_to(chats: Conversations, replies: np.ndarray) -> np.ndarray:
    """Tokens from the beginning of the conversation to the end of each reply."""
    return chats.reply_ends[replies] - chats.starts[chats.reply_owners[replies]]


def shortened(items: Items, seq_len: int) -> Items:
    """Cut every item to `seq_len`: the end of its prompt and the start of its body, of which at least half a row is
    kept."""
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
class RowLayout:
    """Settings of the rows made of conversations.

    eos_fill: a complete reply is followed by up to this many EOS, the empty end of the canvas on which a diffusion
    decoder writes. Reply plus fill is log-uniform from the reply's own length to the longest allowed, so that the
    length of the canvas does not reveal where the reply ends.

    block_size > 0: instead, EOS fill the block, counted from the beginning of the row, in which the reply ends: the
    effective length of LLaDA 2.0 (section 5.1). That block never sees what comes after it.
    """

    all_replies: bool  # of a conversation that fits the row (autoregressive), or one (diffusion)
    seq_len: int
    pad_id: int
    eos_id: int
    eos_fill: int = 0
    block_size: int = 0


@dataclass(frozen=True)
class ReplyRows:
    """Items as rows, identified by visit number, epoch * len + row: an item's fill is drawn anew in every epoch."""

    chats: Conversations
    first: np.ndarray  # (N,) int64, the reply with which each row begins
    layout: RowLayout

    @classmethod
    def of(
        cls,
        chats: Conversations,
        layout: RowLayout,
        keep: Callable[[np.ndarray], np.ndarray] | None = None,
        by_length: bool = False,
    ) -> "ReplyRows":
        """Rows of all conversations, or of those whose hashes (C,) pass keep(hashes) -> (C,) bool."""
        seq_len, all_replies = layout.seq_len, layout.all_replies
        parts = [np.empty(0, dtype=np.int64)]
        for replies in stretches(len(chats.reply_begins)):
            if keep is not None:
                replies = replies[keep(chats.hashes[chats.reply_owners[replies]])]
            parts.append(replies[starts_row(chats, replies, seq_len, all_replies)])
        first = np.concatenate(parts)
        if by_length:
            lengths = shortened(items_of(chats, first, seq_len, all_replies), seq_len).lengths
            first = first[np.argsort(lengths, kind="stable")]
        return cls(chats, first, layout)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def seq_len(self) -> int:
        return self.layout.seq_len

    def whole_items(self, rows: np.ndarray | slice = slice(None)) -> Items:
        """The items of `rows` (B,), of any length."""
        return items_of(self.chats, self.first[rows], self.seq_len, self.layout.all_replies)

    def items(self, rows: np.ndarray) -> Items:
        """The items of `rows` (B,), shortened."""
        return shortened(self.whole_items(rows), self.seq_len)

    @cached_property
    def totals(self) -> "Totals":
        """Sums over all rows in the first epoch."""
        sums = np.zeros(len(Totals._fields), dtype=np.int64)
        for rows in stretches(len(self)):
            items = self.items(rows)
            fill = self._fill(items, rows)
            first, last = self._replies(items, rows)
            replies, _ = _concatenated_ranges(first, last)
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
        """Number of EOS after the reply of each visit, (B,) int64."""
        return self._fill(self.items(visits % len(self)), visits)

    def _fill(self, items: Items, visits: np.ndarray) -> np.ndarray:
        if self.layout.block_size:
            return np.minimum(-items.lengths % self.layout.block_size, self.seq_len - items.lengths)
        reply = items.end - items.middle
        room = np.minimum(self.seq_len - items.lengths, self.layout.eos_fill)  # none after a reply that was cut
        return log_uniform(reply, room, visits)

    def lengths(self, visits: np.ndarray) -> np.ndarray:
        """Tokens of each visit's row, fill included, (B,) int64."""
        items = self.items(visits % len(self))
        return items.lengths + self._fill(items, visits)

    def batch(self, visits: np.ndarray) -> dict[str, Tensor]:
        """(B, W) tensors: input_ids int64; loss_mask bool, True on replies, their EOS and the fill; for diffusion also
        document_ids int64, 0 or -1 on padding. And fill bool, True on the EOS that are learnt but count as no tokens.
        """
        visits = np.asarray(visits, dtype=np.int64)
        rows = visits % len(self)
        items = self.items(rows)
        fill = self._fill(items, visits)
        own, lengths = items.lengths[:, None], (items.lengths + fill)[:, None]
        width = min(-(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.seq_len)
        place = np.arange(width)
        # After the row's end stands fill or padding: what is read there is overwritten, but must exist.
        tokens = self.chats.tokens[np.minimum(items.begin[:, None] + place, len(self.chats.tokens) - 1)]
        ends = np.where(place < lengths, self.layout.eos_id, self.layout.pad_id)
        ids = np.where(place < own, tokens, ends).astype(np.int64)
        filled = (place >= own) & (place < lengths)
        scored = self._is_reply(items, rows, width) | filled
        batch = {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(scored),
            "fill": torch.from_numpy(filled),
        }
        if not self.layout.all_replies:  # a causal model does not see what comes after a row
            batch["document_ids"] = torch.from_numpy(np.where(place < lengths, 0, -1))
        return batch

    def _is_reply(self, items: Items, rows: np.ndarray, width: int) -> np.ndarray:
        """(B, width) bool: tokens of replies, their EOS included."""
        replies, owners = _concatenated_ranges(*self._replies(items, rows))
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


def _concatenated_ranges(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all ranges begins[i] to below ends[i], one range after another, and the i of each."""
    counts = ends - begins
    owners = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + begins[owners], owners


def log_uniform(lengths: np.ndarray, room: np.ndarray | int, numbers: np.ndarray) -> np.ndarray:
    """Tokens (B,) from 0 to `room` behind texts of these lengths (B,), such that both together are log-uniform: a
    function of the texts' numbers (B,)."""
    together = (lengths * (1 + (room + 1) / lengths) ** _uniform(numbers)).astype(np.int64)
    return np.minimum(together - lengths, room)


def _uniform(visits: np.ndarray) -> np.ndarray:
    """(B,) float64 in [0, 1), a hash of the visit number (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (visits.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
