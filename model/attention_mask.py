"""Who may see whom: boolean masks, shape (B or 1, 1, L_query, L_key), True = may attend, and their FlexAttention form.

Every mask leaves each query at least one key (itself), so boolean masks compose with `&`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

AttentionMask = Tensor | BlockMask
DENSE_KEYS = 2048  # up to so many a dense mask is enough; FlexAttention would be compiled for many short widths


def document_mask(document_ids: Tensor) -> Tensor:
    """Attend within one packed document only (LLaDA 2.0, Eq. 4).

    document_ids (B, L): padding carries its own id, so no row of the mask is empty and no real token sees padding.
    """
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]


def block_causal_mask(length: int, block_size: int, device=None) -> Tensor:
    """Bidirectional inside a block, causal between blocks; block_size 1 is the causal mask."""
    block = torch.arange(length, device=device) // block_size
    return (block[:, None] >= block[None, :])[None, None]


def causal_attention(document_ids: Tensor | None, length: int) -> dict[str, Any]:
    """Arguments of Transformer.forward for causal attention within the documents (B, L) of packed rows; None: every row
    is one document, and needs no mask."""
    if document_ids is None:
        return {"is_causal": True}
    return {"attn_mask": block_causal_mask(length, 1, document_ids.device) & document_mask(document_ids)}


def number_blocks(document_ids: Tensor, block_size: int) -> Tensor:
    """int64 (B, L): the block of every position, 0, 1, 2, ... along each row of document_ids (B, L).

    Every document begins a block of its own, so that its blocks lie as they would were it alone, and as a decoder will
    lay them; its last one may be shorter than block_size.
    """
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begin = torch.where(first, place, 0).cummax(dim=1).values
    return ((place - begin) % block_size == 0).long().cumsum(dim=1) - 1


def block_diffusion_rule(
    same_document: Tensor, clean_query: Tensor, clean_key: Tensor, query_block: Tensor, key_block: Tensor
) -> Tensor:
    """The three parts of LLaDA 2.0 Eq. 3 over [x_t, x_0], broadcast: a noisy block sees itself and the clean blocks
    before it; a clean one sees itself and the clean ones before it; nothing clean sees anything noisy."""
    itself = ~clean_query & ~clean_key & (query_block == key_block)
    before = ~clean_query & clean_key & (key_block < query_block)
    context = clean_query & clean_key & (key_block <= query_block)
    return same_document & (itself | before | context)


def block_diffusion_mask(document_ids: Tensor, block_size: int) -> Tensor:
    """(B, 1, 2L, 2L) over [x_t, x_0] of document_ids (B, L), by `block_diffusion_rule`."""
    documents, blocks, clean = _twice(document_ids, block_size)
    return block_diffusion_rule(
        documents[:, :, None] == documents[:, None, :],
        clean[:, None],
        clean[None, :],
        blocks[:, :, None],
        blocks[:, None, :],
    )[:, None]


def block_diffusion_flex_mask(document_ids: Tensor, block_size: int) -> BlockMask:
    """The same rule for FlexAttention, which skips the tiles that nothing may see."""
    documents, blocks, clean = _twice(document_ids, block_size)
    rows, length = documents.shape

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = row if rows > 1 else 0  # one row's mask may serve a batch of any size
        return block_diffusion_rule(
            documents[row, query] == documents[row, key],
            clean[query],
            clean[key],
            blocks[row, query],
            blocks[row, key],
        )

    return create_block_mask(may_attend, rows, None, length, length, device=document_ids.device)


@lru_cache(maxsize=16)
def _whole_rows(length: int, block_size: int, flex: bool, device: torch.device) -> AttentionMask:
    """That of rows which are one document each, (1, 1, 2L, 2L)."""
    documents = torch.zeros(1, length, dtype=torch.long, device=device)
    return (block_diffusion_flex_mask if flex else block_diffusion_mask)(documents, block_size)


def block_diffusion_attention(document_ids: Tensor | None, length: int, block_size: int, device: torch.device):
    """The mask of [x_t, x_0] in the form that suits it: FlexAttention's on a GPU where rows are long, else dense.

    document_ids (B, L), or None for rows that are one document each, whose mask is made once.
    """
    flex = device.type == "cuda" and 2 * length > DENSE_KEYS
    if document_ids is None:
        return _whole_rows(length, block_size, flex, device)
    return (block_diffusion_flex_mask if flex else block_diffusion_mask)(document_ids, block_size)


def _twice(document_ids: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Document and block (B, 2L) of every position of [x_t, x_0], and which are clean (2L,)."""
    length = document_ids.shape[1]
    clean = torch.arange(2 * length, device=document_ids.device) >= length
    return document_ids.repeat(1, 2), number_blocks(document_ids, block_size).repeat(1, 2), clean


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)  # dynamic from the second width on: each of its own would exceed the limit


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention, compiled where there is a GPU to compile for; q (B, H, L, D), k and v (B, H_kv, L, D)."""
    attention = _compiled_flex() if q.device.type == "cuda" else flex_attention
    return attention(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
