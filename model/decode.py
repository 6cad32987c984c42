"""Turning a prompt into a continuation, autoregressively or by diffusion.

`denoise` yields every step of a diffusion decoder; `decode_diffusion` runs it to its end. Shapes: B rows, P prompt
tokens, N new tokens. Prompts of one call have one length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.cache import KVCache
from model.losses import forbid
from model.remasking import POLICIES, Step, commit, transfer_schedule
from model.sampling import sample_tokens
from model.transformer import Transformer


@dataclass(frozen=True)
class SamplingConfig:
    """Length and sampling of a continuation."""

    max_new_tokens: Annotated[int, "longest continuation, in tokens"] = 128
    temperature: Annotated[float, "0 = the likeliest token", "--ar-temperature", "--gen-temp"] = 0.8
    top_k: Annotated[int, "sample among the k likeliest tokens (0 = all)", "--ar-top-k", "--gen-top-k"] = 8
    gen_seed: Annotated[int | None, "seed of sampling (none: that of --seed)"] = None

    def __post_init__(self):
        if self.gen_seed is not None and not 0 <= self.gen_seed < 2**32:
            raise ValueError(f"--gen-seed must be from 0 to {2**32 - 1}, not {self.gen_seed}")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError("the temperature and top-k must not be negative")


@dataclass(frozen=True)
class DenoisingConfig:
    """Diffusion sampling, LLaDA's released sampler."""

    gen_steps: Annotated[int, "denoising steps for the whole continuation; at most one per new token is of use"] = 64
    gen_block_size: Annotated[
        int, "denoise blocks of so many tokens from left to right (0 = the whole continuation at once)"
    ] = 0
    gen_remasking: Annotated[Literal[*POLICIES], "which predictions a step keeps"] = "low_confidence"

    def __post_init__(self):
        if self.gen_steps < 1:
            raise ValueError(f"--gen-steps must be at least 1, not {self.gen_steps}")
        if self.gen_block_size < 0:
            raise ValueError(f"--gen-block-size must not be negative, not {self.gen_block_size}")


@dataclass(frozen=True)
class Decoded:
    tokens: Tensor  # (B, P + N) prompt and continuation
    num_forward_passes: int


@dataclass(frozen=True)
class Denoised:
    """The canvas after one denoising step."""

    canvas: Tensor  # (B, P + N), its own copy
    committed: Tensor  # (B, P + N) bool, written in this step
    num_forward_passes: int


@torch.inference_mode()
def decode_autoregressive(
    model: Transformer, prompt_ids: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None
) -> Decoded:
    """prompt_ids (B, P). Stops once every row has produced EOS; rows that ended earlier are filled with EOS."""
    if model.config.attention != "causal":
        raise ValueError("this checkpoint was trained by diffusion; decode it with scripts.eval.eval_diffusion")
    model.config.require_length(prompt_ids.shape[1] + sampling.max_new_tokens, "prompt and continuation")
    cache = KVCache(model.config, len(prompt_ids), prompt_ids.shape[1] + sampling.max_new_tokens)
    tokens, new, passes = prompt_ids, prompt_ids, 0
    done = torch.zeros(len(prompt_ids), 1, dtype=torch.bool, device=prompt_ids.device)
    while passes < sampling.max_new_tokens and not done.all():
        last = torch.arange(1, len(new) + 1, device=new.device) * new.shape[1] - 1
        logits = forbid(model(new, cache=cache, is_causal=True, select=last), model.config.mask_token_id)
        cache.advance(new.shape[1])
        passes += 1
        new = sample_tokens(logits, sampling.temperature, sampling.top_k, generator)[0][:, None]
        new = new.masked_fill(done, model.config.eos_token_id)
        done = done | (new == model.config.eos_token_id)
        tokens = torch.cat([tokens, new], dim=1)
    return Decoded(tokens, passes)


@torch.inference_mode()
def denoise(
    model: Transformer,
    prompt_ids: Tensor,
    sampling: SamplingConfig,
    denoising: DenoisingConfig,
    generator: torch.Generator | None = None,
) -> Iterator[Denoised]:
    """LLaDA's sampler: predict all masked tokens, keep as many as the schedule says, mask the rest again.

    prompt_ids (B, P). Blocks are denoised from left to right, each with its share of the steps; a prediction is
    committed only inside the active block, while the whole canvas stays visible.
    """
    if model.config.attention != "full":
        raise ValueError("this checkpoint is autoregressive; decode it with scripts.eval.eval_minimind")
    start, end = prompt_ids.shape[1], prompt_ids.shape[1] + sampling.max_new_tokens
    model.config.require_length(end, "prompt and continuation")
    canvas = torch.nn.functional.pad(prompt_ids, (0, sampling.max_new_tokens), value=model.config.mask_token_id)
    masked = torch.zeros_like(canvas, dtype=torch.bool)
    masked[:, start:] = True
    passes, block_size = 0, denoising.gen_block_size or sampling.max_new_tokens
    num_blocks = -(-sampling.max_new_tokens // block_size)
    for block in range(num_blocks):
        low, high = start + block * block_size, min(start + (block + 1) * block_size, end)
        # The steps are shared out as evenly as the blocks allow, at least one each.
        steps = max(1, denoising.gen_steps * (block + 1) // num_blocks - denoising.gen_steps * block // num_blocks)
        for quota in transfer_schedule(high - low, steps):
            window = torch.arange(canvas.numel(), device=canvas.device).view_as(canvas)[:, low:high].flatten()
            logits = forbid(model(canvas, select=window), model.config.mask_token_id)
            passes += 1
            tokens, confidence = sample_tokens(logits, sampling.temperature, sampling.top_k, generator)
            tokens, confidence = tokens.view(len(canvas), -1), confidence.view(len(canvas), -1)
            committed = torch.zeros_like(masked)
            committed[:, low:high] = commit(
                denoising.gen_remasking, Step(confidence, masked[:, low:high], quota, generator)
            )
            canvas = canvas.clone()
            canvas[:, low:high] = torch.where(committed[:, low:high], tokens, canvas[:, low:high])
            masked = masked & ~committed
            yield Denoised(canvas, committed, passes)


def decode_diffusion(
    model: Transformer,
    prompt_ids: Tensor,
    sampling: SamplingConfig,
    denoising: DenoisingConfig,
    generator: torch.Generator | None = None,
) -> Decoded:
    """prompt_ids (B, P) -> the canvas once nothing is masked."""
    for step in denoise(model, prompt_ids, sampling, denoising, generator):
        last = step
    return Decoded(last.canvas, last.num_forward_passes)
