"""Filling a canvas by iterative denoising. Shapes: B rows, L positions, N candidates, V vocabulary.

Rows are independent processes that share forward passes: each has its own blocks, steps, generator and end.
"""

import math
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.canvas import Canvas, Decoded, DecodingStep, Draft, require_context
from model.config import ModelConfig
from model.denoiser_cache import (
    Active,
    BlockCached,
    DualCached,
    Forward,
    PrefixCached,
    Recomputed,
    UnfusedBlockCached,
)
from model.losses import forbid
from model.remasking import POLICIES, Step, commit, padded, transfer_schedule
from model.sampling import Draw, guide, noise_width, penalise_repeats, require_draw, sample_tokens
from model.transformer import Transformer

DEFAULT_BLOCK_SIZE = 8  # on larger canvases a small model commits to the EOS at their end first: report, section 10


@dataclass(frozen=True)
class DenoisingConfig:
    """Diffusion sampling."""

    gen_steps: Annotated[
        int,
        "denoising steps for the whole continuation, at least one per block, at most one per token; "
        "threshold, factor: those over which the cap grows; hybrid: the most",
    ] = 64
    gen_block_size: Annotated[
        int | None,
        f"denoise blocks of so many tokens from left to right (0 = the whole continuation at once; none: the size that "
        f"a checkpoint of block diffusion was trained for, else {DEFAULT_BLOCK_SIZE})",
    ] = None
    gen_remasking: Annotated[
        Literal[*POLICIES],
        "which predictions a step keeps; hybrid: as threshold, without the cap, but as many as --gen-steps asks for",
        ("--llada2-enable-parallel-decoding", "hybrid"),
    ] = "low_confidence"
    gen_confidence_threshold: Annotated[float, "threshold, hybrid: keep predictions of at least this probability"] = 0.9
    gen_factor: Annotated[float, "factor: keep the n best, the n-th having a probability of 1 - factor/(n+1)"] = 1.0
    gen_cap_start_ratio: Annotated[
        float, "threshold, factor: keep at most this share of a block's masked tokens in its first step, ..."
    ] = 0.08
    gen_cap_end_ratio: Annotated[float, "... and this share in the last of its steps; linear between"] = 0.5
    gen_max_decode_per_step: Annotated[int, "threshold, factor: keep at most so many tokens per step"] = 32
    gen_temp: Annotated[float, "temperature, 0 = the likeliest token"] = 0.8
    gen_top_k: Annotated[int, "sample among the k likeliest tokens (0 = all)"] = 8
    gen_top_p: Annotated[float, "sample among the fewest tokens that hold this share of the probability"] = 1.0
    gen_repeat_penalty: Annotated[float, "taken off a token's logit for each time it was written nearby (0 = off)"] = (
        0.15
    )
    gen_repeat_window: Annotated[int, "tokens to either side that are nearby"] = 128
    gen_cfg_scale: Annotated[float, "classifier-free guidance; above 0 a step costs two passes"] = 0.0
    gen_eos: Annotated[
        Literal["free", "confidence", "never"],
        "the end of the text: like any token, kept only after all others of its block, or never",
    ] = "free"
    gen_cache: Annotated[
        Literal["auto", "none", "block", "prefix", "dual"],
        "keys and values kept between steps; block: those of finished blocks, exact (checkpoints of block diffusion); "
        "prefix, dual: approximate (those of full attention): what is before a block, dual: and behind it, stays as it "
        "was in the block's first step; auto: block or none",
    ] = "auto"
    gen_fuse_commit: Annotated[
        bool, "compute a finished block's keys and values in the first pass of the next block, not in one of their own"
    ] = True

    def __post_init__(self):
        for name in ("gen_steps", "gen_max_decode_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.gen_block_size is not None and not 0 <= self.gen_block_size < 2**31:
            raise ValueError(f"--gen-block-size must be a length in tokens or 0, not {self.gen_block_size}")
        for name in ("gen_confidence_threshold", "gen_cap_start_ratio", "gen_cap_end_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be in (0, 1], not {getattr(self, name)}")
        if not 0 < self.gen_factor < math.inf:
            raise ValueError(f"--gen-factor must be positive, not {self.gen_factor}")
        if not 0 <= self.gen_cfg_scale < math.inf:
            raise ValueError(f"--gen-cfg-scale must not be negative, not {self.gen_cfg_scale}")
        require_draw(self.draw, "--gen-", "temp")

    @property
    def draw(self) -> Draw:
        return Draw(self.gen_temp, self.gen_top_k, self.gen_top_p, self.gen_repeat_penalty, self.gen_repeat_window)

    def fitted(self, model: ModelConfig) -> "DenoisingConfig":
        """With the block size and the cache that the checkpoint is decoded with in place of `none` and `auto`.

        ValueError for an autoregressive checkpoint, and for settings that its attention does not go with.
        """
        if model.attention == "causal":
            raise ValueError(
                "this checkpoint is autoregressive; it is used by: "
                "uv run python -m scripts.eval.eval_minimind --checkpoint FILE"
            )
        blocks, size, cache = model.attention == "block", self.gen_block_size, self.gen_cache
        if blocks and size not in (None, model.block_size):
            raise ValueError(
                f"--gen-block-size {size} is not {model.block_size}, the block size that this checkpoint was trained "
                "for; leave it out"
            )
        if blocks and cache in ("prefix", "dual"):
            raise ValueError(
                f"--gen-cache {cache} is for checkpoints of full attention; this one was trained by block diffusion: "
                "give block, which is exact, or none"
            )
        if not blocks and cache == "block":
            raise ValueError(
                "--gen-cache block is for checkpoints of block diffusion; this one has full attention: give none, "
                "prefix or dual"
            )
        if cache == "auto":
            cache = "block" if blocks else "none"
        if not self.gen_fuse_commit and cache != "block":
            raise ValueError(
                "--no-gen-fuse-commit has no effect without the cache of finished blocks, which checkpoints of block "
                "diffusion have; leave it out"
            )
        if size is None:
            size = model.block_size if blocks else DEFAULT_BLOCK_SIZE
        return replace(self, gen_block_size=size, gen_cache=cache)

    def steps_of(self, first: int, last: int, num_open: int) -> int:
        """Steps of the block from open position `first` to before `last`: its share by length, at least one."""
        return max(1, self.gen_steps * last // num_open - self.gen_steps * first // num_open)

    def budget(self, num_masked: int, step: int, num_steps: int) -> int:
        """The most tokens to keep in `step` of a block (from 0), `num_masked` of whose tokens are still masked."""
        progress = min(1.0, step / max(1, num_steps - 1))
        ratio = self.gen_cap_start_ratio + (self.gen_cap_end_ratio - self.gen_cap_start_ratio) * progress
        # 25 x 0.08 must be 2, not the next number above it.
        return max(1, min(math.ceil(round(num_masked * ratio, 9)), self.gen_max_decode_per_step))


@dataclass(frozen=True)
class Candidates:
    """What would be written at the masked positions of the active blocks, row by row."""

    rows: Tensor  # (N,) int64
    columns: Tensor  # (N,) int64
    tokens: Tensor  # (N,) int64
    confidence: Tensor  # (N,) float32, of each; see DecodingStep
    kept: Tensor  # (N,) bool, what the remasking policy writes; the rest stays [MASK]


class Denoiser:
    """LLaDA's sampler, a step at a time: predict all masked tokens of each row's active block, keep some.

    A row whose block is full goes on to the next at once. Under full attention, block b of a row is its open positions
    b * size to (b + 1) * size, in order, and the whole canvas is visible throughout. A checkpoint of block diffusion
    has the grid that it was trained on: block b is the columns b * size to (b + 1) * size, whatever is given or open in
    them, and later blocks are not visible, given tokens in them included (an infilled blank is written for what stands
    before it and in its own block). To drive it oneself, with a say in what is written:

        denoiser = Denoiser(model, canvas, config, seeds)
        while not denoiser.finished:
            candidates = denoiser.predict()
            step = denoiser.commit(candidates)  # or dataclasses.replace(candidates, kept=..., tokens=...)
        decoded = denoiser.finish()
    """

    def __init__(self, model: Transformer, canvas: Canvas, config: DenoisingConfig, seeds: Sequence[int]):
        self.config = config = config.fitted(model.config)
        require_context(model)
        self.model_config, self.may_end = model.config, canvas.may_end
        self.draft, self.lengths = Draft(canvas, model.config, seeds), canvas.lengths.tolist()
        self.forward = forward_of(model, canvas, config, self.draft)
        if config.gen_cfg_scale > 0:
            self.unprompted, self.given = forward_of(model, canvas, config, self.draft), canvas.given.cpu()
        self.on_grid = model.config.attention == "block"
        self.block_size = config.gen_block_size or max(map(len, self.draft.open_columns)) or 1
        # Per row: the active block, its columns, the steps made in it, and its transfer schedule.
        self.block, self.step = [-1] * len(seeds), [0] * len(seeds)
        self.span: list[tuple[int, int]] = [(0, 0)] * len(seeds)
        self.schedule: list[list[int]] = [[] for _ in seeds]

    @property
    def finished(self) -> bool:
        return not self.draft.rows

    def predict(self) -> Candidates:
        """One forward pass, or two with guidance; writes nothing. ValueError once every row is finished."""
        if self.finished:
            raise ValueError("every row is finished; call finish()")
        wanted = [self._wanted(row) for row in self.draft.rows]
        counts = [len(columns) for columns in wanted]
        with torch.inference_mode():
            logits = self._logits(wanted)
            draw, uniform = self.config.draw, None
            if draw.temperature > 0:
                uniform = self.draft.uniform(counts, noise_width(logits.shape[1], draw.top_k))
            tokens, confidence = sample_tokens(logits, draw.temperature, draw.top_k, draw.top_p, uniform)
            tokens, confidence = tokens.cpu(), confidence.cpu()
            kept = self._keep(counts, logits, tokens, confidence)
        rows = torch.tensor([row for row, count in zip(self.draft.rows, counts, strict=True) for _ in range(count)])
        columns = torch.tensor([column for columns in wanted for column in columns])
        # Copies: what inference mode makes can be changed in it alone.
        return Candidates(rows, columns, tokens.clone(), confidence.clone(), kept.clone())

    @torch.no_grad()
    def commit(self, candidates: Candidates) -> DecodingStep:
        """Write the candidates that are kept."""
        for row in self.draft.rows:
            self.step[row] += 1
        kept = candidates.kept
        return self.draft.write(
            candidates.rows[kept], candidates.columns[kept], candidates.tokens[kept], candidates.confidence[kept]
        )

    def finish(self) -> Decoded:
        """The result; ValueError while a row is unfinished."""
        return self.draft.finish()

    def _wanted(self, row: int) -> list[int]:
        """The masked columns of the row's active block, which is the next one if that of the step before is full."""
        left = self.draft.left[row]
        first, stop = next(iter(left)), self.span[row][1]
        if first < stop:
            return list(takewhile(stop.__gt__, left))
        opened = self.draft.open_columns[row]
        block = (first if self.on_grid else bisect_left(opened, first)) // self.block_size
        begin, end = block * self.block_size, (block + 1) * self.block_size
        if self.on_grid:
            self.span[row] = begin, min(end, self.lengths[row])
            begin, end = bisect_left(opened, begin), bisect_left(opened, end)
        else:
            end = min(end, len(opened))
            self.span[row] = opened[begin], opened[end - 1] + 1
        columns = list(takewhile(self.span[row][1].__gt__, left))
        self.block[row], self.step[row] = block, 0
        self.schedule[row] = transfer_schedule(len(columns), self.config.steps_of(begin, end, len(opened)))
        return columns

    def _logits(self, wanted: list[list[int]]) -> Tensor:
        """(N, V) float32 of the columns wanted in each row, as they are drawn from."""
        draft, rows = self.draft, self.draft.rows
        start, stop = ([self.span[row][side] for row in rows] for side in (0, 1))
        at = Active(rows, draft.unfinished(draft.ids), [self.lengths[row] for row in rows], start, stop, wanted)
        logits = self.forward.logits(at)
        if self.config.gen_cfg_scale > 0:
            given = draft.unfinished(self.given)
            without = replace(at, ids=torch.where(given, self.model_config.mask_token_id, at.ids))
            logits = guide(logits, self.unprompted.logits(without), self.config.gen_cfg_scale)
        draw, eos = self.config.draw, self.model_config.eos_token_id
        if draw.repeat_penalty > 0:
            place = torch.tensor([place for place, columns in enumerate(wanted) for _ in columns])
            columns = torch.tensor([column for columns in wanted for column in columns])
            near = at.ids[place], draft.unfinished(draft.written)[place], columns
            ids, written, columns = (values.to(logits.device) for values in near)
            logits = penalise_repeats(logits, ids, written, columns, draw.repeat_penalty, draw.repeat_window, eos)
        if self.config.gen_eos == "never" or not self.may_end:
            forbid(logits, eos)
        return forbid(logits, self.model_config.mask_token_id)

    def _keep(self, counts: list[int], logits: Tensor, tokens: Tensor, confidence: Tensor) -> Tensor:
        """(N,) bool: what the remasking policy keeps of the candidates, counts[i] of which are the i-th row's."""
        masked = torch.ones(len(counts), max(counts), dtype=torch.bool)
        if min(counts) < masked.shape[1]:
            masked = torch.arange(masked.shape[1]) < torch.tensor(counts)[:, None]
        held_back = torch.zeros_like(tokens, dtype=torch.bool)
        if self.config.gen_eos == "confidence":
            held_back = tokens == self.model_config.eos_token_id
            confidence = confidence.masked_fill(held_back, 0.0)
        quotas, budgets = [], []
        for row, left in zip(self.draft.rows, counts, strict=True):
            step, schedule = self.step[row], self.schedule[row]
            quotas.append(schedule[step] if step < len(schedule) - 1 else left)
            budgets.append(self.config.budget(left, step, len(schedule)))
        step = Step(
            confidence=padded(confidence, masked),
            masked=masked,
            held_back=padded(held_back, masked),
            quota=torch.tensor(quotas),
            budget=torch.tensor(budgets),
            threshold=self.config.gen_confidence_threshold,
            factor=self.config.gen_factor,
            logits=logits,
            noise=lambda: self.draft.uniform(counts).float(),
        )
        return commit(self.config.gen_remasking, step)[masked]


def forward_of(model: Transformer, canvas: Canvas, config: DenoisingConfig, draft: Draft) -> Forward:
    """How a fitted config computes the logits of a step."""
    if config.gen_cache == "none":
        block_size = config.gen_block_size if model.config.attention == "block" else 0
        return Recomputed(model, draft.device, block_size, draft.spent)
    block = BlockCached if config.gen_fuse_commit else UnfusedBlockCached
    kinds = {"block": block, "prefix": PrefixCached, "dual": DualCached}
    return kinds[config.gen_cache](model, draft.device, canvas.ids.shape, draft.spent)


def denoise(
    model: Transformer, canvas: Canvas, config: DenoisingConfig, seeds: Sequence[int]
) -> Generator[DecodingStep, None, Decoded]:
    """Every step of a Denoiser until it has finished; returns its result."""
    denoiser = Denoiser(model, canvas, config, seeds)
    while not denoiser.finished:
        yield denoiser.commit(denoiser.predict())
    return denoiser.finish()
