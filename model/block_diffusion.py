"""Block diffusion: rows cut into blocks, all of which are denoised in one pass over [x_t, x_0] (LLaDA 2.0, Eq. 3).

x_t stands beside x_0, so that each noisy block is given the clean blocks before it.
Shapes: B rows, L tokens in a row; G blocks in a row, W tokens in a block; N selected positions.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from model.attention import AttentionMask, document_mask

GOLDEN = (5**0.5 - 1) / 2
DENSE_KEYS = 2048  # up to this many keys a dense mask is enough; FlexAttention would be compiled for many short widths


def number_blocks(document_ids: Tensor, block_size: int) -> Tensor:
    """Return the block of every position, int64 (B, L): 0, 1, 2, ... along each row of document_ids (B, L).

    Every document begins a block of its own, so that its blocks lie as they would if it were alone, and as a decoder
    will lay them; its last one may be shorter than block_size.
    """
    # 1. Where each position's document begins.
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    document_start = torch.where(begins, place, 0).cummax(dim=1).values
    # 2. A block begins every block_size tokens from there; count the beginnings.
    return ((place - document_start) % block_size == 0).long().cumsum(dim=1) - 1


class Blocks:
    """Rows (B, L) of a batch cut into blocks (B * G, W), and put together again."""

    def __init__(self, values: Tensor, document_ids: Tensor | None, block_size: int):
        """values (B, L) gives shape and device; document_ids (B, L), None = each row is one document; block_size 0 =
        the row is one block."""
        documents = torch.zeros_like(values, dtype=torch.long) if document_ids is None else document_ids
        length = values.shape[1]
        self.width = min(block_size or length, length)
        block = number_blocks(documents, self.width)
        self.number = int(block.max()) + 1  # G
        # The column of every token when each block of a row has W columns, so that short blocks end in empty ones.
        begins = torch.ones_like(block, dtype=torch.bool)
        begins[:, 1:] = block[:, 1:] != block[:, :-1]
        column = torch.arange(length, device=values.device)
        self.place = block * self.width + column - torch.where(begins, column, 0).cummax(dim=1).values  # (B, L)

    @property
    def golden_steps(self) -> Tensor:
        """Multiples (G,) of the golden ratio, whose fractional parts are spread over [0, 1) however many there are: so
        the mask counts of the blocks of a row differ, and no pass is all light or all heavy."""
        return GOLDEN * torch.arange(self.number, device=self.place.device)

    def split(self, values: Tensor) -> Tensor:
        """(B, L) -> (B * G, W), 0 in the empty columns of short blocks."""
        padded = values.new_zeros(len(values), self.number * self.width)
        return padded.scatter_(1, self.place, values).view(-1, self.width)

    def join(self, values: Tensor) -> Tensor:
        """(B * G, W) -> (B, L)."""
        return values.reshape(len(self.place), -1).gather(1, self.place)


def block_diffusion_rule(
    same_document: Tensor, clean_query: Tensor, clean_key: Tensor, query_block: Tensor, key_block: Tensor
) -> Tensor:
    """Return who may attend to whom over [x_t, x_0] (LLaDA 2.0, Eq. 3); the arguments are broadcast."""
    itself = ~clean_query & ~clean_key & (query_block == key_block)  # a noisy block sees all of itself,
    before = ~clean_query & clean_key & (key_block < query_block)  # and the clean blocks before it;
    context = clean_query & clean_key & (key_block <= query_block)  # a clean block sees itself and those before it.
    return same_document & (itself | before | context)


def block_diffusion_mask(document_ids: Tensor, block_size: int) -> Tensor:
    """Return the dense mask (B, 1, 2L, 2L) over [x_t, x_0] of document_ids (B, L)."""
    documents, blocks, clean = _twice(document_ids, block_size)
    return block_diffusion_rule(
        documents[:, :, None] == documents[:, None, :],
        clean[:, None],
        clean[None, :],
        blocks[:, :, None],
        blocks[:, None, :],
    )[:, None]


def block_diffusion_flex_mask(document_ids: Tensor, block_size: int) -> BlockMask:
    """Return the same mask for FlexAttention, which skips the tiles that nothing attends to."""
    documents, blocks, clean = _twice(document_ids, block_size)
    rows, length = documents.shape

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = row if rows > 1 else 0  # the mask of one row serves a batch of any size
        return block_diffusion_rule(
            documents[row, query] == documents[row, key],
            clean[query],
            clean[key],
            blocks[row, query],
            blocks[row, key],
        )

    return create_block_mask(may_attend, rows, None, length, length, device=document_ids.device)


def _twice(document_ids: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return document and block (B, 2L) of every position of [x_t, x_0], and which positions are clean (2L,)."""
    length = document_ids.shape[1]
    clean = torch.arange(2 * length, device=document_ids.device) >= length
    return document_ids.repeat(1, 2), number_blocks(document_ids, block_size).repeat(1, 2), clean


def block_diffusion_attention(
    document_ids: Tensor | None, length: int, block_size: int, device: torch.device
) -> AttentionMask:
    """Return the mask of [x_t, x_0] in the form that suits it: FlexAttention's on a GPU if rows are long, else dense.

    document_ids (B, L), or None for rows that are one document each, whose mask is made once.
    """
    flex = device.type == "cuda" and 2 * length > DENSE_KEYS
    if document_ids is None:
        return _mask_of_whole_rows(length, block_size, flex, device)
    return (block_diffusion_flex_mask if flex else block_diffusion_mask)(document_ids, block_size)


@lru_cache(maxsize=4)  # a dense one of 2,048 tokens takes 16 MiB of the device
def _mask_of_whole_rows(length: int, block_size: int, flex: bool, device: torch.device) -> AttentionMask:
    """Return the mask (1, 1, 2L, 2L) of rows that are one document each."""
    documents = torch.zeros(1, length, dtype=torch.long, device=device)
    return (block_diffusion_flex_mask if flex else block_diffusion_mask)(documents, block_size)


def denoising_inputs(
    noised_ids: Tensor, clean_ids: Tensor, document_ids: Tensor | None, block_size: int, select: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Return the ids and the other arguments with which a Transformer predicts x_0 at the flat positions `select` (N,)
    of x_t.

    x_t = noised_ids (B, L) and x_0 = clean_ids (B, L). A block sees all of itself and the clean blocks before it in its
    document, as a decoder does that writes block by block. With block_size 0, or one that holds the row, no block comes
    before another: x_0 is left out, and a position sees all of its document. document_ids (B, L), see `number_blocks`;
    None: every row is one document without padding.
    """
    length, device = noised_ids.shape[1], noised_ids.device
    if not 0 < block_size < length:
        attn_mask = None if document_ids is None else document_mask(document_ids)
        return noised_ids, {"attn_mask": attn_mask, "select": select}
    return torch.cat([noised_ids, clean_ids], dim=1), {  # (B, 2L)
        "attn_mask": block_diffusion_attention(document_ids, length, block_size, device),
        "position_ids": torch.arange(length, device=device).repeat(2)[None],  # both halves stand at the same places
        "select": select + select // length * length,  # from flat positions of (B, L) to those of (B, 2L)
    }
