"""Filling a canvas by iterative denoising. Shapes: B rows, L positions, N candidates, V vocabulary.

Rows are independent processes that share forward passes: each has its own blocks, steps, generator and end.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoding.canvas import Canvas, Decoder, DecodingStep
from model.decoding.denoiser_cache import (
    Block,
    BlockCache,
    DenoiserCache,
    DualCache,
    NoCache,
    PrefixCache,
    UnfusedBlockCache,
)
from model.decoding.editing import MODELESS, EditingConfig, Editor
from model.decoding.remasking import DENOISING, REMASKING, SELF_SPECULATIVE, Step, choose, padded, transfer_schedule
from model.decoding.sampling import Draw, guide
from model.losses import forbid
from model.ranges import check_ranges
from model.transformer import Transformer

# On larger canvases a small model writes the EOS at their end first: report, section 10.
DEFAULT_BLOCK_SIZE = 8


@dataclass(frozen=True)
class DenoisingConfig(EditingConfig):
    """Diffusion sampling."""

    gen_steps: Annotated[
        int,
        "denoising steps for the whole continuation, in blocks to the end of the last one; at least one per block, at "
        "most one per token; hybrid: the most; threshold, factor: those over which the cap changes",
        "at least 1",
        "with --gen-remasking low_confidence, random, hybrid, margin, entropy or left_to_right or "
        "--gen-cap-start-ratio below 1 or --gen-cap-end-ratio below 1",
        MODELESS,
    ] = 64
    gen_block_size: Annotated[
        int | None,
        f"denoise blocks of so many tokens from left to right (0 = the whole continuation at once; none: the size that "
        f"a checkpoint of block diffusion was trained for, else {DEFAULT_BLOCK_SIZE})",
        "in [0, 2^31)",
    ] = None
    gen_remasking: Annotated[
        Literal[*REMASKING],
        "which predictions a step keeps; hybrid: as threshold, but as many as --gen-steps asks for; "
        "self_speculative (joint checkpoints): those that the same weights would write autoregressively, so that the "
        "text is theirs",
        ("--llada2-enable-parallel-decoding", "hybrid"),
        MODELESS,
    ] = "low_confidence"
    gen_confidence_threshold: Annotated[
        float,
        "keep predictions of at least this probability",
        "in (0, 1]",
        "with --gen-remasking threshold or hybrid",
        MODELESS,
    ] = 0.9
    gen_factor: Annotated[
        float,
        "keep the n best, the n-th having a probability of 1 - factor/(n+1)",
        "above 0",
        "with --gen-remasking factor",
    ] = 1.0
    gen_entropy_bound: Annotated[
        float,
        "keep predictions from the surest on, until the entropies of those before are more than this, in nats",
        "at least 0",
        "with --gen-remasking entropy_bound",
    ] = 0.1
    gen_cap_start_ratio: Annotated[
        float,
        "keep at most this share of a block's masked tokens in its first step, ...",
        "in (0, 1]",
        "with --gen-remasking threshold or factor",
    ] = 1.0
    gen_cap_end_ratio: Annotated[
        float,
        "... and this share in the last of its steps; linear between",
        "in (0, 1]",
        "with --gen-remasking threshold or factor",
    ] = 1.0
    gen_max_decode_per_step: Annotated[
        int | None,
        "keep at most so many tokens per step (none: no limit)",
        "at least 1",
        "with --gen-remasking threshold or factor",
    ] = None
    gen_temp: Annotated[float, "temperature, 0 = the likeliest token", "at least 0"] = 0.8
    gen_top_k: Annotated[
        int, "sample among the k likeliest tokens (0 = all)", "at least 0", "with --gen-temp above 0"
    ] = 8
    gen_top_p: Annotated[
        float,
        "sample among the fewest tokens that hold this share of the probability",
        "in (0, 1]",
        "with --gen-temp above 0",
    ] = 1.0
    gen_repeat_penalty: Annotated[
        float, "taken off a token's logit for each time it was written nearby (0 = off)", "at least 0"
    ] = 0.15
    gen_repeat_window: Annotated[
        int, "tokens to either side that are nearby", "in [1, 2^31)", "with --gen-repeat-penalty above 0"
    ] = 128
    gen_penalty_lambda: Annotated[
        float,
        "taken off the logit of the token that stands just to the left, against stutter (0 = off)",
        "at least 0",
        DENOISING,
    ] = 0.0
    gen_cfg_scale: Annotated[
        float, "classifier-free guidance; above 0 a step costs two passes", "at least 0", DENOISING
    ] = 0.0
    gen_eos: Annotated[
        Literal["free", "confidence", "never"],
        "the end of the text: like any token, kept only after all others of its block, or never",
    ] = "free"
    gen_cache: Annotated[
        Literal["auto", "none", "block", "prefix", "dual"],
        "keys and values kept between steps; block: those of finished blocks, exact (checkpoints of block diffusion); "
        "prefix, dual: approximate (those of full attention): what is before a block, dual: and behind it, stays as it "
        "was in the block's first step; auto: block or none",
        DENOISING,
    ] = "auto"
    gen_fuse_commit: Annotated[
        bool,
        "compute a finished block's keys and values in the first pass of the next block, not in one of their own",
        "with --gen-cache auto or block",
        DENOISING,
    ] = True

    def __post_init__(self):
        check_ranges(DenoisingConfig, vars(self))

    @property
    def draw(self) -> Draw:
        return Draw(self.gen_temp, self.gen_top_k, self.gen_top_p, self.gen_repeat_penalty, self.gen_repeat_window)

    def fitted(self, model: ModelConfig) -> "DenoisingConfig":
        """The config with the checkpoint's own block size and cache in place of `none` and `auto`, and with what its
        mode stands for.

        ValueError for an autoregressive checkpoint, and for settings that do not go with its attention.
        """
        if model.autoregressive:
            raise ValueError("this checkpoint is autoregressive; denoising needs one that was trained by diffusion")
        if self.gen_remasking == SELF_SPECULATIVE and model.attention != "joint":
            raise ValueError(
                f"--gen-remasking {SELF_SPECULATIVE} needs a joint checkpoint, whose weights are autoregressive, too; "
                f"this one has {model.attention} attention"
            )
        if self.gen_remasking == SELF_SPECULATIVE and self.gen_eos == "confidence":
            raise ValueError(f"--gen-eos confidence is not for --gen-remasking {SELF_SPECULATIVE}; give free or never")
        # 1. What goes with the checkpoint, the default first: K/V are kept exactly in blocks, else on request.
        in_blocks = model.block_size > 0
        caches = ("block", "none") if in_blocks else ("none", "prefix", "dual")
        default_size = model.block_size if in_blocks else DEFAULT_BLOCK_SIZE
        # 2. What it is decoded with.
        cache = caches[0] if self.gen_cache == "auto" else self.gen_cache
        size = default_size if self.gen_block_size is None else self.gen_block_size
        if in_blocks and size != model.block_size:
            raise ValueError(
                f"--gen-block-size {size} is not {model.block_size}, the block size that this checkpoint was trained "
                "for; leave it out"
            )
        if cache not in caches:
            kind = "block diffusion" if in_blocks else "full attention"
            raise ValueError(f"--gen-cache {cache} is not for this checkpoint of {kind}; give {' or '.join(caches)}")
        if not self.gen_fuse_commit and cache != "block":
            raise ValueError(
                "--no-gen-fuse-commit has no effect without the cache of finished blocks, which checkpoints of block "
                "diffusion have; leave it out"
            )
        return replace(self, gen_block_size=size, gen_cache=cache, **self.of_mode())

    def steps_of(self, first: int, last: int, num_open: int) -> int:
        """Steps of the block of open positions `first` to `last` - 1: its share by length, at least one."""
        return max(1, self.gen_steps * last // num_open - self.gen_steps * first // num_open)

    def budget(self, num_masked: int, step: int, num_steps: int) -> int:
        """The most tokens to keep in `step` of a block (from 0) that has `num_masked` masked tokens left."""
        progress = min(1.0, step / max(1, num_steps - 1))
        ratio = self.gen_cap_start_ratio + (self.gen_cap_end_ratio - self.gen_cap_start_ratio) * progress
        # Rounded before the ceiling: 25 tokens at a ratio of 0.08 are 2, even if float arithmetic gives a bit more.
        return max(1, min(math.ceil(round(num_masked * ratio, 9)), self.gen_max_decode_per_step or num_masked))


@dataclass(frozen=True)
class Candidates:
    """What would be written at the masked positions of the active blocks, row by row; after these, with editing, what
    the visible ones would give way to."""

    rows: Tensor  # (N,) int64
    columns: Tensor  # (N,) int64
    tokens: Tensor  # (N,) int64
    confidence: Tensor  # (N,) float32, of each token; see DecodingStep
    kept: Tensor  # (N,) bool, chosen by the policy, or the rule of editing, to be written; the rest stays as it is


class Denoiser(Decoder):
    """LLaDA's sampler, a step at a time: predict all masked tokens of each row's active block, write some of them.

    A row whose block is full goes on to the next at once, or with editing once nothing in it changes any more. Under
    full attention, block b of a row is its open positions b * size to (b + 1) * size - 1, in order, and the whole
    canvas is visible throughout. A checkpoint of block diffusion has the grid that it was trained on: block b is the
    columns b * size to (b + 1) * size - 1, whatever is given or open in them. Later blocks are not visible, not even
    given tokens in them, so an infilled blank is written to suit what stands before it and in its own block.

    To choose by hand what is written:

        denoiser = Denoiser(model, canvas, config, seeds)
        while not denoiser.finished:
            candidates = denoiser.predict()
            step = denoiser.write(candidates)  # or dataclasses.replace(candidates, kept=..., tokens=...)
        decoded = denoiser.finish()
    """

    def __init__(self, model: Transformer, canvas: Canvas, config: DenoisingConfig, seeds: Sequence[int]):
        self.config = config = config.fitted(model.config)
        super().__init__(model, canvas, seeds)
        self.may_end = canvas.may_end
        self.cache = cache_of(model.config, canvas, config)
        if config.gen_cfg_scale > 0:
            self.unprompted_cache, self.given = cache_of(model.config, canvas, config), canvas.given.cpu()
        self.on_grid = model.config.block_size > 0
        self.block_size = config.gen_block_size or max(map(len, self.state.open_columns)) or 1
        self.blocks = [Block(row, length) for row, length in enumerate(canvas.lengths.tolist())]
        self.editor = Editor(self.state, config, config.gen_eos == "confidence") if config.edits else None

    def step(self) -> DecodingStep:
        """Predict, and write what the policy keeps."""
        return self.write(self.predict())

    def predict(self) -> Candidates:
        """The candidates of one step, by one forward pass, or two with guidance (and those that commit finished
        blocks); writes nothing. ValueError once every row is finished."""
        if self.finished:
            raise ValueError("every row is finished; call finish()")
        # 1. The masked columns of each active row's block, counts[i] of them in the i-th row, then the visible ones: N.
        blocks = self._active_blocks()
        counts = [len(block.masked) for block in blocks]
        places = [(block.row, column) for block in blocks for column in block.masked]
        places += [(block.row, column) for block in blocks for column in block.visible]
        rows, columns = torch.tensor(places).unbind(dim=1)
        with torch.inference_mode():
            # 2. Logits (N, V), less what may not or should not be written.
            logits = self._guided_logits(blocks)
            logits = self.state.penalise(logits, rows, columns, self.config.draw)
            logits = self.state.penalise_left(logits, rows, columns, self.config.gen_penalty_lambda)
            if self.config.gen_eos == "never" or not self.may_end:
                forbid(logits, self.model.config.eos_token_id)
            forbid(logits, self.model.config.mask_token_id)
            masked, visible = logits[: sum(counts)], logits[sum(counts) :]
            # 3. A token for every masked position, with its probability, and whether the policy keeps it.
            tokens, confidence = (x.cpu() for x in self.state.sample(masked, counts, self.config.draw))
            found = tokens, confidence, self._kept(blocks, masked, tokens, confidence)
            # 4. What the visible ones would give way to, and whether they do; all three are (N,) now.
            if self.editor:
                found = map(torch.cat, zip(found, self.editor.edits(visible, blocks), strict=True))
        # Copies, because inference tensors could not be changed outside of inference mode.
        return Candidates(rows, columns, *(values.clone() for values in found))

    @torch.no_grad()
    def write(self, candidates: Candidates) -> DecodingStep:
        """Write the candidates that are kept."""
        blocks, kept = [self.blocks[row] for row in self.state.active_rows], candidates.kept
        for block in blocks:
            block.steps_done += 1
        step = self.state.write(
            candidates.rows[kept], candidates.columns[kept], candidates.tokens[kept], candidates.confidence[kept]
        )
        for block in blocks if self.editor else ():
            if self.editor.finishes(block, candidates.columns[kept & (candidates.rows == block.row)].tolist()):
                self._leave(block)
        return step

    def _active_blocks(self) -> list[Block]:
        """The blocks of this step; a row whose block is done enters the next one."""
        for row in self.state.active_rows:
            masked = self.state.masked_columns[row]
            if self.editor.is_done(row) if self.editor else masked[0] >= self.blocks[row].stop:
                self.blocks[row] = self._block_at(row, masked[0])
                if self.editor:
                    self.editor.open(self.blocks[row])
            self.blocks[row].masked = masked[: bisect_left(masked, self.blocks[row].stop)]
            if self.editor:
                self.editor.plan(self.blocks[row])
        return [self.blocks[row] for row in self.state.active_rows]

    def _leave(self, block: Block) -> None:
        """Leave a block that is done with its edits, by way of the blocks before it that --gen-edit-blocks reopens."""
        start, _ = self._columns_of(block.row, max(0, block.number - self.config.gen_edit_blocks))
        if self.editor.looks_back(block, start):
            self.blocks[block.row] = replace(block, start=start)
            self.editor.reopen(self.blocks[block.row], stop=block.start)
        else:
            self.editor.close(block)

    def _block_at(self, row: int, column: int) -> Block:
        """The block that `column`, the leftmost masked one of a row, is in."""
        length, open_columns = self.blocks[row].length, self.state.open_columns[row]
        # 1. Its columns, start to stop - 1, and which of the row's open positions they are, first to last - 1.
        number = (column if self.on_grid else bisect_left(open_columns, column)) // self.block_size
        start, stop = self._columns_of(row, number)
        first, last = bisect_left(open_columns, start), bisect_left(open_columns, stop)
        # 2. The tokens to write there are spread over the block's share of the steps.
        num_masked = bisect_left(self.state.masked_columns[row], stop)
        schedule = transfer_schedule(num_masked, self.config.steps_of(first, last, len(open_columns)))
        return Block(row, length, number, start, stop, schedule)

    def _columns_of(self, row: int, number: int) -> tuple[int, int]:
        """The first column of a row's block, and the one behind its last."""
        size, length, open_columns = self.block_size, self.blocks[row].length, self.state.open_columns[row]
        if self.on_grid:
            return number * size, min((number + 1) * size, length)
        last = min((number + 1) * size, len(open_columns))
        return open_columns[number * size], open_columns[last - 1] + 1

    def _guided_logits(self, blocks: list[Block]) -> Tensor:
        """(N, V) float32 on the model's device, after classifier-free guidance."""
        logits = self._forward(self.cache, self.state.ids, blocks)
        if self.config.gen_cfg_scale > 0:
            # The second branch sees [MASK] in place of every given token.
            unprompted_ids = self.state.ids.masked_fill(self.given, self.model.config.mask_token_id)
            unprompted = self._forward(self.unprompted_cache, unprompted_ids, blocks)
            logits = guide(logits, unprompted, self.config.gen_cfg_scale)
        return logits

    def _forward(self, cache: DenoiserCache, ids: Tensor, blocks: list[Block]) -> Tensor:
        """Run and count the passes that the cache plans; (N, V) float32 of the last one."""
        for forward_pass in cache.passes(ids, blocks):
            self.state.count_pass(forward_pass.rows)
            logits = forward_pass.logits(self.model)
        return logits

    def _kept(self, blocks: list[Block], logits: Tensor, tokens: Tensor, confidence: Tensor) -> Tensor:
        """(N,) bool: what the policy keeps of the candidates, block by block."""
        counts = [len(block.masked) for block in blocks]
        # 1. The candidates of each row from the left, (R, W) with W the most of a row; the rest is padding.
        masked = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        # 2. An EOS may have to wait for all others of its block.
        held_back = torch.zeros_like(tokens, dtype=torch.bool)
        if self.config.gen_eos == "confidence":
            held_back = tokens == self.model.config.eos_token_id
            confidence = confidence.masked_fill(held_back, 0.0)
        # 3. How many each row should keep, and how many it may, both (R,).
        quotas = [block.quota() for block in blocks]
        budgets = [self.config.budget(len(block.masked), block.steps_done, len(block.schedule)) for block in blocks]
        # 4. The policy's choice, (R, W), read out at the candidates.
        step = Step(
            confidence=padded(confidence, masked),
            masked=masked,
            held_back=padded(held_back, masked),
            quota=torch.tensor(quotas),
            budget=torch.tensor(budgets),
            threshold=self.config.gen_confidence_threshold,
            factor=self.config.gen_factor,
            entropy_bound=self.config.gen_entropy_bound,
            logits=logits,
            noise=lambda: self.state.uniform(counts).float(),
        )
        return choose(self.config.gen_remasking, step)[masked]


def cache_of(model: ModelConfig, canvas: Canvas, config: DenoisingConfig) -> DenoiserCache:
    """The cache that a fitted config names."""
    device = canvas.ids.device
    if config.gen_cache == "none":
        return NoCache(model, device)
    block = BlockCache if config.gen_fuse_commit else UnfusedBlockCache
    caches = {"block": block, "prefix": PrefixCache, "dual": DualCache}
    return caches[config.gen_cache](model, canvas.ids.shape, device)
