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
from model.canvas import Canvas, Decoded, DecodingStep, Draft, require_context
from model.config import ModelConfig
from model.denoiser import DenoisingConfig, denoise
from model.kv_cache import KVCache
from model.losses import forbid
from model.sampling import Draw, noise_width, penalise_repeats, require_draw, sample_tokens
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


def autoregress(
    model: Transformer, canvas: Canvas, config: SamplingConfig, seeds: Sequence[int]
) -> Generator[DecodingStep, None, Decoded]:
    """One token per row and step, from a key/value cache, until every row has produced EOS or is full.

    ValueError unless each row's open positions are its last ones.
    """
    if model.config.attention != "causal":
        raise ValueError(
            "this checkpoint was trained by diffusion; it is used by: "
            "uv run python -m scripts.eval.eval_diffusion --checkpoint FILE"
        )
    require_context(model)
    start, draft, draw = _prompt_lengths(canvas), Draft(canvas, model.config, seeds), config.draw
    rows = draft.rows
    with torch.inference_mode():
        fed = _Fed.prompts(model.config, canvas.ids, start, rows, int((canvas.lengths - start).max()))
    while rows:
        with torch.inference_mode():
            logits = forbid(fed.logits(model), model.config.mask_token_id)
            draft.spent(rows)
            if draw.repeat_penalty > 0:
                ids, written = (draft.unfinished(values).to(start.device) for values in (draft.ids, draft.written))
                near = ids, written, fed.columns[:, 0], draw.repeat_penalty, draw.repeat_window
                logits = penalise_repeats(logits, *near, model.config.eos_token_id)
            uniform = None
            if draw.temperature > 0:
                uniform = draft.uniform([1] * len(rows), noise_width(logits.shape[1], draw.top_k))
            tokens, confidence = sample_tokens(logits, draw.temperature, draw.top_k, draw.top_p, uniform)
        yield draft.write(torch.tensor(rows), fed.columns[:, 0], tokens, confidence)
        with torch.inference_mode():
            fed.ids = tokens[:, None]
            going = set(draft.rows)
            fed.keep([place for place, row in enumerate(rows) if row in going])
        rows = draft.rows
    return draft.finish()


class _Fed:
    """What the network is fed next, and what it remembers, of the R unfinished rows. In the cache the prompts end
    together: they are padded on the left."""

    def __init__(self, cache: KVCache, ids: Tensor, columns: Tensor, padding: Tensor | None):
        self.cache, self.ids, self.columns = cache, ids, columns  # (R, W), (R, W); columns are negative on padding
        self.visible = None if padding is None else torch.arange(cache.max_length, device=ids.device) >= padding

    @classmethod
    def prompts(cls, config: ModelConfig, ids: Tensor, start: Tensor, rows: list[int], num_new: int) -> "_Fed":
        if len(rows) < len(ids):
            ids, start = ids[rows], start[rows]
        longest = int(start.max()) if rows else 0
        padding = (longest - start)[:, None]
        columns = torch.arange(longest, device=start.device) - padding
        cache = KVCache(config, len(rows), longest + num_new)
        return cls(cache, ids.gather(1, columns.clamp(min=0)), columns, padding if padding.any() else None)

    def logits(self, model: Transformer) -> Tensor:
        """(R, V) float32 of the next token, whose column becomes the one fed next."""
        rows, width = self.ids.shape
        if self.visible is None:
            attention = {"is_causal": True}
        elif self.cache.length:
            visible = self.visible[:, None, None, : self.cache.length + 1]
            attention = {"attn_mask": visible, "position_ids": self.columns}
        else:
            causal = block_causal_mask(width, 1, self.ids.device)
            attention = {"attn_mask": document_mask((self.columns < 0).long()) & causal}
            attention["position_ids"] = self.columns.clamp(min=0)
        last = torch.arange(1, rows + 1, device=self.ids.device) * width - 1
        logits = model(self.ids, cache=self.cache, select=last, **attention).float()
        self.cache.advance(width)
        self.columns = self.columns[:, -1:] + 1
        return logits

    def keep(self, places: list[int]) -> None:
        """Go on with these rows alone."""
        if 0 < len(places) < len(self.ids):
            self.ids, self.columns = self.ids[places], self.columns[places]
            self.visible = None if self.visible is None else self.visible[places]
            self.cache.keep(torch.tensor(places, device=self.ids.device))


def _prompt_lengths(canvas: Canvas) -> Tensor:
    """(B,) int64; ValueError if a row is not a prompt followed by open positions."""
    start = canvas.lengths - canvas.open.sum(dim=1)
    columns = torch.arange(canvas.ids.shape[1], device=start.device)
    if not torch.equal(canvas.given, columns < start[:, None]):
        raise ValueError("an autoregressive model writes at the end of a text only; infilling needs one of diffusion")
    return start


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
