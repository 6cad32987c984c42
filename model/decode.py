"""Filling a canvas, autoregressively or by diffusion. Shapes: B rows, R active rows, L positions, V vocabulary.

A Decoder writes a DecodingStep at a time; `decode` runs the one that a checkpoint was trained for to its end. Rows of
any lengths share forward passes, and each comes out as it would alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from model.attention import block_causal_mask, document_mask
from model.canvas import Canvas, Decoded, Decoder, DecodingStep
from model.denoiser import SELF_SPECULATIVE, Denoiser, DenoisingConfig
from model.denoiser_cache import Block, Span, SpanCache
from model.kv_cache import KVCache
from model.losses import forbid
from model.ranges import check_ranges
from model.sampling import Draw, noise_width, penalise_repeats, sample_tokens
from model.transformer import Transformer


@dataclass(frozen=True)
class ContinuationConfig:
    """Length and seed of a continuation."""

    max_new_tokens: Annotated[int, "longest continuation, in tokens", "at least 1"] = 128
    gen_seed: Annotated[int | None, "seed of sampling (none: that of --seed)", "in [0, 2^32)"] = None

    def __post_init__(self):
        check_ranges(ContinuationConfig, vars(self))


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
        lengths, rows = _prompt_lengths(canvas), self.state.active_rows
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


class SpeculativeDecoder(Decoder):
    """A joint model's own draft, verified by itself: the text of AutoregressiveDecoder, at several tokens a pass.

    A pass feeds a row's last token t and its draft d, causally, and after them a block of [MASK]s M, which see all
    before them and one another. The verification of one draft and the making of the next share it:

        fed          t  d1 d2 d3 M  M  M  M
        predicted    a1 a2 a3 a4    e2 e3 e4

    a1 is what the autoregressive model writes next, a2 what it writes next if a1 is d1, and so on. Written is a, up to
    and including the first that is not d. If there is none, a4 stands where the first M was, and e2 e3 e4 are the next
    draft; else the rest of the draft is dropped, and the next pass has none. The [MASK]s begin wherever the draft ends:
    what they see is what a block that is all masked sees on the grid of training.

    With a temperature, each column has noise of its own, that of AutoregressiveDecoder, and both of its predictions are
    drawn with it. So d may be right though neither is the likeliest token, and the text is, seed for seed, the one that
    is drawn without drafts: no probability of d is needed, nor a correction for what is rejected.
    """

    def __init__(self, model: Transformer, canvas: Canvas, config: DenoisingConfig, seeds: Sequence[int]):
        """Raise ValueError for weights that are not joint, or unless each row's open positions are its last ones."""
        self.config = config.fitted(model.config)
        super().__init__(model, canvas, seeds)
        _prompt_lengths(canvas)
        self.lengths = canvas.lengths.tolist()
        self.cache = SpanCache(model.config, canvas.ids.shape, canvas.ids.device)
        self.committed = [0] * len(seeds)  # columns of each row whose K/V are final
        self.drafts: list[list[int]] = [[] for _ in seeds]
        self.noise: list[list[Tensor]] = [[] for _ in seeds]  # of each row's next columns, (1, noise_width) each
        self.state.drafted, self.state.accepted = [0] * len(seeds), [0] * len(seeds)

    def step(self) -> DecodingStep:
        blocks = [self._block(row) for row in self.state.active_rows]
        counts = [len(block.masked) for block in blocks]
        with torch.inference_mode():
            # 1. The text with its drafts, (B, L), and logits (N, V) for the next columns of each row.
            ids = self._with_drafts()
            logits = self._logits(ids, blocks)
            # 2. Of these, what AutoregressiveDecoder would take off.
            logits = self._penalise(logits, ids, blocks)
            # 3. A token for every column, both (N,).
            tokens, confidence = sample_tokens(logits, *self.config.draw[:3], self._noise(counts))
        return self._write(blocks, tokens.cpu(), confidence.cpu())

    def _next(self, row: int) -> int:
        """The leftmost column of a row that is not written."""
        return self.state.masked_columns[row][0]

    def _block(self, row: int) -> Block:
        """The [MASK]s that a row feeds after its draft, from `start` to `stop` - 1, none if the draft is to end the
        text; as `masked`, all it feeds that predicts something wanted: the next columns of the row, from the left."""
        first, draft, end = self._next(row), self.drafts[row], self.state.end[row]
        ends = self.model.config.eos_token_id in draft[-1:]
        start = first + len(draft) - 1 if ends else min(first + len(draft), end)
        stop = start if ends or start == end else min(start + self.model.config.block_size, self.lengths[row])
        wanted = [*range(first - 1, start), *range(start + 1, min(stop, end + 1))]
        return Block(row, self.lengths[row], start=start, stop=stop, masked=wanted)

    def _with_drafts(self) -> Tensor:
        """(B, L): the text so far with the drafts in their columns."""
        ids = self.state.ids.clone()
        for row in self.state.active_rows:
            if draft := self.drafts[row]:
                ids[row, self._next(row) :][: len(draft)] = torch.tensor(draft)
        return ids

    def _logits(self, ids: Tensor, blocks: list[Block]) -> Tensor:
        """(N, V) float32, without [MASK]."""
        spans = [Span(self.committed[block.row], block.stop, block.stop) for block in blocks]
        self.cache.drop_finished(blocks)
        forward_pass = self.cache.forward_pass(ids, blocks, spans)
        self.state.count_pass(forward_pass.rows)
        logits = forbid(forward_pass.logits(self.model), self.model.config.mask_token_id)
        return forbid(logits, self.model.config.eos_token_id) if self.config.gen_eos == "never" else logits

    def _penalise(self, logits: Tensor, ids: Tensor, blocks: list[Block]) -> Tensor:
        """logits (N, V) less the penalty for what was written, or drafted, before the columns that they are for."""
        draw = self.config.draw
        if draw.repeat_penalty == 0:
            return logits
        rows = torch.tensor([block.row for block in blocks for _ in block.masked])
        columns = torch.tensor([self._next(block.row) + i for block in blocks for i in range(len(block.masked))])
        ids = ids[rows]
        before = self.state.open[rows] & (torch.arange(ids.shape[1]) < columns[:, None])
        ids, before, columns = (values.to(logits.device) for values in (ids, before, columns))
        return penalise_repeats(logits, ids, before, columns, draw, exempt=self.model.config.eos_token_id)

    def _noise(self, counts: list[int]) -> Tensor | None:
        """(N, noise_width) for the next counts[i] columns of the i-th active row; a column keeps its own."""
        draw, chosen = self.config.draw, []
        if draw.temperature == 0:
            return None
        for row, count in zip(self.state.active_rows, counts, strict=True):
            while len(self.noise[row]) < count:
                width = noise_width(self.model.config.vocab_size, draw.top_k)
                self.noise[row].append(self.state.uniform_of(row, 1, width))
            chosen += self.noise[row][:count]
        return torch.cat(chosen)

    def _write(self, blocks: list[Block], tokens: Tensor, confidence: Tensor) -> DecodingStep:
        """Write what is autoregressive of the predictions (N,), and draft with the others."""
        state, eos = self.state, self.model.config.eos_token_id
        predictions, begin = tokens.tolist(), 0
        rows, columns, places = [], [], []  # of what is written: where, and which of the N
        rejected = torch.full_like(state.ids, state.mask_token_id)
        for block in blocks:
            row, first, draft = block.row, self._next(block.row), self.drafts[block.row]
            predicted = predictions[begin : begin + len(block.masked)]
            # 1. Verified are the predictions up to the draft's end; written, those up to the first that differs.
            verified = predicted[: block.start - first + 1]
            number = num_accepted(draft, verified)
            written = range(min(number + 1, len(verified)))
            rows += [row for _ in written]
            columns += [first + i for i in written]
            places += [begin + i for i in written]
            # 2. The others are the next draft, up to its end, or dropped with what was drafted before them.
            rejected[row, first + number : first + len(draft)] = torch.tensor(draft[number:], dtype=torch.long)
            drafted = predicted[len(verified) :] if number == len(draft) else []
            self.drafts[row] = drafted[: drafted.index(eos) + 1] if eos in drafted else drafted
            # 3. The K/V of all that is written are final, except that of the last, which was not fed.
            self.committed[row] = first + len(written) - 1
            del self.noise[row][: len(written)]
            state.drafted[row] += len(draft)
            state.accepted[row] += number
            begin += len(predicted)
        places = torch.tensor(places)
        return state.write(torch.tensor(rows), torch.tensor(columns), tokens[places], confidence[places], rejected)


