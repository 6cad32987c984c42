"""A canvas: rows of given tokens and of open positions, and what decoding writes into these.

Shapes: B rows, L positions of the longest row. A position is given, open or padding; open ones are written once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer


@dataclass(frozen=True)
class Canvas:
    """Where decoding starts: rows of given tokens and of [MASK]s to be filled, each row padded to the right."""

    ids: Tensor  # (B, L) int64: given tokens, [MASK] where open, padding
    open: Tensor  # (B, L) bool: to be filled
    lengths: Tensor  # (B,) int64: tokens of the row, padding not counted
    may_end: bool = True  # whether EOS may be written; a text around blanks goes on behind them

    @classmethod
    def continuing(
        cls, prompts: list[list[int]], num_new: int, config: ModelConfig, device: torch.device | str = "cpu"
    ) -> "Canvas":
        """Each prompt followed by `num_new` open positions; ValueError if that is more than the model accepts."""
        return cls._of([[*prompt, *[None] * num_new] for prompt in prompts], config, device, may_end=True)

    @classmethod
    def infilling(
        cls, rows: list[list[int | None]], config: ModelConfig, device: torch.device | str = "cpu"
    ) -> "Canvas":
        """None = a blank of one token; no blank is filled with EOS. ValueError if a row is too long for the model."""
        return cls._of(rows, config, device, may_end=False)

    @classmethod
    def _of(
        cls, rows: list[list[int | None]], config: ModelConfig, device: torch.device | str, may_end: bool
    ) -> "Canvas":
        if not rows or any(all(token is None for token in row) for row in rows):
            raise ValueError("a canvas needs rows, and each of them a given token: at least BOS")
        if any(config.mask_token_id in row for row in rows):
            raise ValueError(f"token {config.mask_token_id}, [MASK], is among the given tokens; use None for a blank")
        lengths = [len(row) for row in rows]
        width = max(lengths)
        config.require_length(width, "prompt and continuation" if may_end else "the text with its blanks")
        padded = [[config.mask_token_id if token is None else token for token in row] for row in rows]
        ids = torch.tensor([row + [config.pad_token_id] * (width - len(row)) for row in padded])
        blank = torch.tensor([[token is None for token in row] + [False] * (width - len(row)) for row in rows])
        return cls(ids.to(device), blank.to(device), torch.tensor(lengths, device=device), may_end)

    @property
    def given(self) -> Tensor:
        """(B, L) bool: neither open nor padding."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (columns < self.lengths[:, None]) & ~self.open


@dataclass(frozen=True)
class DecodingStep:
    """What one step wrote. Its tensors are its own copies, on the CPU."""

    canvas: Tensor  # (B, L) int64 after the step; [MASK] where nothing is written yet
    written: Tensor  # (B, L) bool, written in this step
    # (B, L) float32, the probability of what was written in the distribution that it was drawn from: after guidance,
    # repetition penalty and forbidden tokens, before temperature, top-k and top-p. 0 elsewhere.
    confidence: Tensor
    num_forward_passes: int  # network calls so far


@dataclass(frozen=True)
class Decoded:
    canvas: Tensor  # (B, L) final, on the CPU; what a row that ended had left open is EOS
    new: list[list[int]]  # per row the filled tokens, in order, up to and including the first EOS
    ended: list[bool]  # EOS was produced
    num_forward_passes: int  # network calls of the whole batch
    row_passes: list[int]  # per row, those made while it was unfinished: what it would have cost alone


def require_context(model: Transformer) -> None:
    """ValueError where the rotary frequencies would follow the longest row of a batch (YaRN without set_context)."""
    if model.config.inference_rope_scaling and model.context_length is None:
        raise ValueError("call model.set_context(length) first: a stretched rotary embedding depends on the context")


