"""softmax(q k^T / sqrt(D)) v, and the masks that say which key a query attends to.

Shapes: B rows, H heads, L queries, K keys, D head_dim. Masks are bool (B or 1, 1, L, K), True = may attend. Each leaves
every query at least one key, itself, so masks compose with `&`. FlexAttention has a BlockMask instead; a mask of which
much is empty is cut into parts.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.cpu_attention import attend_explicitly, is_explicit


class Part(NamedTuple):
    """The next few queries of a pass, which attend to stretches of its keys alone."""

    keys: tuple[slice, ...]
    mask: Tensor  # bool (B or 1, 1, Q, K), to the stretches one after another


class Parts(NamedTuple):
    """A mask cut into parts, in the order of their queries."""

    parts: tuple[Part, ...]
    selected: int  # of them, from the first on, that hold all positions whose output is selected


AttentionMask = Tensor | BlockMask | Parts


def document_mask(document_ids: Tensor) -> Tensor:
    """Attend within one packed document only (LLaDA 2.0, Eq. 4).

    document_ids (B, L): padding has an id of its own, so no row of the mask is empty and no real token sees padding.
    """
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]


def block_causal_mask(length: int, block_size: int, device=None) -> Tensor:
    """Attend to all of one's block and the blocks before it; block_size 1 is the causal mask."""
    block = torch.arange(length, device=device) // block_size
    return (block[:, None] >= block[None, :])[None, None]


def causal_attention(document_ids: Tensor | None, length: int) -> dict[str, Any]:
    """Return the arguments of Transformer.forward for causal attention within the documents (B, L) of packed rows.

    None: every row is one document; then no mask is needed.
    """
    if document_ids is None:
        return {"is_causal": True}
    return {"attn_mask": block_causal_mask(length, 1, document_ids.device) & document_mask(document_ids)}


class Visibility(NamedTuple):
    """What the queries of a pass attend to, in the form that `attend` needs; nothing set = full attention."""

    attn_mask: AttentionMask | None = None
    is_causal: bool = False
    bias: Tensor | None = None  # the mask for explicit attention: 0 or -inf (B or 1, 1, L, K), added to the scores
    # Or: of a few queries at a time, how many they are, the keys that they are given, and which of these they see.
    parts: tuple[tuple[int, tuple[slice, ...], "Visibility"], ...] = ()
    num_selected: int = 0  # see Parts

    def of_selected(self) -> "Visibility":
        """Return what is needed for the positions alone whose output is selected; others get zeros."""
        return self._replace(parts=self.parts[: self.num_selected])


def visibility(attn_mask: AttentionMask | None, is_causal: bool, x: Tensor) -> Visibility:
    """Return the mask of a pass over x (B, L, C) for `attend`, made once for all layers and heads."""
    if isinstance(attn_mask, BlockMask) or (attn_mask is None and not is_causal):
        return Visibility(attn_mask)
    if isinstance(attn_mask, Parts):
        parts = ((part.mask.shape[-2], part.keys, visibility(part.mask, False, x)) for part in attn_mask.parts)
        return Visibility(parts=tuple(parts), num_selected=attn_mask.selected)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    num_keys = x.shape[1] if attn_mask is None else attn_mask.shape[-1]
    if not is_explicit(x.device, dtype, num_keys):
        return Visibility(attn_mask, is_causal)
    mask = block_causal_mask(num_keys, 1, x.device) if attn_mask is None else attn_mask
    bias = torch.zeros(mask.shape, dtype=dtype, device=x.device).masked_fill_(~mask, -math.inf)
    return Visibility(bias=bias)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    """q (B, H, L, D), k and v (B, H_kv, K, D) -> (B, H, L, D), by the kernel that suits device, dtype and length."""
    if visible.parts:
        return _attend_in_parts(q, k, v, visible)
    grouped = k.shape[1] != q.shape[1]
    if isinstance(visible.attn_mask, BlockMask):
        # Compiled only if there is a GPU to compile for: on a CPU it serves tests.
        kernel = _compiled_flex() if q.device.type == "cuda" else flex_attention
        return kernel(q, k, v, block_mask=visible.attn_mask, enable_gqa=grouped)
    if is_explicit(q.device, q.dtype, k.shape[2]):
        return attend_explicitly(q, k, v, visible.bias)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible.attn_mask, is_causal=visible.is_causal, enable_gqa=grouped
    )


@torch.compiler.disable  # whose graphs would hold the numbers of queries and keys of one length
def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    """Return `attend` of every part, one after another, and zeros for the queries after the last one."""
    outputs, counts = [], [count for count, _, _ in visible.parts]
    rest = q.shape[2] - sum(counts)
    for queries, (_, stretches, seen) in zip(q.split([*counts, rest], dim=2), visible.parts, strict=False):
        keys, values = (torch.cat([x[:, :, stretch] for stretch in stretches], dim=2) for x in (k, v))
        outputs.append(attend(queries, keys, values, seen))
    together = torch.cat(outputs, dim=2)
    return F.pad(together, (0, 0, 0, rest)) if rest else together


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # torch.compile makes the width dynamic at the second one; a kernel for each width would exceed its limit.
    return torch.compile(flex_attention)
