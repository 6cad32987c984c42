"""How likely a model finds given tokens: nats per row, for either kind of model, on the same tokens.

A row is scored where `loss_mask` is True, given every other real token to its left (autoregressive) or anywhere
(diffusion). Sums over rows compare directly between the two kinds: the first is exact, the second an upper bound.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention_mask import document_mask
from model.forward_process import StepNoise, lowest
from model.losses import forbid, sum_by_row, token_nats
from model.objective import Batch, NextToken
from model.transformer import Transformer


@dataclass(frozen=True)
class RowNats:
    nats: Tensor  # (B,) float64 on the host, -log p of the row's scored tokens, or the estimate of its upper bound
    variance: Tensor  # (B,) float64, variance of that estimate over the masks drawn (0 where exact)
    count: Tensor  # (B,) int64 scored tokens


@torch.no_grad()
def row_nats(model: Transformer, batch: Batch, num_samples: int, seed: int = 0, samples_per_pass: int = 1) -> RowNats:
    """Chain rule for a causal model; LLaDA Eq. 6 with `num_samples` masks per row for a diffusion model."""
    if model.config.attention == "causal":
        loss = NextToken()(model, batch, StepNoise(seed, 0, len(batch["input_ids"])))
        nats = loss.nats.cpu().double()
        return RowNats(nats, torch.zeros_like(nats), loss.count.cpu().long())
    if model.config.attention == "full":
        return diffusion_bound(model, batch, num_samples, seed, samples_per_pass)
    raise ValueError(f"no likelihood is defined for attention {model.config.attention!r}")


@torch.no_grad()
def diffusion_bound(
    model: Transformer, batch: Batch, num_samples: int, seed: int = 0, samples_per_pass: int = 1
) -> RowNats:
    """E_k E_{|S| = k} (n / k) sum_{i in S} -log p(x_i | rest): the NELBO (LLaDA Eq. 6).

    k is systematic: the samples of a row fall into equal strata of {1..n}, and each k is marginally uniform. The
    variance is the one that independent samples would have: too large where the loss rises or falls with k, as it
    usually does. A row's masks depend on `seed` and the
    row's own number in `batch["row_ids"]` (default: its place), so results do not depend on how rows are batched, nor
    on how many samples (`samples_per_pass`, copies of the batch) go through the network together.
    """
    maskable = batch["loss_mask"]
    total = maskable.sum(dim=1).cpu()  # sums are float64, which not every device has
    if total.max() <= 1:
        num_samples = 1  # there is one mask only
    keys, offsets = _row_keys(batch, num_samples, seed)
    strata = (offsets + torch.arange(num_samples, dtype=torch.float64)[:, None] / num_samples) % 1.0
    k = (1 + (strata * total).long()).minimum(total)  # (num_samples, B)
    nats = []
    for some_keys, some_k in zip(keys.split(samples_per_pass), k.split(samples_per_pass), strict=True):
        copies = maskable.repeat(len(some_k), 1)
        scored = lowest(some_keys.flatten(0, 1), copies, some_k.flatten().to(maskable.device))
        nats.append(_masked_nats(model, batch, scored).view(len(some_k), -1))
    estimates = torch.cat(nats).cpu().double() * total / k.clamp(min=1)
    spread = estimates.var(dim=0) / num_samples if num_samples > 1 else torch.full_like(estimates[0], torch.nan)
    return RowNats(estimates.mean(dim=0), spread.masked_fill(total <= 1, 0.0), total)


@torch.no_grad()
def masked_nats(model: Transformer, batch: Batch, ratio: float, seed: int = 0) -> RowNats:
    """Cross-entropy of the masked tokens, summed, with `ratio` of each row's maskable tokens masked (at least one).

    A diagnostic at one mask rate; it bounds no likelihood. `count` are the masked tokens.
    """
    maskable = batch["loss_mask"]
    total = maskable.sum(dim=1)
    k = (total * ratio).round().long().clamp(min=1).minimum(total)
    nats = _masked_nats(model, batch, lowest(_row_keys(batch, 1, seed)[0][0], maskable, k)).cpu().double()
    return RowNats(nats, torch.zeros_like(nats), k.cpu())


def _masked_nats(model: Transformer, batch: Batch, scored: Tensor) -> Tensor:
    """(S*B,) sums of -log p(x_0 | x_t) over the scored (S*B, L) positions, [MASK] in x_t, of S copies of the batch."""
    copies, mask_id = len(scored) // len(batch["input_ids"]), model.config.mask_token_id
    input_ids = batch["input_ids"].repeat(copies, 1)
    attn_mask = document_mask(batch["document_ids"].repeat(copies, 1)) if "document_ids" in batch else None
    positions = scored.flatten().nonzero()[:, 0]
    logits = forbid(model(torch.where(scored, mask_id, input_ids), attn_mask=attn_mask, select=positions), mask_id)
    return sum_by_row(token_nats(logits, input_ids.flatten()[positions]), positions, *input_ids.shape)


def _row_keys(batch: Batch, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random keys (num_samples, B, L) at the maskable positions, and offsets (B,) in [0, 1) on the host, by row.

    Drawn on the host over maskable tokens alone, so that neither padding nor neighbours nor the device change them.
    """
    maskable = batch["loss_mask"]
    row_ids = batch["row_ids"].tolist() if "row_ids" in batch else range(len(maskable))
    keys = torch.full((num_samples, *maskable.shape), 2.0)
    offsets = torch.empty(len(maskable), dtype=torch.float64)
    for row, (row_id, eligible) in enumerate(zip(row_ids, maskable.cpu(), strict=True)):
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{row_id}").getrandbits(63))
        offsets[row] = torch.rand((), generator=generator, dtype=torch.float64)
        keys[:, row, eligible] = torch.rand(num_samples, int(eligible.sum()), generator=generator)
    return keys.to(maskable.device), offsets
