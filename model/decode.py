"""Filling a canvas, autoregressively or by diffusion. Shapes: B rows, L positions, V vocabulary.

`autoregress` and `denoise` yield a DecodingStep for each step; `decode` runs the one that a checkpoint was trained for
to its end. Rows of any lengths share forward passes, and each comes out as it would alone.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from model.attention_mask import block_causal_mask, document_mask
from model.cache import KVCache
from model.canvas import Canvas, Decoded, DecodingStep, Draft, require_context
from model.denoiser import DenoisingConfig, denoise
from model.losses import forbid
from model.sampling import Draw, penalise_repeats, require_draw, sample_tokens
from model.transformer import Transformer


@dataclass(frozen=True)
class ContinuationConfig:
    """Length and seed of a continuation."""

    max_new_tokens: Annotated[int, "longest continuation, in tokens"] = 128
    gen_seed: Annotated[int | None, "seed of sampling (none: that of --seed)"] = None

    def __post_init__(self):
        if self.gen_seed is not None and not 0 <= self.gen_seed < 2**32:
            raise ValueError(f"--gen-seed must be from 0 to {2**32 - 1}, not {self.gen_seed}")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")


@dataclass(frozen=True)
class SamplingConfig:
    """Autoregressive sampling."""

    ar_temperature: Annotated[float, "temperature, 0 = the likeliest token"] = 0.8
    ar_top_k: Annotated[int, "sample among the k likeliest tokens (0 = all)"] = 8
    ar_top_p: Annotated[float, "sample among the fewest tokens that hold this share of the probability"] = 1.0
    ar_repeat_penalty: Annotated[float, "taken off a token's logit for each time it was written nearby (0 = off)"] = (
        0.15
    )
    ar_repeat_window: Annotated[int, "tokens before it that are nearby"] = 128

    def __post_init__(self):
        require_draw(self.draw, "--ar-", "temperature")

    @property
    def draw(self) -> Draw:
        return Draw(self.ar_temperature, self.ar_top_k, self.ar_top_p, self.ar_repeat_penalty, self.ar_repeat_window)


@torch.no_grad()
def autoregress(
    model: Transformer, canvas: Canvas, config: SamplingConfig, seeds: Sequence[int]
) -> Generator[DecodingStep, None, Decoded]:
    """One token per row and step, from a key/value cache, until every row has produced EOS or is full.

    ValueError unless each row's open positions are its last ones.
    """
    if model.config.attention != "causal":
        raise ValueError("this checkpoint was trained by diffusion; decode it with scripts.eval.eval_diffusion")
    require_context(model)
    start, draft, draw = _prompt_lengths(canvas), Draft(canvas, model.config, seeds), config.draw
    eos, longest = model.config.eos_token_id, int(start.max())
    cache = KVCache(model.config, len(start), longest + int((canvas.lengths - start).max()))
    # In the cache the prompts end together, at slot `longest`: they are padded on the left.
    columns = torch.arange(longest, device=start.device) - (longest - start)[:, None]
    new, ragged = canvas.ids.gather(1, columns.clamp(min=0)), int(start.min()) < longest
    while draft.rows:
        attention = _left_padded(columns, longest - start, cache) if ragged else {"is_causal": True}
        last = torch.arange(1, len(new) + 1, device=new.device) * new.shape[1] - 1
        logits = model(new, cache=cache, select=last, **attention).float()
        cache.advance(new.shape[1])
        draft.spent(draft.rows)
        rows, columns = torch.tensor(draft.rows, device=new.device), columns[:, -1:] + 1
        logits, column = logits[rows], columns[rows, 0]
        if draw.repeat_penalty > 0:
            ids, written = (values.to(new.device)[rows] for values in (draft.ids, draft.written))
            logits = penalise_repeats(logits, ids, written, column, draw.repeat_penalty, draw.repeat_window, eos)
        logits = forbid(logits, model.config.mask_token_id)
        uniform = draft.uniform([1] * len(rows), logits.shape[1]) if draw.temperature > 0 else None
        tokens, confidence = sample_tokens(logits, draw.temperature, draw.top_k, draw.top_p, uniform)
        new = new.new_full((len(new), 1), eos)  # what a finished row is given matters to no other
        new[rows, 0] = tokens
        yield draft.write(rows, column, tokens, confidence)
    return draft.finish()


def _prompt_lengths(canvas: Canvas) -> Tensor:
    """(B,) int64; ValueError if a row is not a prompt followed by open positions."""
    start = canvas.lengths - canvas.open.sum(dim=1)
    columns = torch.arange(canvas.ids.shape[1], device=start.device)
    if not torch.equal(canvas.given, columns < start[:, None]):
        raise ValueError("an autoregressive model writes at the end of a text only; infilling needs one of diffusion")
    return start


def _left_padded(columns: Tensor, padding: Tensor, cache: KVCache) -> dict[str, Tensor]:
    """Arguments of the forward pass for tokens at `columns` (B, L), negative on padding, `padding` (B,) slots."""
    if cache.length:
        slots = torch.arange(cache.length + 1, device=columns.device)
        attn_mask = (slots >= padding[:, None])[:, None, None]
    else:
        attn_mask = document_mask((columns < 0).long()) & block_causal_mask(columns.shape[1], 1, columns.device)
    return {"attn_mask": attn_mask, "position_ids": columns.clamp(min=0)}


def decode(
    model: Transformer,
    canvas: Canvas,
    config: SamplingConfig | DenoisingConfig,
    seeds: Sequence[int],
    watch: Callable[[DecodingStep], None] | None = None,
) -> Decoded:
    """Fill the canvas as `config` says, showing every step to `watch`.

    seeds: one per row; a row's text depends on its own alone. ValueError if the checkpoint is of the other kind.
    """
    steps = (denoise if isinstance(config, DenoisingConfig) else autoregress)(model, canvas, config, seeds)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if watch is not None:
            watch(step)
