"""A canvas: rows of given tokens and of open positions, and what decoding writes into these.

Shapes: B rows, L positions of the longest row, R active rows, N positions written, V vocabulary. A position is given,
open or padding; an open one is masked until it is written, and written once unless the decoder edits.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoding.sampling import Draw, noise_width, penalise_repeats, sample_tokens
from model.transformer import Transformer


@dataclass(frozen=True)
class Canvas:
    """The start of a decoding: rows of given tokens and of [MASK]s to be filled, each row padded to the right."""

    ids: Tensor  # (B, L) int64: given tokens, [MASK] where open, padding
    open: Tensor  # (B, L) bool: to be filled
    lengths: Tensor  # (B,) int64: tokens of the row without padding
    surplus: tuple[int, ...]  # of each row: open positions at its end that complete a block and belong to no text
    may_end: bool = True  # whether EOS may be written: not if the text goes on after its blanks

    @classmethod
    def continuing(
        cls,
        prompts: list[list[int]],
        num_new: int,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        context: int | None = None,
    ) -> "Canvas":
        """Each prompt followed by `num_new` open positions; ValueError if that is more than the model accepts.

        A model of blocks was trained on whole ones, so for it a row goes on to the end of its last block, within
        `context` (None: as long as the model accepts). The text is cut again: see `surplus`.
        """
        context, size = context or config.max_position_embeddings, max(config.block_size, 1)
        ends = [len(prompt) + num_new for prompt in prompts]
        surplus = tuple(max(0, min(-end % size, context - end)) for end in ends)
        rows = [[*prompt, *[None] * (num_new + more)] for prompt, more in zip(prompts, surplus, strict=True)]
        return replace(cls.from_rows(rows, config, device, may_end=True), surplus=surplus)

    @classmethod
    def infilling(
        cls, rows: list[list[int | None]], config: ModelConfig, device: torch.device | str = "cpu"
    ) -> "Canvas":
        """None = a blank of one token; no blank is filled with EOS. ValueError if a row is too long for the model."""
        return cls.from_rows(rows, config, device, may_end=False)

    @classmethod
    def from_rows(
        cls, rows: list[list[int | None]], config: ModelConfig, device: torch.device | str, may_end: bool
    ) -> "Canvas":
        """Rows of token ids, None where open. ValueError for a row without given tokens or with a [MASK] given."""
        if not rows or any(all(token is None for token in row) for row in rows):
            raise ValueError("a canvas needs rows, and each of them a given token: at least BOS")
        if any(config.mask_token_id in row for row in rows):
            raise ValueError(f"token {config.mask_token_id}, [MASK], is among the given tokens; use None for a blank")
        lengths = [len(row) for row in rows]
        width = max(lengths)
        config.require_length(width, "prompt and continuation" if may_end else "the text with its blanks")
        # Fill (B, L) from the left: what is right of a row's end is padding, and not open.
        ids = torch.full((len(rows), width), config.pad_token_id)
        is_open = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor([config.mask_token_id if token is None else token for token in row])
            is_open[i, : len(row)] = torch.tensor([token is None for token in row])
        lengths, surplus = torch.tensor(lengths, device=device), (0,) * len(rows)
        return cls(ids.to(device), is_open.to(device), lengths, surplus, may_end)

    @property
    def given(self) -> Tensor:
        """(B, L) bool: neither open nor padding."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (columns < self.lengths[:, None]) & ~self.open

    def text(self, row: int) -> tuple[Tensor, Tensor]:
        """Ids and `open` of a row, both (L_row,), without padding and surplus."""
        length = int(self.lengths[row]) - self.surplus[row]
        return self.ids[row, :length], self.open[row, :length]


@dataclass(frozen=True)
class DecodingStep:
    """The tokens that one step wrote. Its tensors are its own copies, on the CPU."""

    ids: Tensor  # (B, L) int64 after the step; [MASK] where nothing is written yet
    written: Tensor  # (B, L) bool, written in this step, over [MASK] or over another token
    # (B, L) float32, the probability of each token written, in the distribution that it was drawn from: after guidance,
    # repetition penalty and forbidden tokens, before temperature, top-k and top-p. 0 elsewhere.
    confidence: Tensor
    num_forward_passes: int  # network calls so far
    rejected: Tensor | None = None  # (B, L) int64: drafts that were taken back in this step, [MASK] elsewhere
    num_drafted: int = 0  # tokens drafted and verified so far; 0: the decoder does not draft
    num_accepted: int = 0  # those of them that were written
    num_edits: int = 0  # written tokens that gave way to others, or to [MASK], so far


