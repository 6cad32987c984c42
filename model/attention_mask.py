"""Boolean attention masks, shape (B or 1, 1, L_query, L_key), True = may attend.

Every mask leaves each query at least one key (itself), so masks compose with `&`.
"""

import torch
from torch import Tensor


def document_mask(document_ids: Tensor) -> Tensor:
    """Attend within one packed document only (LLaDA 2.0, Eq. 4).

    document_ids (B, L): padding carries its own id, so no row of the mask is empty and no real token sees padding.
    """
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]


def block_causal_mask(length: int, block_size: int, device=None) -> Tensor:
    """Bidirectional inside a block, causal between blocks; block_size 1 is the causal mask."""
    block = torch.arange(length, device=device) // block_size
    return (block[:, None] >= block[None, :])[None, None]
