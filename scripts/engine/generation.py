"""One prompt through a decoder, timed: the text as a user would see it, and what it cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dataset.tokenizer import PreTrainedTokenizerFast, decode, encode
from model.decode import Decoded, SamplingConfig
from model.transformer import Transformer
from scripts.engine.runtime import RuntimeConfig


@dataclass(frozen=True)
class Generation:
    prompt: str
    text: str  # the continuation, up to EOS
    num_tokens: int  # up to EOS, that included
    ended: bool  # EOS was produced
    num_forward_passes: int
    seconds: float

    def report(self) -> str:
        return (
            f"{self.prompt}\u2502{self.text}\n[{self.num_tokens} tokens{'' if self.ended else ', no EOS'}, "
            f"{self.num_forward_passes} forward passes, {self.seconds:.2f} s, "
            f"{self.num_tokens / self.seconds:.1f} tokens/s, "
            f"{self.num_tokens / self.num_forward_passes:.2f} tokens per pass]"
        )


def prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, prompt: str, sampling: SamplingConfig, max_length: int
) -> list[int]:
    """BOS and the prompt's ids. ValueError if with the continuation they exceed `max_length`, the canvas trained on."""
    ids = [tokenizer.bos_token_id, *encode(tokenizer, prompt)]
    if len(ids) + sampling.max_new_tokens > max_length:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {sampling.max_new_tokens} "
            f"exceed --max-seq-len {max_length}"
        )
    return ids


def generate(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    sampling: SamplingConfig,
    runtime: RuntimeConfig,
    max_length: int,
    decoder: Callable[..., Decoded],
    *settings: Any,
) -> Generation:
    """Continue BOS + prompt with `decoder(model, prompt_ids, sampling, *settings, generator)`."""
    ids = prompt_tokens(tokenizer, prompt, sampling, max_length)
    prompt_ids = torch.tensor([ids], device=runtime.torch_device)
    model.eval()
    started = time.perf_counter()
    with runtime.autocast():
        result = decoder(model, prompt_ids, sampling, *settings, generator=runtime.generator(sampling.gen_seed))
    new = result.tokens[0, len(ids) :].tolist()
    seconds = time.perf_counter() - started
    ended = tokenizer.eos_token_id in new
    kept = new[: new.index(tokenizer.eos_token_id) + 1] if ended else new
    return Generation(prompt, decode(tokenizer, kept), len(kept), ended, result.num_forward_passes, seconds)
