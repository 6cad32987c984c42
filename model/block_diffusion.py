"""Block diffusion: rows cut into blocks, all of which are denoised in one pass over [x_t, x_0] (LLaDA 2.0, Eq. 3).

x_t stands beside x_0, so that each noisy block is given the clean blocks before it.
Shapes: B rows, L tokens in a row; G blocks in a row, W tokens in a block; N selected positions.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from model.attention import AttentionMask, Part, Parts, document_mask
from model.ranges import check_ranges
from model.transformer import Transformer

GOLDEN = (5**0.5 - 1) / 2
DENSE_KEYS = 2048  # up to this many keys a dense mask is enough; FlexAttention would be compiled for many short widths
QUERIES_OF_A_PART = 128  # on a CPU: fewer see less that is masked, but make small products


@dataclass(frozen=True)
class BlockSchedule:
    """Block sizes over a run; every field is a flag."""

    block_size: Annotated[
        int | None,
        "denoise blocks of so many tokens, each given the clean ones before it; 0 = the whole row at once "
        "(none: as the starting weights were trained, at first the whole row); each block has a mask rate of its own, "
        "by whose inverse fixed_count and iid_t weigh its masked tokens (LLaDA 2.0 Eq. 1; the code released with it "
        "draws one rate for a row, and takes the plain mean over masked tokens)",
        "at least 0",
        "--llada2-block-size",
        ("--llada2-enable-block-diffusion", 32),
    ] = None
    use_block_curriculum: Annotated[
        bool, "LLaDA 2.0's warm-up, stable and decay phase of the block size: from small blocks to whole rows and back"
    ] = False
    wsd_phase_ratios: Annotated[
        tuple[float, ...], "share of the steps of its three phases", "in [0, 1]", "with --use-block-curriculum"
    ] = (0.3, 0.5, 0.2)
    wsd_block_sizes_up: Annotated[
        tuple[int, ...],
        "block sizes of its warm-up, in equal parts; one that holds the row is the whole row",
        "at least 1",
        "with --use-block-curriculum",
    ] = (1, 4, 16, 64, 256)
    wsd_block_sizes_down: Annotated[
        tuple[int, ...],
        "block sizes of its decay; at the last the weights are validated and decoded",
        "at least 1",
        "with --use-block-curriculum",
    ] = (256, 128, 64, 32)

    def __post_init__(self):
        check_ranges(type(self), vars(self))
        if self.use_block_curriculum:
            self._require_curriculum()

    def _require_curriculum(self) -> None:
        if self.block_size is not None:
            raise ValueError("--block-size and --use-block-curriculum contradict each other; leave one of them out")
        ratios = self.wsd_phase_ratios
        if len(ratios) != 3 or abs(sum(ratios) - 1) > 1e-6 or not ratios[2]:
            raise ValueError(f"--wsd-phase-ratios {ratios}: expected three shares that add up to 1, the last above 0")
        if not (self.wsd_block_sizes_up and self.wsd_block_sizes_down):
            raise ValueError("--wsd-block-sizes-up and --wsd-block-sizes-down: expected numbers of tokens")

    @property
    def last_block_size(self) -> int:
        """The block size at which a run ends; 0 = the whole row."""
        return self.wsd_block_sizes_down[-1] if self.use_block_curriculum else self.block_size or 0

    def block_size_at(self, progress: float) -> int:
        """Return the block size when a share `progress` of the run is done; 0 = the whole row."""
        if not self.use_block_curriculum:
            return self.last_block_size
        up, stable, down = self.wsd_phase_ratios
        if progress < up:
            return _part(self.wsd_block_sizes_up, progress / up)
        if progress < up + stable:
            return 0
        return _part(self.wsd_block_sizes_down, (progress - up - stable) / down)


def _part(sizes: tuple[int, ...], progress: float) -> int:
    """Return the size whose turn it is when a share `progress` of their phase is done; all have equal parts of it."""
    return sizes[min(int(progress * len(sizes) + 1e-9), len(sizes) - 1)]


def block_starts(document_ids: Tensor, block_size: int) -> Tensor:
    """Return the first column of every position's block, int64 (B, L), along each row of document_ids (B, L).

    Every document begins a block of its own, so that its blocks lie as they would if it were alone, and as a decoder
    will lay them; its last one may be shorter than block_size.
    """
    # 1. Where each position's document begins.
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    column = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    document_start = torch.where(begins, column, 0).cummax(dim=1).values
    # 2. A block begins every block_size tokens from there.
    return column - (column - document_start) % block_size


class Blocks:
    """Rows (B, L) of a batch cut into blocks (B * G, W), and put together again."""

    def __init__(self, values: Tensor, document_ids: Tensor | None, block_size: int):
        """values (B, L) gives shape and device; document_ids (B, L), None = each row is one document; block_size 0 =
        the row is one block."""
        documents = torch.zeros_like(values, dtype=torch.long) if document_ids is None else document_ids
        length = values.shape[1]
        self.width = min(block_size or length, length)
        start, column = block_starts(documents, self.width), torch.arange(length, device=values.device)
        block = (start == column).long().cumsum(dim=1) - 1  # of every position: 0, 1, 2, ... along its row
        self.number = int(block.max()) + 1  # G
        # The column of every token when each block of a row has W columns, so that short blocks end in empty ones.
        self.place = block * self.width + column - start  # (B, L)

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


@dataclass(frozen=True)
class TwoHalves:
    """Who may attend to whom over the 2L positions of [x_t, x_0] (LLaDA 2.0, Eq. 3).

    Positions are compared by `order`: the first column of their block; in x_0, if it is `causal`, their own column.
    """

    documents: Tensor  # (B or 1, 2L)
    order: Tensor  # (B or 1, 2L) int64
    clean: Tensor  # (2L,) bool, belongs to x_0

    @classmethod
    def of(cls, document_ids: Tensor, block_size: int, causal: bool) -> "TwoHalves":
        length = document_ids.shape[1]
        start = block_starts(document_ids, block_size)
        column = torch.arange(2 * length, device=document_ids.device)
        order = torch.cat([start, column[:length].expand_as(start) if causal else start], dim=1)
        return cls(document_ids.repeat(1, 2), order, column >= length)

    def may_attend(self, row: Any, query: Tensor, key: Tensor) -> Tensor:
        """Return the rule for positions that are broadcast; row: a number or a slice of rows."""
        clean_query, clean_key = self.clean[query], self.clean[key]
        query_order, key_order = self.order[row, query], self.order[row, key]
        itself = ~clean_query & ~clean_key & (query_order == key_order)  # a noisy block sees all of itself,
        before = ~clean_query & clean_key & (key_order < query_order)  # and the clean blocks before it;
        # a clean block sees itself and those before it, or a clean token itself and those before it.
        context = clean_query & clean_key & (key_order <= query_order)
        return (self.documents[row, query] == self.documents[row, key]) & (itself | before | context)

    def dense(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the mask (B or 1, 1, Q, K) of some queries (Q,) and some keys (K,)."""
        return self.may_attend(slice(None), queries[:, None], keys[None, :])[:, None]


