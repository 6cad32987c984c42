"""How likely a model finds given tokens: nats per row, for any kind of model, on the same tokens.

A token is scored if `loss_mask` is True, given the tokens before it (autoregressive), all others of its document (full
diffusion), or those of its block and of the blocks before (block diffusion). Sums over rows compare directly between
the kinds: the first is exact, the others are upper bounds, exact for blocks of one token. A diffusion model that writes
one token after the other has an exact likelihood, too: a chain rule, in an order of one's choice or its own.
Shapes: B rows, L tokens; S masks in one pass; G blocks in a row, W tokens in a block. Masks are drawn on the host.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import document_mask
from model.block_diffusion import Blocks, block_diffusion_mask
from model.config import ModelConfig
from model.forward_process import k_of_n_by_block, lowest
from model.losses import linear_confidence, linear_nats
from model.masked_diffusion import without_fill
from model.objective import Batch, NextToken
from model.transformer import Transformer

ENUMERATED = 4  # tokens in a block, up to which all its masks are tried: 2^4 - 1 of them, in as many passes


@dataclass(frozen=True)
class RowNats:
    nats: Tensor  # (B,) float64 on the host, -log p of the row's scored tokens, or the estimate of its upper bound
    variance: Tensor  # (B,) float64, variance of that estimate over the masks drawn (0 if none are)
    count: Tensor  # (B,) int64 scored tokens


def draws_masks(config: ModelConfig) -> bool:
    """Return whether a likelihood is estimated from masks that are drawn, rather than computed."""
    return config.attention == "full" or config.block_size > ENUMERATED


@torch.no_grad()
def row_nats(model: Transformer, batch: Batch, num_samples: int, seed: int = 0, samples_per_pass: int = 1) -> RowNats:
    """Return the chain rule of a causal model; of a diffusion model `diffusion_bound`."""
    if not model.config.autoregressive:
        return diffusion_bound(model, batch, num_samples, seed, samples_per_pass)
    return next_token_nats(model, batch)


@torch.no_grad()
def next_token_nats(model: Transformer, batch: Batch) -> RowNats:
    """Return the chain rule of a causal model, or of a joint one as it writes autoregressively; the EOS that fill a
    canvas are none of its text."""
    objective = NextToken()
    loss = objective.loss(model, objective.prepare(without_fill(batch), model.config))
    return _exact(loss.nats.cpu().double(), loss.count.cpu().long())


def _exact(nats: Tensor, count: Tensor) -> RowNats:
    return RowNats(nats, torch.zeros_like(nats), count)


@torch.no_grad()
def diffusion_bound(
    model: Transformer, batch: Batch, num_samples: int, seed: int = 0, samples_per_pass: int = 1
) -> RowNats:
    """Return the NELBO of every row (BD3-LM Eq. 8; of a full diffusion model, whose row is one block, LLaDA Eq. 6):
    sum_b E_k E_{|S| = k} (n / k) sum_{i in S} -log p(x_i | rest of block b, blocks before), n scored tokens in block b.

    Blocks of at most ENUMERATED tokens: exact, by all masks, each tried on all blocks at once. Otherwise `num_samples`
    masks per row, k systematic: the samples of a block fall into equal strata of {1..n}, and each k is marginally
    uniform. The variance is the one that independent samples would have: too large if the loss rises or falls with k,
    as it usually does.

    A row's masks depend on `seed` and the row's own number in `batch["row_ids"]` (default: its place), so results
    depend neither on how rows are batched nor on how many samples, copies of the batch, share a pass.
    """
    # 1. Blocks, and n of each (B, G).
    maskable, blocks = _maskable_blocks(model.config, batch)
    totals = blocks.split(maskable).sum(dim=1).view(len(maskable), blocks.number)
    largest = int(totals.max())
    # 2. The masks to come: mask(number) -> scored and weight (B, L).
    if draws_masks(model.config):
        num_masks = num_samples if largest > 1 else 1  # of a single token there is one mask only
        mask = _drawn_masks(batch, blocks, num_masks, seed)
    else:
        num_masks = max(2**largest - 1, 1)
        mask = _all_masks(maskable, blocks)
    # 3. Weighted nats (num_masks, B), S masks in one pass.
    network, passes = _Network(model, batch), []
    for numbers in torch.arange(num_masks).split(samples_per_pass):
        scored, weight = zip(*map(mask, numbers.tolist()), strict=True)
        passes.append(network.nats(torch.stack(scored), weight=torch.stack(weight)))
    nats, count = torch.cat(passes), maskable.sum(dim=1)
    # 4. All masks add up to the bound; drawn ones estimate it by their mean.
    if not draws_masks(model.config):
        return _exact(nats.sum(dim=0), count)
    variance = nats.var(dim=0) / num_masks if num_masks > 1 else torch.full_like(nats[0], torch.nan)
    return RowNats(nats.mean(dim=0), variance.masked_fill(totals.amax(dim=1) <= 1, 0.0), count)


@torch.no_grad()
def masked_nats(model: Transformer, batch: Batch, ratio: float, seed: int = 0) -> RowNats:
    """Return the cross-entropy of the masked tokens, summed, with `ratio` of each row's maskable tokens masked (at
    least one).

    A diagnostic at one mask rate; it bounds no likelihood. `count` are the masked tokens. The ratio is that of a row,
    since a small block has few ratios: models of any block size meet the same masks.
    """
    maskable = batch["loss_mask"].cpu()
    total = maskable.sum(dim=1)
    k = (total * ratio).round().long().clamp(min=1).minimum(total)
    scored = lowest(_row_keys(batch, 1, seed)[0][0], maskable, k)[None]
    return _exact(_Network(model, batch).nats(scored)[0], k)


# -- chain rules -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def chain_rule(model: Transformer, batch: Batch, rank: Tensor | None = None, steps_per_pass: int = 1) -> RowNats:
    """Return -log p of every row if a diffusion model writes it token by token in a given order, block after block:
    sum_b sum_j -log p(token j of block b | tokens 0 to j - 1 of block b, blocks before), [MASK] at all others of block
    b.

    rank (B, L): which of its block's tokens a token is, 0 for the first; None = from left to right. Then the EOS that
    fill a canvas are masked, but cost nothing: the row has ended before them. The mean over all orders is the bound of
    `diffusion_bound`. Step j is taken in all blocks at once, `steps_per_pass` copies of the batch in one pass.
    """
    maskable, blocks = _maskable_blocks(model.config, batch)
    counted = maskable
    if rank is None:
        counted = without_fill(batch)["loss_mask"].cpu()
        rank = blocks.join(blocks.split(maskable).long().cumsum(dim=1) - 1)
    network, nats = _Network(model, batch), torch.zeros(len(maskable), dtype=torch.float64)
    number = int(rank[counted].max()) + 1 if counted.any() else 0
    for steps in torch.arange(number)[:, None, None].split(steps_per_pass):
        nats += network.nats(maskable & (rank >= steps), counted & (rank == steps)).sum(dim=0)
    return _exact(nats, counted.sum(dim=1))


@torch.no_grad()
def confidence_chain_rule(model: Transformer, batch: Batch) -> RowNats:
    """Return -log p of every row if a diffusion model writes token by token where it is surest: in each block next the
    token whose likeliest value has the largest probability, of equal ones the first.

    The order follows what has been written, never the token to come, so that over all rows p adds up to 1. The EOS that
    fill a canvas cost nats, since they may be written before the text.
    """
    left, blocks = _maskable_blocks(model.config, batch)
    network, nats, count = _Network(model, batch), torch.zeros(len(left), dtype=torch.float64), left.sum(dim=1)
    while left.any():
        # 1. Of each masked token (N,): its prediction, and the probability of its likeliest value.
        places = left.flatten().nonzero()[:, 0]
        hidden, targets = network.predicted(left[None], places)
        confidence = linear_confidence(hidden, model.lm_head.weight, model.config.mask_token_id).cpu()
        # 2. The surest of each block, (B * G, W) and (B, L); every probability is above 0.
        surest = blocks.split(torch.zeros(left.shape).flatten().index_put((places,), confidence).view(left.shape))
        chosen = left & blocks.join(torch.arange(blocks.width) == surest.argmax(dim=1, keepdim=True))
        # 3. Its nats; then it is written.
        among = chosen.flatten()[places]
        nats.index_add_(0, places[among] // left.shape[1], network.nats_of(hidden[among], targets[among]))
        left = left & ~chosen
    return _exact(nats, count)


def _maskable_blocks(config: ModelConfig, batch: Batch) -> tuple[Tensor, Blocks]:
    """Return which tokens are scored (B, L), and the blocks that they are in, on the host."""
    maskable, documents = batch["loss_mask"].cpu(), batch.get("document_ids")
    in_blocks = config.block_size > 0 and documents is not None
    return maskable, Blocks(maskable, documents.cpu() if in_blocks else None, config.block_size)


# -- masks -------------------------------------------------------------------------------------------------------------

Masks = Callable[[int], tuple[Tensor, Tensor]]  # number of a mask -> scored, weight (B, L)


def _drawn_masks(batch: Batch, blocks: Blocks, num_masks: int, seed: int) -> Masks:
    """Return `num_masks` masks that depend on `seed` and the number of each row."""
    maskable = batch["loss_mask"].cpu()
    keys, offsets = _row_keys(batch, num_masks, seed)
    # Keys are multiples of 2^-24; among equal ones the first is the lowest, however a machine sorts.
    tie_break = torch.arange(maskable.shape[1]).double() * 2.0**-48

    def mask(number: int) -> tuple[Tensor, Tensor]:
        share = offsets[:, None] + blocks.golden_steps + number / num_masks  # (B, G)
        return k_of_n_by_block(maskable, blocks, share, keys[number].double() + tie_break)

    return mask


def _row_keys(batch: Batch, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random keys (num_samples, B, L) in [0, 1) at the maskable positions, and offsets (B,) in [0, 1), by row.

    Drawn over maskable tokens alone, so that neither padding nor neighbours nor the device change them.
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


def _all_masks(maskable: Tensor, blocks: Blocks) -> Masks:
    """Return all masks of blocks of up to ENUMERATED tokens: bit i of a mask's number + 1 masks the i-th maskable token
    of every block that has so many."""
    # 1. In every block (B * G, W): n, and which of the n a token is.
    by_block = blocks.split(maskable)
    total = by_block.sum(dim=1)
    rank = (by_block.long().cumsum(dim=1) - 1).clamp(min=0)
    # 2. E_k E_S n / k gives a set of k tokens the weight (1 / n) (1 / C(n, k)) (n / k).
    weights = torch.zeros(ENUMERATED + 1, ENUMERATED + 1, dtype=torch.float64)  # [k, n]
    for n in range(1, ENUMERATED + 1):
        for k in range(1, n + 1):
            weights[k, n] = 1 / (k * math.comb(n, k))

    def mask(number: int) -> tuple[Tensor, Tensor]:
        pattern = number + 1
        exists = (pattern < 2**total)[:, None]  # a block of n tokens has 2^n - 1 masks
        scored = by_block & (pattern >> rank & 1).bool() & exists
        weight = weights[pattern.bit_count(), total]
        return blocks.join(scored), blocks.join(weight[:, None].expand(scored.shape))

    return mask


# -- the network -------------------------------------------------------------------------------------------------------


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


class _Network:
    """The network on any number of x_t of one batch, with the masks of `denoising_inputs`: x_0 is computed once."""

    def __init__(self, model: Transformer, batch: Batch):
        self.model, self.input_ids, self.clean = model, batch["input_ids"], None
        documents, (_, length) = batch.get("document_ids"), self.input_ids.shape
        model.config.require_length(length)
        self.attn_mask = None if documents is None else document_mask(documents)
        self.position_ids = torch.arange(length, device=self.input_ids.device)[None]
        if 0 < model.config.block_size < length:
            documents = torch.zeros_like(self.input_ids[:1]) if documents is None else documents
            # Queries and keys are [x_t, x_0].
            mask = block_diffusion_mask(documents, model.config.block_size, model.config.attention == "joint")
            self.clean = _CleanKeys(length)
            self._hidden(self.input_ids, mask[:, :, length:, length:], self.position_ids[0, :0])
            self.clean.filled = True
            self.attn_mask = mask[:, :, :length].roll(length, dims=-1)  # of x_t alone, to the keys [x_0, x_t]

    def nats(self, masked: Tensor, scored: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Return sums (S, B) of -log p(x_0 | x_t) over the scored ones (none: all) of the masked (S, B, L) positions of
        x_t, times their weights (S, B, L).

        In float64 on the host, since not every device has float64.
        """
        copies, rows, length = masked.shape
        # 1. Nats of the scored tokens (N,).
        places = (masked if scored is None else scored).flatten().nonzero()[:, 0]
        nats = self.nats_of(*self.predicted(masked, places))
        # 2. Sums by row.
        if weight is not None:
            nats = nats * weight.flatten()[places]
        return nats.new_zeros(copies * rows).index_add(0, places // length, nats).view(copies, rows)

    def predicted(self, masked: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, C) and x_0 (N,) at the flat positions `places` (N,) of S copies of the batch, masked
        (S, B, L)."""
        copies, mask_id = len(masked), self.model.config.mask_token_id
        input_ids = self.input_ids.repeat(copies, 1)  # (S * B, L)
        noised = torch.where(masked.flatten(0, 1).to(input_ids.device), mask_id, input_ids)
        attn_mask = self.attn_mask
        if attn_mask is not None and len(attn_mask) > 1:
            attn_mask = attn_mask.repeat(copies, 1, 1, 1)
        positions = places.to(input_ids.device)
        return self._hidden(noised, attn_mask, positions), input_ids.flatten()[positions]

    def nats_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p (N,) of targets (N,), float64 on the host."""
        mask_id = self.model.config.mask_token_id
        return linear_nats(hidden, self.model.lm_head.weight, targets, mask_id).cpu().double()

    def _hidden(self, ids: Tensor, attn_mask: Tensor | None, select: Tensor) -> Tensor:
        return self.model(
            ids, attn_mask=attn_mask, position_ids=self.position_ids, cache=self.clean, select=select, head=False
        )