def num_accepted(draft: list[int], verified: list[int]) -> int:
    """The number of tokens that two lists have in common before the first that differs."""
    pairs = enumerate(zip(draft, verified, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(draft), len(verified)))


def _prompt_lengths(canvas: Canvas) -> Tensor:
    """(B,) int64; ValueError if a row is not a prompt followed by open positions."""
    start = canvas.lengths - canvas.open.sum(dim=1)
    columns = torch.arange(canvas.ids.shape[1], device=start.device)
    if not torch.equal(canvas.given, columns < start[:, None]):
        raise ValueError(
            "an autoregressive model, and self_speculative, write at the end of a text only; infilling needs one of "
            "diffusion, and another policy"
        )
    return start


def decoder_of(
    model: Transformer, canvas: Canvas, config: SamplingConfig | DenoisingConfig, seeds: Sequence[int]
) -> Decoder:
    """The decoder that `config` is for; ValueError if the checkpoint is of the other kind.

    seeds: one per row; a row's text depends on its own alone.
    """
    if isinstance(config, DenoisingConfig):
        decoder = SpeculativeDecoder if config.gen_remasking == SELF_SPECULATIVE else Denoiser
        return decoder(model, canvas, config, seeds)
    return AutoregressiveDecoder(model, canvas, config, seeds)


def decode(
    model: Transformer,
    canvas: Canvas,
    config: SamplingConfig | DenoisingConfig,
    seeds: Sequence[int],
    watch: Callable[[DecodingStep], None] | None = None,
) -> Decoded:
    """Fill the canvas by `decoder_of`, showing every step to `watch`."""
    decoder = decoder_of(model, canvas, config, seeds)
    while not decoder.finished:
        step = decoder.step()
        if watch is not None:
            watch(step)
    return decoder.finish()
