"""Writing from left to right at several tokens a pass: joint weights draft in blocks and verify autoregressively.

Shapes: B rows, L positions, N predicted columns, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.canvas import Canvas, Decoder, DecodingStep, prompt_lengths
from model.decoding.denoiser import DenoisingConfig
from model.decoding.denoiser_cache import Block, Span, SpanCache
from model.decoding.sampling import noise_width, penalise_repeats, sample_tokens
from model.losses import forbid
from model.transformer import Transformer


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
        prompt_lengths(canvas)
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
