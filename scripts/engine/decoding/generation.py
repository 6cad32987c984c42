"""Prompts through a decoder, timed: the text as a user would see it, and what it cost.

    loaded = load_for_use(path, tokenizer, max_length, runtime)
    generation = generate(loaded, Prompt("Once upon a time"), ContinuationConfig(64), DenoisingConfig())

`observe` streams: it is called with the canvas before the first step and returns the function that sees every step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dataset.tokenizer import decode
from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas, Decoded, DecodingStep
from model.decoding.decode import ContinuationConfig, decoder_of
from model.decoding.decode import decode as fill
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Blanks, Prompt, prompt_tokens

Sampler = SamplingConfig | DenoisingConfig
Watch = Callable[[DecodingStep], None]
Observe = Callable[[Canvas], Watch]

WARM_UP = 4  # steps


@dataclass(frozen=True)
class Generation:
    """A text written by a model, and its cost."""

    prompt: str  # what the user wrote; for infilling, the text with its blanks
    text: str  # the continuation up to EOS, or the text with its blanks filled
    num_tokens: int  # written: up to and including EOS, or in the blanks
    ended: bool  # EOS was written, or stands after the blanks
    num_forward_passes: int  # those that the row would take alone
    seconds: float  # of the whole batch
    filled: bool = False  # blanks were filled
    num_drafted: int | None = None  # tokens that self-speculation drafted and verified; none: it did not
    num_accepted: int | None = None  # those of them that were written
    num_edits: int | None = None  # written tokens that gave way to others; none: the decoder does not edit

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        return self.num_tokens / self.num_forward_passes

    def report(self) -> str:
        between = "\n" if self.filled else "\u2502"  # a filled text repeats the prompt, a continuation does not
        told = "" if self.num_drafted is None else f", {self.num_accepted} of {self.num_drafted} drafted tokens kept"
        told += "" if self.num_edits is None else f", {self.num_edits} edits"
        return (
            f"{self.prompt}{between}{self.text}\n[{self.num_tokens} tokens{'' if self.ended else ', no EOS'}, "
            f"{self.num_forward_passes} forward passes, {self.seconds:.2f} s, "
            f"{self.tokens_per_second:.1f} tokens/s, "
            f"{self.tokens_per_pass:.2f} tokens per pass{told}]"
        )


def generate(
    loaded: Loaded, prompt: Prompt, continuation: ContinuationConfig, sampler: Sampler, observe: Observe | None = None
) -> Generation:
    """Continue a text or answer a conversation."""
    return generate_batch(loaded, [prompt], continuation, sampler, observe)[0]


def generate_batch(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    continuation: ContinuationConfig,
    sampler: Sampler,
    observe: Observe | None = None,
) -> list[Generation]:
    """Generate for several prompts that share forward passes; prompt i is sampled with the seed plus i."""
    canvas = canvas_of_prompts(loaded, prompts, continuation.max_new_tokens)
    decoded, seconds = decode_timed(loaded, canvas, sampler, first_seed(loaded, continuation), observe)
    none = [None] * len(prompts)
    counts = zip(decoded.row_drafted or none, decoded.row_accepted or none, decoded.row_edits or none, strict=True)
    rows = zip(prompts, decoded.new, decoded.ended, decoded.row_passes, counts, strict=True)
    return [
        Generation(
            prompt=prompt.text,
            text=decode(loaded.tokenizer, new),
            num_tokens=len(new),
            ended=ended,
            num_forward_passes=passes,
            seconds=seconds,
            num_drafted=drafted,
            num_accepted=accepted,
            num_edits=edits,
        )
        for prompt, new, ended, passes, (drafted, accepted, edits) in rows
    ]


def infill(
    loaded: Loaded,
    blanks: Blanks,
    continuation: ContinuationConfig,
    sampler: DenoisingConfig,
    observe: Observe | None = None,
) -> Generation:
    """Fill the blanks of a text; of the continuation only the seed is used."""
    row, start = blanks.encode(loaded.tokenizer)
    if len(row) > loaded.max_length:
        raise ValueError(
            f"the text with its blanks is {len(row)} tokens long, more than --max-seq-len {loaded.max_length}"
        )
    canvas = Canvas.infilling([row], loaded.model.config, loaded.runtime.torch_device)
    decoded, seconds = decode_timed(loaded, canvas, sampler, first_seed(loaded, continuation), observe)
    text = decode(loaded.tokenizer, decoded.ids[0, start:-1].tolist())
    return Generation(
        prompt=blanks.text,
        text=text,
        num_tokens=len(decoded.new[0]),
        ended=True,
        num_forward_passes=decoded.num_forward_passes,
        seconds=seconds,
        filled=True,
        num_edits=next(iter(decoded.row_edits), None),
    )


def note_on_blanks(loaded: Loaded) -> str | None:
    """A sentence for models that fill blanks without seeing all of the text around them."""
    size = loaded.model.config.block_size
    if not size:
        return None
    return f"blanks are filled in blocks of {size} tokens: what stands behind a blank's own block is not seen by it"


def canvas_of_prompts(loaded: Loaded, prompts: Sequence[Prompt], max_new_tokens: int) -> Canvas:
    """A row per prompt, open for `max_new_tokens` after it, and to the end of a block if the context has room for it.
    ValueError if a prompt is too long."""
    rows = [prompt_tokens(loaded.tokenizer, prompt, max_new_tokens, loaded.max_length) for prompt in prompts]
    device = loaded.runtime.torch_device
    return Canvas.continuing(rows, max_new_tokens, loaded.model.config, device, loaded.max_length)


def first_seed(loaded: Loaded, continuation: ContinuationConfig) -> int:
    """The seed of the first row; row i has this seed plus i."""
    return loaded.runtime.seed if continuation.gen_seed is None else continuation.gen_seed


def decode_timed(
    loaded: Loaded, canvas: Canvas, sampler: Sampler, seed: int, observe: Observe | None = None
) -> tuple[Decoded, float]:
    """The filled canvas, and the seconds until the device had finished it."""
    loaded.model.eval()
    watch = None if observe is None else observe(canvas)
    seeds = range(seed, seed + len(canvas.ids))
    _synchronise(loaded.runtime.torch_device)
    started = time.perf_counter()
    with loaded.runtime.autocast():
        decoded = fill(loaded.model, canvas, sampler, seeds, watch)
    _synchronise(loaded.runtime.torch_device)
    return decoded, time.perf_counter() - started


def warm_up(loaded: Loaded, prompts: Sequence[Prompt], continuation: ContinuationConfig, sampler: Sampler) -> None:
    """Take the first steps of an answer on the canvas that will be timed: the first of a new shape are slower."""
    canvas = canvas_of_prompts(loaded, prompts, continuation.max_new_tokens)
    with loaded.runtime.autocast():
        decoder = decoder_of(loaded.model.eval(), canvas, sampler, [0] * len(prompts))
        for _ in range(WARM_UP):
            if not decoder.finished:
                decoder.step()


def _synchronise(device: torch.device) -> None:
    """Wait for the work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
