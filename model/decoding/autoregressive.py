"""Writing from left to right, a token a pass. Shapes: R active rows, L positions, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from model.attention import block_causal_mask, document_mask
from model.decoding.canvas import Canvas, Decoder, DecodingStep, prompt_lengths
from model.decoding.sampling import Draw
from model.kv_cache import KVCache
from model.losses import forbid
from model.ranges import check_ranges
from model.transformer import Transformer


@dataclass(frozen=True)
class SamplingConfig:
    """Autoregressive sampling."""

    ar_temperature: Annotated[float, "temperature, 0 = the likeliest token", "at least 0"] = 0.8
    ar_top_k: Annotated[
        int, "sample among the k likeliest tokens (0 = all)", "at least 0", "with --ar-temperature above 0"
    ] = 8
    ar_top_p: Annotated[
        float,
        "sample among the fewest tokens that hold this share of the probability",
        "in (0, 1]",
        "with --ar-temperature above 0",
    ] = 1.0
    ar_repeat_penalty: Annotated[
        float, "taken off a token's logit for each time it was written nearby (0 = off)", "at least 0"
    ] = 0.15
    ar_repeat_window: Annotated[
        int, "tokens before it that are nearby", "in [1, 2^31)", "with --ar-repeat-penalty above 0"
    ] = 128

    def __post_init__(self):
        check_ranges(SamplingConfig, vars(self))

    @property
    def draw(self) -> Draw:
        return Draw(self.ar_temperature, self.ar_top_k, self.ar_top_p, self.ar_repeat_penalty, self.ar_repeat_window)


class AutoregressiveDecoder(Decoder):
    """One token per row and step, from a key/value cache, until every row has produced EOS or is full.

    In the cache the prompts end together: the shorter ones are padded on the left, in negative columns.

        prompts     ids        columns
        7 8 9       7 8 9       0  1  2
        5           5 5 5      -2 -1  0
    """

    def __init__(self, model: Transformer, canvas: Canvas, config: SamplingConfig, seeds: Sequence[int]):
        """Raise ValueError for a checkpoint of diffusion, or unless each row's open positions are its last ones."""
        if not model.config.autoregressive:
            raise ValueError("this checkpoint was trained by diffusion; sampling needs an autoregressive one")
        super().__init__(model, canvas, seeds)
        self.draw = config.draw
        lengths, rows = prompt_lengths(canvas), self.state.active_rows
        with torch.inference_mode():
            # 1. The next input and its columns, (R, W): at first the prompts, later the token just written.
            longest = int(lengths[rows].max()) if rows else 0
            padding = (longest - lengths[rows])[:, None]
            self.columns = torch.arange(longest, device=padding.device) - padding
            self.ids = canvas.ids[rows].gather(1, self.columns.clamp(min=0))
            # 2. Keys and values, and which columns of the cache are visible, (R, C): all but padding. None = all.
            max_new = int((canvas.lengths - lengths).max())
            self.cache = KVCache(model.config, len(rows), longest + max_new)
            self.visible = None
            if padding.any():
                self.visible = torch.arange(self.cache.max_length, device=padding.device) >= padding

    def step(self) -> DecodingStep:
        rows = torch.tensor(self.state.active_rows)
        with torch.inference_mode():
            # 1. Logits (R, V) of the next token of each row, for the columns (R,) after those fed.
            logits = forbid(self._logits(), self.model.config.mask_token_id)
            columns = self.columns[:, -1] + 1
            logits = self.state.penalise(logits, rows, columns, self.draw)
            # 2. A token for every row, (R,).
            tokens, confidence = self.state.sample(logits, [1] * len(rows), self.draw)
        step = self.state.write(rows, columns, tokens, confidence)
        with torch.inference_mode():
            # 3. The tokens are the next input of the rows that are not finished.
            self.ids, self.columns = tokens[:, None], columns[:, None]
            active = set(self.state.active_rows)
            self._keep([place for place, row in enumerate(rows.tolist()) if row in active])
        return step

    def _logits(self) -> Tensor:
        """(R, V) float32 after the last input token; the input joins the cache's prefix."""
        num_rows, width = self.ids.shape
        if self.visible is None:
            attention = {"is_causal": True}
        elif self.cache.length:
            visible = self.visible[:, None, None, : self.cache.length + 1]
            attention = {"attn_mask": visible, "position_ids": self.columns}
        else:
            # As a document of its own, padding is visible to itself: no query is blind.
            documents = document_mask((self.columns < 0).long())
            causal = block_causal_mask(width, 1, self.ids.device)
            attention = {"attn_mask": documents & causal, "position_ids": self.columns.clamp(min=0)}
        last = torch.arange(1, num_rows + 1, device=self.ids.device) * width - 1
        self.state.count_pass(self.state.active_rows)
        logits = self.model(self.ids, cache=self.cache, select=last, **attention).float()
        self.cache.advance(width)
        return logits

    def _keep(self, places: list[int]) -> None:
        """Drop all rows except those at these places of the R."""
        if 0 < len(places) < len(self.ids):
            self.ids, self.columns = self.ids[places], self.columns[places]
            self.visible = None if self.visible is None else self.visible[places]
            self.cache.keep(torch.tensor(places, device=self.ids.device))