def block_diffusion_mask(document_ids: Tensor, block_size: int, causal: bool = False) -> Tensor:
    """Return the dense mask (B, 1, 2L, 2L) over [x_t, x_0] of document_ids (B, L)."""
    every = torch.arange(2 * document_ids.shape[1], device=document_ids.device)
    return TwoHalves.of(document_ids, block_size, causal).dense(every, every)


def block_diffusion_parts(document_ids: Tensor, block_size: int, causal: bool) -> Parts:
    """Return the same mask cut into parts, each with the few keys that its queries may see: from a noisy block the
    noisy tokens near it and the clean ones before its end, from a clean one the clean tokens up to its end.

    Three quarters of the 2L x 2L pairs are computed if a half is one part, three eighths if it is many; what is left
    out is never seen. Of a causal clean half outputs
    may be selected, too.
    """
    halves, length = TwoHalves.of(document_ids, block_size, causal), document_ids.shape[1]
    column = torch.arange(2 * length, device=document_ids.device)
    size, reach = QUERIES_OF_A_PART if document_ids.device.type == "cpu" else length, block_size - 1
    noisy, clean = [], []
    for first in range(0, length, size):
        last = min(first + size, length)
        near = slice(max(first - reach, 0), min(last + reach, length))  # however the blocks of a row lie
        keys = near, slice(length, length + last)
        mask = halves.dense(column[first:last], torch.cat([column[stretch] for stretch in keys]))
        noisy.append(Part(keys, mask))
        keys = slice(length, length + (last if causal else near.stop))
        clean.append(Part((keys,), halves.dense(column[length + first : length + last], column[keys])))
    return Parts((*noisy, *clean), len(noisy) * (1 + causal))


