"""What a denoising step feeds the network, and which keys and values it keeps from earlier steps.

Shapes: R active rows of a batch of B, L columns, W of them fed, N masked positions of the active blocks, V vocabulary.
Rows are at different places of their texts; in a pass each feeds what it needs, padded to the widest. The active block
may be a window of several blocks of the grid, which are edited together.

A DenoiserCache plans the forward passes of a step, and Denoiser runs and counts them. Three things may be visible:

    full attention    the whole row
    in blocks         for the active block all of it and what is before it; before it, the blocks up to one's own
    joint             for the active block all of it and what is before it; before it, a token sees those up to itself

In blocks, or joint, the K/V of what is before the active block never change, so keeping them is exact; under full
attention they depend on everything that is yet to be written, and keeping them is approximate (unless there is one
layer, whose K/V depend on their own tokens alone).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import Cache, ColumnCache
from model.transformer import Transformer


@dataclass
class Block:
    """The active block of a row. At first there is none: every column comes after its end."""

    row: int  # number in the batch
    length: int  # tokens of the row without padding
    number: int = -1  # of the block in the row, from 0
    start: int = 0  # its columns are start to stop - 1
    stop: int = 0
    schedule: Sequence[int] = ()  # tokens to write at each of its steps
    steps_done: int = 0
    masked: Sequence[int] = ()  # columns in it that are still masked, ascending
    visible: Sequence[int] = ()  # columns in it that are written and may be edited, ascending

    def quota(self) -> int:
        """Tokens to write in the next step by the schedule: in its last one and later, all that are masked."""
        last = self.steps_done >= len(self.schedule) - 1
        return len(self.masked) if last else self.schedule[self.steps_done]


@dataclass(frozen=True)
class ForwardPass:
    """One call of the network."""

    rows: list[int]  # numbers in the batch of the R rows that it computes
    ids: Tensor  # (R, W) int64
    select: Tensor  # (N,) int64, flat places among R * W whose logits are wanted
    attn_mask: Tensor | None  # bool, see `visibility`
    position_ids: Tensor | None = None  # (R or 1, W); None = 0 to W - 1
    cache: Cache | None = None

    def logits(self, model: Transformer) -> Tensor:
        """(N, V) float32."""
        return model(
            self.ids,
            attn_mask=self.attn_mask,
            position_ids=self.position_ids,
            cache=self.cache,
            select=self.select,
        ).float()


class DenoiserCache(Protocol):
    """A way to compute the logits of a step. To add one, write a class and name it in `denoiser.cache_of`."""

    def passes(self, ids: Tensor, blocks: list[Block]) -> list[ForwardPass]:
        """The forward passes of a step, in order; the last one's logits (N, V) are those at the blocks' masked columns,
        and then at their visible ones.

        ids (B, L) on the CPU; blocks of the R active rows.
        """


def flat_places(blocks: list[Block], first: Sequence[int], width: int) -> Tensor:
    """Places (N,) int64 of the masked columns, then of the visible ones, among R x `width` tokens, the i-th row's being
    its columns from first[i] on."""
    begins = [i * width - column for i, column in enumerate(first)]
    places = [begin + column for begin, block in zip(begins, blocks, strict=True) for column in block.masked]
    places += [begin + column for begin, block in zip(begins, blocks, strict=True) for column in block.visible]
    return torch.tensor(places, dtype=torch.long)


class Span(NamedTuple):
    """The columns that a row feeds in a pass: first to last - 1, which see those before `stop`."""

    first: int
    last: int
    stop: int


def reach(config: ModelConfig, columns: Tensor, blocks: list[Block]) -> Tensor | None:
    """The last column (R or 1, W) that queries at `columns` (R or 1, W) see, if that is not all of the visible text."""
    size = config.block_size
    if not size:
        return None
    starts = torch.tensor([block.start for block in blocks], device=columns.device)[:, None]
    before = columns if config.attention == "joint" else columns // size * size + size - 1
    return before.where(columns < starts, max(block.stop for block in blocks) - 1)


def several(config: ModelConfig, span: Span, block: Block) -> bool:
    """True if the queries of a span of columns do not all see the same keys."""
    size = config.block_size
    if not size or span.first >= block.start:
        return False
    return config.attention == "joint" or span.first // size < (span.last - 1) // size


def visibility(columns: Tensor, stops: list[int], last_seen: Tensor | None) -> Tensor | None:
    """Return what queries at `columns` (R or 1, W) see of the keys 0 to max(stops) - 1: those of their row before
    stops[r], up to last_seen (R or 1, W) if it is given. Bool (R or 1, 1, W or 1, keys), None = everything.

    Padding sees no less than the row's first token, so that no query is blind.
    """
    attn_mask, ragged = None, min(stops) < max(stops)
    if not ragged and last_seen is None:
        return None
    keys = torch.arange(max(stops), device=columns.device)
    # 1. Nothing past the end of the row's visible text: (R, 1, 1, keys).
    if ragged:
        attn_mask = (keys < torch.tensor(stops, device=columns.device)[:, None])[:, None, None]
    # 2. Nothing past what the query may see: (R or 1, 1, W, keys).
    if last_seen is not None:
        no_later = (keys <= last_seen[:, :, None])[:, None]
        attn_mask = no_later if attn_mask is None else attn_mask & no_later
    return attn_mask


class NoCache:
    """The whole row in one pass, or in blocks all of it up to the end of the active one."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self.config, self.device = config, device

    def passes(self, ids: Tensor, blocks: list[Block]) -> list[ForwardPass]:
        rows, size = [block.row for block in blocks], self.config.block_size
        stops = [block.stop if size else block.length for block in blocks]
        width = max(stops)
        columns = torch.arange(width, device=self.device)[None]
        attn_mask = visibility(columns, stops, reach(self.config, columns, blocks) if width > size else None)
        select = flat_places(blocks, [0] * len(blocks), width).to(self.device)
        return [ForwardPass(rows, ids[rows, :width].to(self.device), select, attn_mask)]


