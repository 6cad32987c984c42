"""One forward pass for all blocks: x_t beside x_0, each noisy block given the clean ones before it (LLaDA 2.0, Eq. 3).

Shapes: R rows of x_t, L positions, N selected positions, V vocabulary, C hidden_size.
"""

import torch
from torch import Tensor

from model.attention_mask import block_diffusion_attention, document_mask
from model.transformer import Transformer


def predict(
    model: Transformer,
    noised_ids: Tensor,
    clean_ids: Tensor,
    document_ids: Tensor | None,
    block_size: int,
    select: Tensor,
    perturbation: Tensor | None = None,
    head: bool = True,
) -> Tensor:
    """Logits (N, V) of x_0 at the flat positions `select` (N,) of x_t = noised_ids (R, L), given clean_ids (R, L);
    without `head` the hidden states (N, C) before them.

    A block sees all of itself and the clean blocks before it in its document, as a decoder does that writes block by
    block. block_size 0, or one that holds the row: no block comes before another, so x_0 is left out, and a position
    sees all of its document. document_ids (R, L), see `number_blocks`; None: every row is one document, and full.
    perturbation (R, L, C) is added to the embeddings of x_t.
    """
    rows, length = noised_ids.shape
    if not 0 < block_size < length:
        attn_mask = None if document_ids is None else document_mask(document_ids)
        return model(noised_ids, attn_mask=attn_mask, select=select, perturbation=perturbation, head=head)
    if perturbation is not None:
        perturbation = torch.cat([perturbation, torch.zeros_like(perturbation)], dim=1)
    return model(
        torch.cat([noised_ids, clean_ids], dim=1),
        attn_mask=block_diffusion_attention(document_ids, length, block_size, noised_ids.device),
        position_ids=torch.arange(length, device=noised_ids.device).repeat(2)[None],
        select=select + select // length * length,  # of (R, L), among (R, 2L)
        canvas=length,
        perturbation=perturbation,
        head=head,
    )