def block_diffusion_flex_mask(document_ids: Tensor, block_size: int, causal: bool) -> BlockMask:
    """Return the same mask for FlexAttention, which skips the tiles that nothing attends to."""
    halves, (rows, length) = TwoHalves.of(document_ids, block_size, causal), document_ids.shape

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return halves.may_attend(row if rows > 1 else 0, query, key)  # the mask of one row serves any batch

    return create_block_mask(may_attend, rows, None, 2 * length, 2 * length, device=document_ids.device)


def block_diffusion_attention(
    document_ids: Tensor | None, length: int, block_size: int, causal: bool, device: torch.device
) -> AttentionMask:
    """Return the mask of [x_t, x_0] in the form that suits it: FlexAttention's on a GPU if rows are long, else parts.

    document_ids (B, L), or None for rows that are one document each, whose mask is made once.
    """
    flex = device.type == "cuda" and 2 * length > DENSE_KEYS
    if document_ids is None:
        return _mask_of_whole_rows(length, block_size, causal, flex, device)
    return (block_diffusion_flex_mask if flex else block_diffusion_parts)(document_ids, block_size, causal)


@lru_cache(maxsize=4)  # one of 2,048 tokens takes up to 16 MiB of the device
def _mask_of_whole_rows(length: int, block_size: int, causal: bool, flex: bool, device: torch.device) -> AttentionMask:
    """Return the mask of rows that are one document each, whose first dimension is 1."""
    documents = torch.zeros(1, length, dtype=torch.long, device=device)
    return (block_diffusion_flex_mask if flex else block_diffusion_parts)(documents, block_size, causal)


def denoising_inputs(
    noised_ids: Tensor,
    clean_ids: Tensor,
    document_ids: Tensor | None,
    block_size: int,
    select: Tensor,
    causal: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the ids and the other arguments with which a Transformer predicts x_0 at the flat positions `select` (N,)
    of x_t.

    x_t = noised_ids (B, L) and x_0 = clean_ids (B, L). A block sees all of itself and the clean blocks before it in its
    document, as a decoder does that writes block by block. With block_size 0, or one that holds the row, no block comes
    before another: x_0 is left out, and a position sees all of its document. document_ids (B, L), see `block_starts`;
    None: every row is one document without padding. causal: as in a joint model, a token of x_0 sees itself and those
    before it, and not all of its block; x_0 is never left out.
    """
    length, device = noised_ids.shape[1], noised_ids.device
    if not causal and not 0 < block_size < length:
        attn_mask = None if document_ids is None else document_mask(document_ids)
        return noised_ids, {"attn_mask": attn_mask, "select": select}
    size = min(block_size or length, length)
    return torch.cat([noised_ids, clean_ids], dim=1), {  # (B, 2L)
        "attn_mask": block_diffusion_attention(document_ids, length, size, causal, device),
        "position_ids": torch.arange(length, device=device).repeat(2)[None],  # both halves stand at the same places
        "select": select + select // length * length,  # from flat positions of (B, L) to those of (B, 2L)
    }


def predicted_states(model: Transformer, prepared: dict[str, Any], places: Tensor) -> Tensor:
    """Return the hidden states from which x_0 is predicted at the flat positions `places` of x_t, for a joint model
    followed by those of x_0 from which the next token is."""
    ids, attention = denoising_inputs(
        prepared["noised_ids"],
        prepared["input_ids"],
        prepared.get("document_ids"),
        prepared["block_size"],
        places,
        prepared["joint"],
    )
    if prepared["joint"]:  # of complementary copies the first: x_0 is the same in both
        place, length = prepared["next_positions"], prepared["input_ids"].shape[1]
        attention["select"] = torch.cat([attention["select"], place + (place // length + 1) * length])
    noise = prepared.get("perturbation")
    if noise is not None:  # from units of the embeddings' root mean square
        noise = noise * model.embed_tokens.weight.detach().square().mean().sqrt()
    return model(ids, **attention, perturbation=noise, head=False)