@dataclass(frozen=True)
class Decoded:
    """A filled canvas."""

    ids: Tensor  # (B, L) final, on the CPU; what a row left open after its text is EOS
    new: list[list[int]]  # per row the filled tokens, in order, up to and including the first EOS, without surplus
    ended: list[bool]  # EOS is among them
    num_forward_passes: int  # network calls of the whole batch
    row_passes: list[int]  # per row, calls made while it was active: what it would have cost alone
    row_drafted: list[int] = field(default_factory=list)  # per row, tokens drafted and verified; empty: no drafts
    row_accepted: list[int] = field(default_factory=list)  # per row, those of them that were written
    row_edits: list[int] = field(default_factory=list)  # per row, tokens that gave way; empty: no edits


class CanvasState:
    """A canvas while it is being filled, with one random generator and one count of passes per row.

    A row is active until all of its text is written, or an EOS and everything open to the left of it: what would
    follow belongs to no text. Each row draws from a generator of its own, so no row's text depends on its neighbours.

    The tokens are kept on the CPU, whatever computes the logits: reading them from a GPU would synchronise several
    times per step. What is asked of single rows is kept in lists, because a small network's step leaves time for few
    tensor operations. Noise is drawn on the canvas's own device.
    """

    def __init__(self, canvas: Canvas, config: ModelConfig, seeds: Sequence[int]):
        if len(seeds) != len(canvas.ids):
            raise ValueError(f"{len(canvas.ids)} rows need as many seeds, not {len(seeds)}")
        self.device, self.seeds, self.surplus = canvas.ids.device, list(seeds), canvas.surplus
        self.eos_token_id, self.mask_token_id = config.eos_token_id, config.mask_token_id
        self.open = canvas.open.cpu()
        self.ids = canvas.ids.cpu().clone(memory_format=torch.contiguous_format)
        # Per row: the columns open at first, and those of them that are still masked, both ascending.
        self.open_columns = [[column for column, is_open in enumerate(row) if is_open] for row in self.open.tolist()]
        self.masked_columns = [list(columns) for columns in self.open_columns]
        # The column of each text's last token: of the leftmost EOS written, at first of the last token that is wanted.
        self.last = [length - more - 1 for length, more in zip(canvas.lengths.tolist(), canvas.surplus, strict=True)]
        self.end = list(self.last)
        self.active_rows = [row for row, masked in enumerate(self.masked_columns) if masked]
        self.num_forward_passes, self.row_passes = 0, [0] * len(seeds)
        self.drafted, self.accepted, self.edits = list[int](), list[int](), list[int]()  # see Decoded
        self.held = set[int]()  # rows that stay active until they are released

    @property
    def masked(self) -> Tensor:
        """(B, L) bool: open and not written yet."""
        return self.open & (self.ids == self.mask_token_id)

    @property
    def written(self) -> Tensor:
        """(B, L) bool: open at first, written since."""
        return self.open & (self.ids != self.mask_token_id)

    def count_pass(self, rows: Sequence[int]) -> None:
        """Count a network call that computes these rows."""
        self.num_forward_passes += 1
        for row in rows:
            self.row_passes[row] += 1

    def uniform(self, counts: list[int], *shape: int) -> Tensor:
        """(sum of counts, *shape) float64 in [0, 1), counts[i] of them from the i-th active row's generator."""
        draws = [self.uniform_of(row, count, *shape) for row, count in zip(self.active_rows, counts, strict=True)]
        return torch.cat(draws) if len(draws) > 1 else draws[0]

    def uniform_of(self, row: int, *shape: int) -> Tensor:
        """float64 in [0, 1) from a row's own generator."""
        generator = self._generators[row]
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=generator.device)

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        # float64 is drawn, which MPS does not have.
        device = "cpu" if self.device.type == "mps" else self.device
        return [torch.Generator(device).manual_seed(seed) for seed in self.seeds]

    def penalise(self, logits: Tensor, rows: Tensor, columns: Tensor, draw: Draw) -> Tensor:
        """logits (N, V) of positions rows, columns (N,), less the penalty for tokens written nearby."""
        if draw.repeat_penalty == 0:
            return logits
        ids, written, columns = (values.to(logits.device) for values in (self.ids[rows], self.written[rows], columns))
        return penalise_repeats(logits, ids, written, columns, draw, exempt=self.eos_token_id)

    def penalise_left(self, logits: Tensor, rows: Tensor, columns: Tensor, strength: float) -> Tensor:
        """logits (N, V) of positions rows, columns (N,), `strength` off that of the token just to the left, unless that
        is EOS or not known."""
        if strength == 0:
            return logits
        left = self.ids[rows, (columns - 1).clamp(min=0)]
        strengths = strength * ((left != self.eos_token_id) & (left != self.mask_token_id))
        left, strengths = (values[:, None].to(logits.device) for values in (left, strengths))
        return logits.scatter_add(1, left, -strengths.to(logits.dtype))

    def sample(self, logits: Tensor, counts: list[int], draw: Draw) -> tuple[Tensor, Tensor]:
        """logits (N, V), counts[i] of them of the i-th active row -> tokens and their probabilities, both (N,)."""
        uniform = None
        if draw.temperature > 0:
            uniform = self.uniform(counts, noise_width(logits.shape[1], draw.top_k))
        return sample_tokens(logits, draw.temperature, draw.top_k, draw.top_p, uniform)

    def write(
        self, rows: Tensor, columns: Tensor, tokens: Tensor, confidence: Tensor, rejected: Tensor | None = None
    ) -> DecodingStep:
        """Write tokens (N,) at positions rows, columns (N,), masked ones or, if the decoder edits, written ones; a row
        that is finished by it becomes inactive.

        ValueError for a position that is given, or written and not to be edited, and for [MASK] over [MASK].
        """
        rows, columns, tokens, confidence = (values.cpu() for values in (rows, columns, tokens, confidence))
        places = rows * self.ids.shape[1] + columns  # (N,) among the B * L positions
        is_edit, to_mask = ~self.masked.view(-1)[places], tokens == self.mask_token_id
        if not (self.open if self.edits else self.masked).view(-1)[places].all() or (to_mask & ~is_edit).any():
            raise ValueError(
                "only masked positions can be written, and only with tokens other than [MASK]; a decoder that edits "
                "may also change what it has written"
            )
        # 1. The tensors (B, L).
        self.ids.view(-1)[places] = tokens
        written, probability = torch.zeros(self.ids.shape, dtype=torch.bool), torch.zeros(self.ids.shape)
        written.view(-1)[places] = ~to_mask
        probability.view(-1)[places] = confidence
        # 2. The lists of single rows.
        changes = (values.tolist() for values in (rows, columns, tokens, is_edit))
        for row, column, token, edited in zip(*changes, strict=True):
            if edited:
                self._note_edit(row, column, token)
                continue
            self.masked_columns[row].remove(column)
            if token == self.eos_token_id:
                self.end[row] = min(column, self.end[row])
        self.active_rows = [row for row in self.active_rows if row in self.held or not self._has_ended(row)]
        drafts = rejected, sum(self.drafted), sum(self.accepted)
        return DecodingStep(self.ids.clone(), written, probability, self.num_forward_passes, *drafts, sum(self.edits))

    def _note_edit(self, row: int, column: int, token: int) -> None:
        """An end may come or go by it; without it the text goes on to the next one, or to the last token wanted."""
        self.edits[row] += 1
        if token == self.mask_token_id:
            insort(self.masked_columns[row], column)
        ids = self.ids[row].tolist()
        ends = (place for place in self.open_columns[row] if ids[place] == self.eos_token_id)
        self.end[row] = min(next(ends, self.last[row]), self.last[row])

    def release(self, row: int) -> None:
        """Make a row that is held inactive if it is written to its end."""
        if self._has_ended(row):
            self.active_rows.remove(row)

    def _has_ended(self, row: int) -> bool:
        masked = self.masked_columns[row]
        return not masked or self.end[row] < masked[0]

    def finish(self) -> Decoded:
        """The result; ValueError while a row is active."""
        if self.active_rows:
            raise ValueError(f"{len(self.active_rows)} rows are unfinished")
        ids = self.ids.masked_fill(self.masked, self.eos_token_id)
        new, ended = [], []
        for row, columns, more in zip(ids.tolist(), self.open_columns, self.surplus, strict=True):
            tokens = [row[column] for column in columns[: len(columns) - more]]
            ended.append(self.eos_token_id in tokens)
            new.append(tokens[: tokens.index(self.eos_token_id) + 1] if ended[-1] else tokens)
        lists = list(self.row_passes), self.drafted, self.accepted, self.edits
        return Decoded(ids, new, ended, self.num_forward_passes, *lists)


