"""How likely a model finds given tokens: nats per row, for any kind of model, on the same tokens.

A row is scored where `loss_mask` is True, given every other real token to its left (autoregressive), anywhere (full
diffusion), or in its block and the blocks before (block diffusion). Sums over rows compare directly between the kinds:
the first is exact, the others are upper bounds, exact for blocks of one token.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention_mask import block_diffusion_mask, document_mask, number_blocks
from model.config import ModelConfig
from model.forward_process import lowest
from model.losses import linear_nats
from model.objective import Batch, NextToken
from model.transformer import Transformer

ENUMERATED = 4  # tokens in a block, up to which all its masks are tried: 2^4 - 1 of them, in as many passes
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class RowNats:
    nats: Tensor  # (B,) float64 on the host, -log p of the row's scored tokens, or the estimate of its upper bound
    variance: Tensor  # (B,) float64, variance of that estimate over the masks drawn (0 where none are)
    count: Tensor  # (B,) int64 scored tokens


def draws_masks(config: ModelConfig) -> bool:
    """Whether a likelihood is estimated from masks that are drawn, rather than computed."""
    return config.attention == "full" or config.block_size > ENUMERATED


@torch.no_grad()
def row_nats(model: Transformer, batch: Batch, num_samples: int, seed: int = 0, samples_per_pass: int = 1) -> RowNats:
    """Chain rule for a causal model; for a diffusion model `diffusion_bound`."""
    if not model.config.autoregressive:
        return diffusion_bound(model, batch, num_samples, seed, samples_per_pass)
    objective = NextToken()
    loss = objective.loss(model, objective.prepare(batch, model.config))
    nats = loss.nats.cpu().double()
    return RowNats(nats, torch.zeros_like(nats), loss.count.cpu().long())


@torch.no_grad()
def diffusion_bound(
    model: Transformer, batch: Batch, num_samples: int, seed: int = 0, samples_per_pass: int = 1
) -> RowNats:
    """sum_b E_k E_{|S| = k} (n_b / k) sum_{i in S} -log p(x_i | rest of block b, blocks before): the NELBO of every row
    (BD3-LM Eq. 8), n_b being the block's scored tokens; of a full diffusion model a row is one block (LLaDA Eq. 6).

    Blocks of at most ENUMERATED tokens: exact, by all masks, each tried on all blocks at once. Otherwise `num_samples`
    masks per row, k systematic: the samples of a block fall into equal strata of {1..n_b}, and each k is marginally
    uniform. The variance is the one that independent samples would have: too large where the loss rises or falls with
    k, as it usually does. A row's masks depend on `seed` and the row's own number in `batch["row_ids"]` (default: its
    place), so results do not depend on how rows are batched, nor on how many samples (`samples_per_pass`, copies of the
    batch) go through the network together.
    """
    size, maskable = model.config.block_size, batch["loss_mask"].cpu()
    blocks = _blocks(batch, size)
    counts = torch.zeros_like(blocks).scatter_add(1, blocks, maskable.long()).gather(1, blocks)  # n_b, of each position
    most, network = int(counts.max()), _Denoising(model, batch)
    if draws_masks(model.config):
        num_masks = num_samples if most > 1 else 1  # of a single token there is one mask only
        keys, offsets = _row_keys(batch, num_masks, seed)
    else:
        num_masks = max(2**most - 1, 1)
        place = _rank(torch.zeros(maskable.shape), maskable, blocks)
    estimates = []
    for some in torch.arange(num_masks).split(samples_per_pass):
        if draws_masks(model.config):
            # Golden-ratio shifts spread the blocks of a row over all counts, so that no pass is all light or all heavy.
            strata = offsets[:, None] + GOLDEN * blocks + some[:, None, None].double() / num_masks
            k = (1 + (strata % 1.0 * counts).long()).minimum(counts)
            scored = (_rank(keys[some], maskable, blocks) < k) & maskable
            weight = counts / k.clamp(min=1)
        else:
            scored, weight = _all_masks(some[:, None, None] + 1, place, maskable, counts)
        estimates.append(network.nats(scored, weight))
    found, total = torch.cat(estimates), maskable.sum(dim=1)
    if not draws_masks(model.config):
        return RowNats(found.sum(dim=0), torch.zeros_like(found[0]), total)
    spread = found.var(dim=0) / num_masks if num_masks > 1 else torch.full_like(found[0], torch.nan)
    return RowNats(found.mean(dim=0), spread.masked_fill(counts.amax(dim=1) <= 1, 0.0), total)


@torch.no_grad()
def masked_nats(model: Transformer, batch: Batch, ratio: float, seed: int = 0) -> RowNats:
    """Cross-entropy of the masked tokens, summed, with `ratio` of each row's maskable tokens masked (at least one).

    A diagnostic at one mask rate; it bounds no likelihood. `count` are the masked tokens. The ratio is that of a row,
    for in a small block few ratios can be had: models of any block size meet the same masks.
    """
    maskable = batch["loss_mask"].cpu()
    total = maskable.sum(dim=1)
    k = (total * ratio).round().long().clamp(min=1).minimum(total)
    scored = lowest(_row_keys(batch, 1, seed)[0][0], maskable, k)[None]
    nats = _Denoising(model, batch).nats(scored, torch.ones(scored.shape))[0]
    return RowNats(nats, torch.zeros_like(nats), k)


class _CleanKeys:
    """A Cache of the keys and values of x_0: computed once, they precede those of any number of x_t."""

    length = 0  # every position is given

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.filled = False

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (R, H_kv, L, D): stored; once every layer is, after the stored ones of as many copies, 2L."""
        if not self.filled:
            self.layers.append((key, value))
            return key, value
        clean_key, clean_value = (clean.repeat(len(key) // len(clean), 1, 1, 1) for clean in self.layers[layer])
        return torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)


class _Denoising:
    """The network on any number of x_t of one batch, as `block_diffusion.predict` has it."""

    def __init__(self, model: Transformer, batch: Batch):
        self.model, self.input_ids, self.clean = model, batch["input_ids"], None
        documents, (_, length) = batch.get("document_ids"), self.input_ids.shape
        self.attn_mask = None if documents is None else document_mask(documents)
        self.position_ids = torch.arange(length, device=self.input_ids.device)[None]
        if 0 < model.config.block_size < length:
            documents = torch.zeros_like(self.input_ids[:1]) if documents is None else documents
            rule = block_diffusion_mask(documents, model.config.block_size)
            self.clean = _CleanKeys(length)
            self._hidden(self.input_ids, rule[:, :, length:, length:], self.position_ids[0, :0])
            self.clean.filled, self.attn_mask = True, rule[:, :, :length].roll(length, dims=-1)

    def nats(self, scored: Tensor, weight: Tensor) -> Tensor:
        """(S, B) float64 sums, weighted, of -log p(x_0 | x_t) over the scored (S, B, L) positions, [MASK] in x_t, of S
        copies of the batch; all on the host, for not every device has float64."""
        copies, (rows, length) = len(scored), self.input_ids.shape
        input_ids, where = self.input_ids.repeat(copies, 1), scored.flatten().nonzero()[:, 0]
        noised = torch.where(scored.flatten(0, 1).to(input_ids.device), self.model.config.mask_token_id, input_ids)
        attn_mask = self.attn_mask
        if attn_mask is not None and len(attn_mask) > 1:
            attn_mask = attn_mask.repeat(copies, 1, 1, 1)
        positions = where.to(input_ids.device)
        hidden, head = self._hidden(noised, attn_mask, positions), self.model.lm_head.weight
        nats = linear_nats(hidden, head, input_ids.flatten()[positions], self.model.config.mask_token_id)
        nats = nats.cpu().double() * weight.flatten()[where]
        return nats.new_zeros(copies * rows).index_add(0, where // length, nats).view(copies, rows)

    def _hidden(self, ids: Tensor, attn_mask: Tensor | None, select: Tensor) -> Tensor:
        more = {"position_ids": self.position_ids, "canvas": ids.shape[1], "cache": self.clean, "head": False}
        return self.model(ids, attn_mask=attn_mask, select=select, **more)


def _blocks(batch: Batch, block_size: int) -> Tensor:
    """int64 (B, L) on the host, ascending in every row: the block of a position."""
    documents = batch.get("document_ids")
    if not block_size:
        return torch.zeros(batch["input_ids"].shape, dtype=torch.long)
    documents = torch.zeros_like(batch["input_ids"]) if documents is None else documents
    return number_blocks(documents.cpu(), block_size)


def _rank(keys: Tensor, maskable: Tensor, blocks: Tensor) -> Tensor:
    """int64 like keys (..., B, L) in [0, 1): which of its block's maskable positions (B, L) one is, by rising key and
    then by place, from 0."""
    by_block = blocks + keys.double().masked_fill(~maskable, 1 - 2**-30)  # behind every float32 below 1
    return by_block.argsort(dim=-1, stable=True).argsort(dim=-1) - torch.searchsorted(blocks, blocks)


def _all_masks(pattern: Tensor, place: Tensor, maskable: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scored positions and weights (S, B, L) of the patterns (S, 1, 1), bit i of which masks the i-th maskable token
    of every block that has so many; place and counts (B, L): which of its block's n_b a position is. E_k E_S n_b / k
    gives a set S of k tokens the weight (1 / n_b) (1 / C(n_b, k)) (n_b / k)."""
    chance = torch.zeros(ENUMERATED + 1, ENUMERATED + 1, dtype=torch.float64)  # [k, n_b]
    for n in range(1, ENUMERATED + 1):
        for k in range(1, n + 1):
            chance[k, n] = 1 / (k * math.comb(n, k))
    size = sum(pattern >> bit & 1 for bit in range(ENUMERATED))
    scored = maskable & (pattern >> place & 1).bool() & (pattern < 2**counts)
    return scored, chance[size.clamp(max=ENUMERATED), counts]


def _row_keys(batch: Batch, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random keys (num_samples, B, L) in [0, 1) at the maskable positions, and offsets (B,) in [0, 1), by row.

    Drawn on the host over maskable tokens alone, so that neither padding nor neighbours nor the device change them.
    """
    maskable = batch["loss_mask"].cpu()
    row_ids = batch["row_ids"].tolist() if "row_ids" in batch else range(len(maskable))
    keys = torch.zeros(num_samples, *maskable.shape)
    offsets = torch.empty(len(maskable), dtype=torch.float64)
    for row, (row_id, eligible) in enumerate(zip(row_ids, maskable, strict=True)):
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{row_id}").getrandbits(63))
        offsets[row] = torch.rand((), generator=generator, dtype=torch.float64)
        keys[:, row, eligible] = torch.rand(num_samples, int(eligible.sum()), generator=generator)
    return keys, offsets
