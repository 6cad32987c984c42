"""Batches for tests, and bounds of one document by definition: by all sets of masks, one pass each."""

import itertools
import math

import torch

from model.attention import block_causal_mask


def batch_of(ids, documents=None, loss_mask=None):
    """A batch of the rows ids (B, L), all of them maskable if nothing else is said."""
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool) if loss_mask is None else loss_mask}
    return batch | ({} if documents is None else {"document_ids": documents})


def subsets(places):
    """All sets of at least one place, the small ones first."""
    return [list(subset) for k in range(1, len(places) + 1) for subset in itertools.combinations(places, k)]


def cost(model, ids, masked, block_size=0):
    """-log p of the `masked` tokens of ids (L,), summed, given the others; full attention, or block-causal."""
    mask_id = model.config.mask_token_id
    noised = ids.clone()
    noised[masked] = mask_id
    attn_mask = block_causal_mask(len(ids), block_size) if block_size else None
    logits = model(noised[None], attn_mask=attn_mask)[0].double()
    logits[:, mask_id] = -math.inf
    return -logits.log_softmax(-1)[masked, ids[masked]].sum().item()


@torch.no_grad()
def enumerated_bound(model, ids, begin=0):
    """LLaDA Eq. 6 of ids[begin:] given ids[:begin]: E_k E_{|S| = k} n / k times the cost of S."""
    places = range(begin, len(ids))
    return sum(cost(model, ids, s) / len(s) / math.comb(len(places), len(s)) for s in subsets(places))


@torch.no_grad()
def block_bound(model, ids, scored, size=None):
    """LLaDA 2.0 Eq. 1: the same of every block of `size` (default: the model's), given the clean blocks before it."""
    size, total = size or model.config.block_size, 0.0
    for begin in range(0, len(ids), size):
        text = ids[: begin + size]
        places = [place for place in range(begin, len(text)) if scored[place]]
        for masked in subsets(places):
            total += cost(model, text, masked, size) / len(masked) / math.comb(len(places), len(masked))
    return total