class Draft:
    """A canvas while it is being filled, with one random generator and one pass count per row.

    A row is unfinished until all of it is written, or an EOS and everything open to the left of it: what would follow
    belongs to no text. Rows draw from generators of their own, so no row's text depends on its neighbours.

    What is written where is kept on the CPU, whatever computes the logits: an accelerator would be asked after it, and
    waited for, several times a step. What is asked of single rows is kept in lists, not tensors: in a small network's
    time there is room for few tensor operations. Noise is drawn where the canvas was.
    """

    def __init__(self, canvas: Canvas, config: ModelConfig, seeds: Sequence[int]):
        if len(seeds) != len(canvas.ids):
            raise ValueError(f"{len(canvas.ids)} rows need as many seeds, not {len(seeds)}")
        self.device, self.seeds = canvas.ids.device, list(seeds)
        self.eos_token_id, self.mask_token_id, self.open = config.eos_token_id, config.mask_token_id, canvas.open.cpu()
        self.ids = canvas.ids.cpu().clone(memory_format=torch.contiguous_format)
        self.open_columns = [[i for i, blank in enumerate(row) if blank] for row in self.open.tolist()]
        # Per row the columns still to be written, in order; dicts, so that each is crossed out in constant time.
        self.left: list[dict[int, None]] = [dict.fromkeys(columns) for columns in self.open_columns]
        self.end = [self.ids.shape[1]] * len(seeds)  # the column of the leftmost EOS written
        self.rows = [row for row, left in enumerate(self.left) if left]  # unfinished
        self.num_forward_passes, self.row_passes = 0, [0] * len(seeds)

    @property
    def masked(self) -> Tensor:
        """(B, L) bool: open and not written yet."""
        return self.open & (self.ids == self.mask_token_id)

    @property
    def written(self) -> Tensor:
        """(B, L) bool: open at first, written since."""
        return self.open & (self.ids != self.mask_token_id)

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One per row; float64 is drawn, which MPS does not have."""
        device = "cpu" if self.device.type == "mps" else self.device
        return [torch.Generator(device).manual_seed(seed) for seed in self.seeds]

    def spent(self, rows: Sequence[int]) -> None:
        """Note a network call for these rows."""
        self.num_forward_passes += 1
        for row in rows:
            self.row_passes[row] += 1

    def unfinished(self, values: Tensor) -> Tensor:
        """values (B, ...) -> (R, ...), those of the unfinished rows."""
        return values if len(self.rows) == len(values) else values[self.rows]

    def uniform(self, counts: list[int], *shape: int) -> Tensor:
        """(sum of counts, *shape) float64 in [0, 1), counts[i] of them from the i-th unfinished row's generator."""
        draws = [
            torch.rand(count, *shape, generator=generator, dtype=torch.float64, device=generator.device)
            for count, generator in zip(counts, (self.generators[row] for row in self.rows), strict=True)
        ]
        return torch.cat(draws) if len(draws) > 1 else draws[0]

    def write(self, rows: Tensor, columns: Tensor, tokens: Tensor, confidence: Tensor) -> DecodingStep:
        """Write tokens (N,) at masked positions rows, columns (N,); a row that is finished by it leaves `rows`.

        ValueError for a position that is not masked, or a [MASK] to be written.
        """
        rows, columns, tokens, confidence = (values.cpu() for values in (rows, columns, tokens, confidence))
        changes, mask = list(zip(rows.tolist(), columns.tolist(), tokens.tolist(), strict=True)), self.mask_token_id
        if any(column not in self.left[row] or token == mask for row, column, token in changes):
            raise ValueError("only masked positions can be written, and only with tokens other than [MASK]")
        for row, column, token in changes:
            self.left[row].pop(column, None)
            if token == self.eos_token_id and column < self.end[row]:
                self.end[row] = column
        places, shape = rows * self.ids.shape[1] + columns, self.ids.shape
        written, probability = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        written.view(-1)[places] = True
        probability.view(-1)[places] = confidence
        self.ids.view(-1)[places] = tokens
        self.rows = [row for row in self.rows if not self._has_ended(row)]
        return DecodingStep(self.ids.clone(), written, probability, self.num_forward_passes)

    def _has_ended(self, row: int) -> bool:
        left = self.left[row]
        return not left or self.end[row] < next(iter(left))

    def finish(self) -> Decoded:
        """The result; ValueError while a row is unfinished."""
        if self.rows:
            raise ValueError(f"{len(self.rows)} rows are unfinished")
        canvas, eos = self.ids.masked_fill(self.masked, self.eos_token_id), self.eos_token_id
        new = [[ids[c] for c in columns] for ids, columns in zip(canvas.tolist(), self.open_columns, strict=True)]
        ended = [eos in tokens for tokens in new]
        new = [tokens[: tokens.index(eos) + 1] if end else tokens for tokens, end in zip(new, ended, strict=True)]
        return Decoded(canvas, new, ended, self.num_forward_passes, list(self.row_passes))
