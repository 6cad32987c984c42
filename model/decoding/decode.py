"""Filling a canvas, autoregressively or by diffusion.

A Decoder writes a DecodingStep at a time; `decode` runs the one that a checkpoint was trained for to its end. Rows of
any lengths share forward passes, and each comes out as it would alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from model.decoding.autoregressive import AutoregressiveDecoder, SamplingConfig
from model.decoding.canvas import Canvas, Decoded, Decoder, DecodingStep
from model.decoding.denoiser import Denoiser, DenoisingConfig
from model.decoding.remasking import SELF_SPECULATIVE
from model.decoding.speculation import SpeculativeDecoder
from model.ranges import check_ranges
from model.transformer import Transformer


@dataclass(frozen=True)
class ContinuationConfig:
    """Length and seed of a continuation."""

    max_new_tokens: Annotated[int, "longest continuation, in tokens", "at least 1"] = 128
    gen_seed: Annotated[int | None, "seed of sampling (none: that of --seed)", "in [0, 2^32)"] = None

    def __post_init__(self):
        check_ranges(ContinuationConfig, vars(self))


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