class SpanCache:
    """K/V of every column of every active row. A pass feeds a span of each row and overwrites its K/V; a subclass
    decides which span."""

    def __init__(self, config: ModelConfig, shape: torch.Size, device: torch.device):
        self.device, self.config = device, config
        self.rows = list(range(shape[0]))  # numbers in the batch of the rows in the cache
        self.cache = ColumnCache(config, *shape)

    def drop_finished(self, blocks: list[Block]) -> None:
        """Free the K/V of rows that are not active any more."""
        rows = [block.row for block in blocks]
        if rows != self.rows:
            self.cache.keep(torch.tensor([self.rows.index(row) for row in rows], device=self.device))
            self.rows = rows

    def forward_pass(self, ids: Tensor, blocks: list[Block], spans: list[Span]) -> ForwardPass:
        """The pass that feeds spans[i] of the row of blocks[i]."""
        rows = [block.row for block in blocks]
        first, last, stops = (list(values) for values in zip(*spans, strict=True))
        # 1. The rows' places in the cache (R,); None = all.
        places = None
        if rows != self.rows:
            places = torch.tensor([self.rows.index(row) for row in rows], device=self.device)
        # 2. The columns that they feed (R or 1, W), their ids (R, W), and where in the cache the K/V go.
        if places is None and len(set(spans)) == 1:
            columns = torch.arange(first[0], last[0])[None]
            ids = ids[rows, first[0] : last[0]]
            target = slice(first[0], last[0])
        else:
            # As wide as the widest span; past the end of its own, a row writes to the scratch column.
            columns = torch.tensor(first)[:, None] + torch.arange(max(span.last - span.first for span in spans))
            columns[columns >= torch.tensor(last)[:, None]] = self.cache.scratch_column
            ids = ids[rows].gather(1, columns.clamp(max=ids.shape[1] - 1))
            target = columns.to(self.device)
        # 3. What they see: a mask within rows is needed only if a row feeds more than one block.
        columns, last_seen = columns.to(self.device), None
        if any(several(self.config, span, block) for span, block in zip(spans, blocks, strict=True)):
            last_seen = reach(self.config, columns, blocks)
        return ForwardPass(
            rows=rows,
            ids=ids.to(self.device),
            select=flat_places(blocks, first, ids.shape[1]).to(self.device),
            attn_mask=visibility(columns, stops, last_seen),
            position_ids=columns,
            cache=self.cache.view(places, target, max(stops)),
        )


