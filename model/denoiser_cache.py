"""The forward pass of a denoising step: all that the active blocks may see, computed anew or kept from earlier steps.

Shapes: R unfinished rows of a batch of B, L columns, W of them fed, N wanted positions, V vocabulary. Rows are at
different places of their texts; in a pass each feeds what it needs, padded to the widest.

Two things may be visible: under full attention the whole row, under block-causal attention the blocks of the grid up
to the active one. Block-causal K/V of a finished block never change, so keeping them is exact; under full attention
they depend on everything that is yet to be written, and keeping them is approximate (unless there is one layer, whose
K/V depend on their own tokens alone).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.kv_cache import ColumnCache
from model.transformer import Transformer

Spend = Callable[[Sequence[int]], None]  # told the rows of the batch that a network call computes


@dataclass(frozen=True)
class Active:
    """The active block of each unfinished row, and where in it logits are wanted."""

    rows: list[int]  # R, of the batch
    ids: Tensor  # (R, L) int64, on the CPU
    lengths: list[int]  # tokens of the row, padding not counted
    start: list[int]  # first column of the block
    stop: list[int]  # column behind its last
    wanted: list[list[int]]  # columns, ascending, of each row; N in all

    def unasked(self, places: list[int]) -> "Active":
        """The rows at these places, with no logits wanted."""
        rows, lengths, start, stop = (
            [values[place] for place in places] for values in (self.rows, self.lengths, self.start, self.stop)
        )
        return Active(rows, self.ids[places], lengths, start, stop, [[] for _ in places])

    def among(self, first: Sequence[int], width: int) -> Tensor:
        """(N,) int64: the places of what is wanted among R x width tokens, each row's from column first[r] on."""
        begins = [place * width - begin for place, begin in enumerate(first)]
        places = [begin + c for begin, columns in zip(begins, self.wanted, strict=True) for c in columns]
        return torch.tensor(places, dtype=torch.long)


class Forward(Protocol):
    def logits(self, at: Active) -> Tensor:
        """float32 (N, V) on the model's device."""


class Recomputed:
    """No cache: the whole row, or with a block_size all of it up to the end of the active block, at each step."""

    def __init__(self, model: Transformer, device: torch.device, block_size: int, spend: Spend):
        self.model, self.device, self.block_size, self.spend = model, device, block_size, spend
        self.stops: list[int] = []  # of the last pass; the next one's are mostly the same
        self.attn_mask: Tensor | None = None

    def logits(self, at: Active) -> Tensor:
        stops = at.stop if self.block_size else at.lengths
        width = max(stops)
        if stops != self.stops:
            columns, size = torch.arange(width, device=self.device)[None], self.block_size
            self.stops, self.attn_mask = stops, visibility(columns, stops, size if width > size else 0)
        self.spend(at.rows)
        select = at.among([0] * len(stops), width).to(self.device)
        return self.model(at.ids[:, :width].to(self.device), attn_mask=self.attn_mask, select=select).float()