class Decoder:
    """Fills a canvas step by step. Rows share forward passes, and each comes out as it would alone."""

    def __init__(self, model: Transformer, canvas: Canvas, seeds: Sequence[int]):
        """seeds: one per row. ValueError if rotary frequencies would depend on the longest row: YaRN without
        set_context."""
        if model.config.inference_rope_scaling and model.context_length is None:
            raise ValueError(
                "call model.set_context(length) first: a stretched rotary embedding depends on the context"
            )
        self.model, self.state = model, CanvasState(canvas, model.config, seeds)

    @property
    def finished(self) -> bool:
        """True if every row is finished."""
        return not self.state.active_rows

    def step(self) -> DecodingStep:
        """Write at least one token in every row that is not finished; with editing perhaps none, if all is written."""
        raise NotImplementedError

    def finish(self) -> Decoded:
        """The result; ValueError while a row is unfinished."""
        return self.state.finish()


def prompt_lengths(canvas: Canvas) -> Tensor:
    """(B,) int64; ValueError if a row is not a prompt followed by open positions."""
    start = canvas.lengths - canvas.open.sum(dim=1)
    columns = torch.arange(canvas.ids.shape[1], device=start.device)
    if not torch.equal(canvas.given, columns < start[:, None]):
        raise ValueError(
            "an autoregressive model, and self_speculative, write at the end of a text only; infilling needs one of "
            "diffusion, and another policy"
        )
    return start
