"""Filling a canvas by iterative denoising. Shapes: B rows, L positions, N candidates, V vocabulary.

Rows are independent processes that share forward passes: each has its own blocks, steps, generator and end.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.attention_mask import document_mask
from model.canvas import Canvas, Decoded, DecodingStep, Draft, require_context
from model.losses import forbid
from model.remasking import POLICIES, Step, commit, transfer_schedule
from model.sampling import Draw, guide, penalise_repeats, require_draw, sample_tokens
from model.transformer import Transformer


@dataclass(frozen=True)
class DenoisingConfig:
    """Diffusion sampling."""

    gen_steps: Annotated[
        int,
        "denoising steps for the whole continuation, at least one per block, at most one per token; "
        "threshold, factor: those over which the cap grows",
    ] = 64
    gen_block_size: Annotated[
        int, "denoise blocks of so many tokens from left to right (0 = the whole continuation at once)"
    ] = 8  # on larger canvases a small model commits to the EOS at their end first: report, section 10
    gen_remasking: Annotated[Literal[*POLICIES], "which predictions a step keeps"] = "low_confidence"
    gen_confidence_threshold: Annotated[float, "threshold: keep predictions of at least this probability"] = 0.9
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

    def __post_init__(self):
        for name in ("gen_steps", "gen_max_decode_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.gen_block_size < 2**31:
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

    def steps_of(self, first: int, last: int, num_open: int) -> int:
        """Steps of the block from open position `first` to before `last`: its share by length, at least one."""
        return max(1, self.gen_steps * last // num_open - self.gen_steps * first // num_open)

    def budget(self, num_masked: int, step: int, num_steps: int) -> int:
        """The most tokens to keep in `step` of a block (from 0), `num_masked` of whose tokens are still masked."""
        progress = min(1.0, step / max(1, num_steps - 1))
        ratio = self.gen_cap_start_ratio + (self.gen_cap_end_ratio - self.gen_cap_start_ratio) * progress
        # 25 x 0.08 must be 2, not the next number above it.
        return max(1, min(math.ceil(round(num_masked * ratio, 9)), self.gen_max_decode_per_step))


class FullForward:
    """Logits under full attention, and how many network calls they took."""

    def __init__(self, model: Transformer):
        self.model, self.num_passes = model, 0

    def logits(self, ids: Tensor, lengths: list[int], wanted: Tensor) -> Tensor:
        """ids (R, L), of which lengths[r] are row r's own, wanted (R, L) bool -> float32 (N, V), row by row."""
        length = max(lengths)
        ids, wanted, attn_mask = ids[:, :length], wanted[:, :length], None
        if min(lengths) < length:
            own = torch.tensor(lengths, device=ids.device)[:, None]
            attn_mask = document_mask((torch.arange(length, device=ids.device) >= own).long())
        self.num_passes += 1
        return self.model(ids, attn_mask=attn_mask, select=wanted.flatten().nonzero()[:, 0]).float()


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

    Block b of a row is its open positions b * size to (b + 1) * size, in order; a row whose block is full goes on to
    the next at once. The whole canvas is visible throughout. To drive it oneself, with a say in what is written:

        denoiser = Denoiser(model, canvas, config, seeds)
        while not denoiser.finished:
            candidates = denoiser.predict()
            step = denoiser.commit(candidates)  # or dataclasses.replace(candidates, kept=..., tokens=...)
        decoded = denoiser.finish()
    """

    def __init__(self, model: Transformer, canvas: Canvas, config: DenoisingConfig, seeds: Sequence[int]):
        if model.config.attention != "full":
            raise ValueError("this checkpoint is autoregressive; decode it with scripts.eval.eval_minimind")
        require_context(model)
        self.model_config, self.config, self.canvas = model.config, config, canvas
        self.draft, self.forward = Draft(canvas, model.config, seeds), FullForward(model)
        self.lengths = canvas.lengths.tolist()
        num_open = canvas.open.sum(dim=1)
        size = torch.full_like(num_open, config.gen_block_size) if config.gen_block_size else num_open.clamp(min=1)
        self.block_of = (canvas.open.cumsum(dim=1) - 1) // size[:, None]  # (B, L), of the open positions
        self.num_open, self.block_size = num_open.tolist(), size.tolist()
        # Per row: the active block, the steps made in it, and its transfer schedule.
        self.block, self.step = [-1] * len(seeds), [0] * len(seeds)
        self.schedule: list[list[int]] = [[] for _ in seeds]

    @property
    def finished(self) -> bool:
        return not self.draft.rows

    @torch.no_grad()
    def predict(self) -> Candidates:
        """One forward pass, or two with guidance; writes nothing. ValueError once every row is finished."""
        if self.finished:
            raise ValueError("every row is finished; call finish()")
        rows = torch.tensor(self.draft.rows, device=self.draft.ids.device)
        masked, block_of = self.draft.masked[rows], self.block_of[rows]
        block = block_of.masked_fill(~masked, block_of.shape[1]).amin(dim=1, keepdim=True)
        active = masked & (block_of == block)
        counts = active.sum(dim=1).tolist()
        self._enter(block[:, 0].tolist(), counts)
        place, columns = active.nonzero(as_tuple=True)
        logits = self._logits(rows, active, place, columns)
        draw = self.config.draw
        uniform = self.draft.uniform(counts, logits.shape[1]) if draw.temperature > 0 else None
        tokens, confidence = sample_tokens(logits, draw.temperature, draw.top_k, draw.top_p, uniform)
        kept = self._keep(counts, logits, tokens, confidence)
        return Candidates(rows[place], columns, tokens, confidence, kept)

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

    def _enter(self, blocks: list[int], counts: list[int]) -> None:
        """Where a row has come to a new block: its schedule from the start."""
        for row, block, count in zip(self.draft.rows, blocks, counts, strict=True):
            if self.block[row] != block:
                self.block[row], self.step[row] = block, 0
                size, total = self.block_size[row], self.num_open[row]
                steps = self.config.steps_of(block * size, min((block + 1) * size, total), total)
                self.schedule[row] = transfer_schedule(count, steps)

    def _logits(self, rows: Tensor, active: Tensor, place: Tensor, columns: Tensor) -> Tensor:
        """(N, V) float32 of the `active` positions of `rows`, at place, columns (N,), as they are drawn from."""
        ids, lengths = self.draft.ids[rows], [self.lengths[row] for row in self.draft.rows]
        logits = self.forward.logits(ids, lengths, active)
        if self.config.gen_cfg_scale > 0:
            without = torch.where(self.canvas.given[rows], self.model_config.mask_token_id, ids)
            logits = guide(logits, self.forward.logits(without, lengths, active), self.config.gen_cfg_scale)
        self.draft.spent(self.forward.num_passes)
        draw, eos = self.config.draw, self.model_config.eos_token_id
        if draw.repeat_penalty > 0:
            written = self.draft.written[rows]
            logits = penalise_repeats(
                logits, ids[place], written[place], columns, draw.repeat_penalty, draw.repeat_window, eos
            )
        if self.config.gen_eos == "never" or not self.canvas.may_end:
            forbid(logits, eos)
        return forbid(logits, self.model_config.mask_token_id)

    def _keep(self, counts: list[int], logits: Tensor, tokens: Tensor, confidence: Tensor) -> Tensor:
        """(N,) bool: what the remasking policy keeps of the candidates, counts[i] of which are the i-th row's."""
        count = torch.tensor(counts, device=tokens.device)
        masked = torch.arange(max(counts), device=tokens.device) < count[:, None]
        held_back = (tokens == self.model_config.eos_token_id) & (self.config.gen_eos == "confidence")
        quotas, budgets = [], []
        for row, left in zip(self.draft.rows, counts, strict=True):
            step, schedule = self.step[row], self.schedule[row]
            quotas.append(schedule[step] if step < len(schedule) - 1 else left)
            budgets.append(self.config.budget(left, step, len(schedule)))
        step = Step(
            confidence=torch.zeros(masked.shape, device=tokens.device),
            masked=masked,
            held_back=torch.zeros_like(masked),
            quota=torch.tensor(quotas, device=tokens.device),
            budget=torch.tensor(budgets, device=tokens.device),
            threshold=self.config.gen_confidence_threshold,
            factor=self.config.gen_factor,
            logits=logits,
            noise=lambda: self.draft.uniform(counts).float().to(tokens.device),
        )
        step.confidence[masked], step.held_back[masked] = confidence.masked_fill(held_back, 0.0), held_back
        return commit(self.config.gen_remasking, step)[masked]


def denoise(
    model: Transformer, canvas: Canvas, config: DenoisingConfig, seeds: Sequence[int]
) -> Generator[DecodingStep, None, Decoded]:
    """Every step of a Denoiser until it has finished; returns its result."""
    denoiser = Denoiser(model, canvas, config, seeds)
    while not denoiser.finished:
        yield denoiser.commit(denoiser.predict())
    return denoiser.finish()