def visibility(columns: Tensor, stops: list[int], block_size: int) -> Tensor | None:
    """What queries at `columns` (R or 1, W) see of the keys 0 to max(stops) - 1: those of their row before stops[r],
    and with a block_size of blocks up to their own. Bool (R or 1, 1, W or 1, keys), None = everything.

    Padding sees no less than the row's first block, so no query is blind.
    """
    attn_mask, ragged = None, min(stops) < max(stops)
    if not ragged and not block_size:
        return None
    keys = torch.arange(max(stops), device=columns.device)
    if ragged:
        attn_mask = (keys < torch.tensor(stops, device=columns.device)[:, None])[:, None, None]
    if block_size:
        before = (keys // block_size <= columns[:, :, None] // block_size)[:, None]
        attn_mask = before if attn_mask is None else attn_mask & before
    return attn_mask


class Span(NamedTuple):
    """What a row feeds in a pass."""

    first: int  # the columns from here
    last: int  # to before here
    stop: int  # which see those before here


class Cached:
    """A pass feeds a span of each row, and its K/V stay; which span, is up to the subclass."""

    def __init__(self, model: Transformer, device: torch.device, shape: torch.Size, spend: Spend):
        self.model, self.device, self.block_size, self.spend = model, device, model.config.block_size, spend
        self.rows = list(range(shape[0]))  # of the batch, that are in the cache
        self.cache = ColumnCache(model.config, *shape)

    def forget_finished(self, at: Active) -> None:
        if at.rows != self.rows:
            self.cache.keep(torch.tensor([self.rows.index(row) for row in at.rows], device=self.device))
            self.rows = at.rows

    def feed(self, at: Active, spans: list[Span]) -> Tensor:
        """(N, V) float32."""
        first, last, stops = (list(values) for values in zip(*spans, strict=True))
        if at.rows == self.rows and len(set(spans)) == 1:
            rows, target = None, slice(first[0], last[0])
            columns, ids = torch.arange(first[0], last[0])[None], at.ids[:, target]
        else:
            rows = None if at.rows == self.rows else torch.tensor([self.rows.index(row) for row in at.rows])
            columns = torch.tensor(first)[:, None] + torch.arange(max(span.last - span.first for span in spans))
            columns[columns >= torch.tensor(last)[:, None]] = self.cache.max_length
            ids = at.ids.gather(1, columns.clamp(max=at.ids.shape[1] - 1))
            target = columns.to(self.device)
        self.cache.aim(None if rows is None else rows.to(self.device), target, max(stops))
        columns = columns.to(self.device)
        several = self.block_size and any(a // self.block_size < (b - 1) // self.block_size for a, b, _ in spans)
        select = at.among(first, ids.shape[1])
        self.spend(at.rows)
        return self.model(
            ids.to(self.device),
            attn_mask=visibility(columns, stops, self.block_size if several else 0),
            position_ids=columns,
            cache=self.cache,
            select=select.to(self.device),
        ).float()


class BlockCached(Cached):
    """Block-causal attention, exact: the K/V of every finished block, computed from its final tokens.

    A row feeds its finished blocks that are not in the cache yet, and the active one behind them. What enters the cache
    for good is the finished blocks: at first those of the prompt (prefill), later the block just left (commit), both
    in the pass of the next block's first step. The active block's K/V are overwritten by each step, and never kept.

    A pass is as wide as the widest of its rows, so where the rows of a batch change blocks at different steps, and
    arithmetic rather than the number of calls takes the time, UnfusedBlockCached may be the faster one.
    """

    def __init__(self, model: Transformer, device: torch.device, shape: torch.Size, spend: Spend):
        super().__init__(model, device, shape, spend)
        self.committed = [0] * shape[0]  # columns of each row of the batch whose K/V are final

    def logits(self, at: Active) -> Tensor:
        self.forget_finished(at)
        logits = self.feed(at, [self._span(row, stop) for row, stop in zip(at.rows, at.stop, strict=True)])
        self._commit(at)
        return logits

    def _span(self, row: int, stop: int) -> Span:
        return Span(self.committed[row], stop, stop)

    def _commit(self, at: Active) -> None:
        for row, start in zip(at.rows, at.start, strict=True):
            self.committed[row] = start


class UnfusedBlockCached(BlockCached):
    """The same, with prefill and commits in passes of their own."""

    def logits(self, at: Active) -> Tensor:
        self.forget_finished(at)
        starts = enumerate(zip(at.rows, at.start, strict=True))
        behind = [(place, self._span(row, start)) for place, (row, start) in starts if self.committed[row] < start]
        if behind:
            places, spans = zip(*behind, strict=True)
            self.feed(at.unasked(list(places)), list(spans))
            self._commit(at)
        return super().logits(at)


class PrefixCached(Cached):
    """Full attention, approximate (Fast-dLLM's PrefixCache): while a block is active, the K/V of all before it stay as
    they were in its first step, whose pass computes the whole row; later ones compute the block and what follows.

    A row refreshes its own when it comes to a block of its own; a pass is as wide as the widest of its rows, so a batch
    whose rows change blocks at different steps saves less.
    """

    def __init__(self, model: Transformer, device: torch.device, shape: torch.Size, spend: Spend):
        super().__init__(model, device, shape, spend)
        self.entered = [-1] * shape[0]  # first column of the block that each row has computed itself for

    def logits(self, at: Active) -> Tensor:
        self.forget_finished(at)
        spans = []
        for row, start, stop, length in zip(at.rows, at.start, at.stop, at.lengths, strict=True):
            spans.append(self._span(start, stop, length) if self.entered[row] == start else Span(0, length, length))
            self.entered[row] = start
        return self.feed(at, spans)

    def _span(self, start: int, stop: int, length: int) -> Span:
        return Span(start, length, length)


class DualCached(PrefixCached):
    """Fast-dLLM's DualCache: what follows the active block stays as it was in its first step, too."""

    def _span(self, start: int, stop: int, length: int) -> Span:
        return Span(start, stop, length)