class BlockCache(SpanCache):
    """Block-causal attention, exact: the K/V of every finished block, computed from its final tokens.

    A row feeds its finished blocks whose K/V are not final yet, and the active one after them. K/V become final
    (they are committed) in the pass of the next block's first step: at first those of the prompt (prefill), later those
    of the block just left. Every step overwrites the active block's K/V, and none of them are ever kept.

    A pass is as wide as the widest of its rows. If the rows of a batch change blocks at different steps, and arithmetic
    rather than the number of calls takes the time, UnfusedBlockCache may be the faster one.
    """

    def __init__(self, config: ModelConfig, shape: torch.Size, device: torch.device):
        super().__init__(config, shape, device)
        self.committed = [0] * shape[0]  # columns of each row of the batch whose K/V are final

    def passes(self, ids: Tensor, blocks: list[Block]) -> list[ForwardPass]:
        self.drop_finished(blocks)
        for block in blocks:  # a window goes back, and its pass, as every step's, keeps nothing of what it feeds
            self.committed[block.row] = min(self.committed[block.row], block.start)
        spans = [self._span(block.row, block.stop) for block in blocks]
        self._commit(blocks)
        return [self.forward_pass(ids, blocks, spans)]

    def _span(self, row: int, stop: int) -> Span:
        return Span(self.committed[row], stop, stop)

    def _commit(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.committed[block.row] = block.start


class UnfusedBlockCache(BlockCache):
    """The same, with prefill and commits in passes of their own."""

    def passes(self, ids: Tensor, blocks: list[Block]) -> list[ForwardPass]:
        self.drop_finished(blocks)
        # 1. What rows have finished before their active block: its K/V become final, and no logits are wanted.
        behind = [replace(block, masked=(), visible=()) for block in blocks if self.committed[block.row] < block.start]
        if not behind:
            return super().passes(ids, blocks)
        commit = self.forward_pass(ids, behind, [self._span(block.row, block.start) for block in behind])
        self._commit(behind)
        # 2. The active blocks of all rows.
        return [commit, *super().passes(ids, blocks)]


class PrefixCache(SpanCache):
    """Full attention, approximate (Fast-dLLM's PrefixCache): while a block is active, the K/V of all before it stay as
    they were in its first step, whose pass computes the whole row; later ones compute the block and what follows.

    A row refreshes its own K/V when it comes to a block of its own; a pass is as wide as the widest of its rows, so a
    batch whose rows change blocks at different steps saves less.
    """

    def __init__(self, config: ModelConfig, shape: torch.Size, device: torch.device):
        super().__init__(config, shape, device)
        self.refreshed_for = [-1] * shape[0]  # first column of the block at whose first step each row was computed

    def passes(self, ids: Tensor, blocks: list[Block]) -> list[ForwardPass]:
        self.drop_finished(blocks)
        spans = []
        for block in blocks:
            first_step = self.refreshed_for[block.row] != block.start
            spans.append(Span(0, block.length, block.length) if first_step else self._span(block))
            self.refreshed_for[block.row] = block.start
        return [self.forward_pass(ids, blocks, spans)]

    def _span(self, block: Block) -> Span:
        return Span(block.start, block.length, block.length)


class DualCache(PrefixCache):
    """Fast-dLLM's DualCache: the K/V of what follows the active block stay as they were in its first step, too."""

    def _span(self, block: Block) -> Span:
        return Span(block.start, block.stop, block.length)
