"""Preference data: pairs of replies to one prompt, and the rows that compare them.

Only the number of a row's pair is kept in memory.
Shapes: P pairs, B of them in a batch, W tokens of its widest row, L = seq_len.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.cache import ArrayFiles, stretches
from dataset.content import content_hash
from dataset.corpus.bundled import bundled_file
from dataset.order import LengthOrder, RowOrder
from dataset.reading.bad_rows import BadRows, OnBadRow, skipped_line
from dataset.reading.files import DATA_HELP, Observer, data_files, is_plain_text
from dataset.replies import WIDTH_MULTIPLE, Items, shortened
from dataset.rows.kinds import note_on_training
from dataset.rows.pair_formats import Pair, read_pairs
from dataset.spelling import spelling_check
from dataset.tokenise import FileTokeniser, template_size
from dataset.tokenizer import PreTrainedTokenizerFast, encode_conversations, render_chat, token_dtype


@dataclass(frozen=True)
class PreferenceData:
    """Where the pairs are and how they become rows; every field is a flag. ValueError on impossible values."""

    data: Annotated[
        Path | None,
        f"pairs of replies, in the formats of dataset/rows/pair_formats.py; {DATA_HELP} (none: the bundled ones)",
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[
        int, "longest prompt and reply together, in tokens; more is shortened", "--seq-len", "at least 16"
    ] = 512
    val_fraction: Annotated[float, "share of pairs held out for validation, by content hash", "in [0, 1)"] = 0.05
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time"] = Path("dataset/.cache")
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        if self.data is not None and is_plain_text(data_files(self.data)[0]):
            raise ValueError(f"--data {self.data}: expected rows, one pair each")

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of --data, or without it the bundled pairs, which are written into the cache first."""
        return data_files(self.data) if self.data else (bundled_file("preferences", self.cache_dir),)


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs back to back: prompt and open assistant turn, chosen reply and EOS, rejected reply and EOS."""

    tokens: np.ndarray  # (T,) of all pairs
    starts: np.ndarray  # (3P + 1,) where each of the three parts begins, and the end
    prompts: np.ndarray  # (P,) uint64, content_hash of the prompt
    hashes: np.ndarray  # (P,) uint64, content_hash of the prompt with the chosen reply, as in fine-tuning
    common: np.ndarray  # (P,) int64, number of tokens with which both replies begin

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> "Pairs":
        parts = list(_parts(tokenizer, pairs))
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return cls(
            np.fromiter(chain.from_iterable(parts), token_dtype(tokenizer), lengths.sum()),
            np.append(0, np.cumsum(lengths)),
            np.array([_prompt_hash(pair) for pair in pairs], dtype=np.uint64),
            np.array([_chosen_hash(pair) for pair in pairs], dtype=np.uint64),
            np.array([*map(_common_length, parts[1::3], parts[2::3])], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def held_out(self, fraction: float) -> np.ndarray:
        """Hashes of the prompts that are held out, ascending.

        A pair is held out if fine-tuning holds out its chosen conversation, and with it all pairs with the same prompt:
        no prompt is on both sides. At least one prompt is held out if there are two.
        """
        if fraction > 0 and not (smallest := self.hashes.min()) < fraction * 2.0**64:
            prompts = self._prompts(lambda hashes: hashes == smallest)
            others = any(not np.isin(self.prompts[pairs], prompts).all() for pairs in stretches(len(self)))
            return prompts if others else prompts[:0]
        return self._prompts(lambda hashes: hashes < fraction * 2.0**64)

    def _prompts(self, chosen: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Hashes of the prompts of the pairs whose own hashes pass chosen(hashes), ascending."""
        parts = [np.unique(self.prompts[pairs[chosen(self.hashes[pairs])]]) for pairs in stretches(len(self))]
        return np.unique(np.concatenate(parts))


class PairTokeniser(FileTokeniser):
    """The pairs of files."""

    unit, version, kind = "pairs", 5, "pairs"

    def dtypes(self) -> dict[str, Any]:
        hashes = {"prompts": np.uint64, "hashes": np.uint64}
        return {"tokens": token_dtype(self.tokenizer), "starts": np.int64, **hashes, "common": np.int64}

    def read(self, observe: Observer, bad: BadRows) -> Iterator[Pair]:
        for file in self.files:
            for _, pair in read_pairs(file, observe, bad, spelling_check(self.tokenizer)):
                yield pair

    def size(self, row: Pair) -> int:
        return template_size(row.contents)

    def append(self, files: ArrayFiles, rows: list[Pair]) -> None:
        pairs = Pairs.of(self.tokenizer, rows)
        starts = pairs.starts[1:] if files.lengths["hashes"] else pairs.starts  # the first chunk begins with 0
        files.append("starts", starts + files.lengths["tokens"])
        files.append("tokens", pairs.tokens)
        files.append("prompts", pairs.prompts)
        files.append("hashes", pairs.hashes)
        files.append("common", pairs.common)

    def counts(self, files: ArrayFiles, bad: BadRows) -> dict[str, Any]:
        return {"pairs": files.lengths["hashes"], "tokens": files.lengths["tokens"]}


class PairItems(NamedTuple):
    """Pairs as they are shown."""

    rows: Items  # the prompt and the longer reply
    rejected: np.ndarray  # (B,) the rejected reply's first token
    replies: np.ndarray  # (2, B) tokens kept of either reply


def items_of(pairs: Pairs, chosen: np.ndarray, seq_len: int) -> PairItems:
    """The pairs `chosen` (B,), shortened: both replies after the same end of the prompt."""
    begin, middle, rejected, end = (pairs.starts[3 * chosen + place] for place in range(4))
    replies = np.stack([rejected - middle, end - rejected])
    rows = shortened(Items(begin, middle, middle + replies.max(axis=0)), seq_len)
    return PairItems(rows, rejected, np.minimum(replies, rows.end - rows.middle))


def equal_replies(pairs: Pairs, chosen: np.ndarray, items: PairItems) -> np.ndarray:
    """(B,) bool: which of the pairs `chosen` have two replies that are identical after shortening."""
    first, other = items.replies
    return (first == other) & (pairs.common[chosen] >= first)


def empty_replies(items: PairItems) -> np.ndarray:
    """(B,) bool: which of the pairs have a reply that is its EOS alone."""
    return (items.replies == 1).any(axis=0)


@dataclass(frozen=True)
class PairLayout:
    """Settings of the rows made of pairs.

    block_size > 0: after its EOS a row continues as [MASK] to the end of the block. A block decoder sees such a canvas,
    which does not reveal where the reply will end.
    """

    seq_len: int
    pad_id: int
    mask_id: int
    block_size: int = 0
    hide_padding: bool = True  # by a mask; a causal model does not see it anyway


@dataclass(frozen=True)
class PairRows:
    """Pairs as rows of at most seq_len tokens, both replies after the same end of the prompt."""

    pairs: Pairs
    chosen: np.ndarray  # (N,) int64, the pair of each row
    layout: PairLayout

    @classmethod
    def of(
        cls, pairs: Pairs, layout: PairLayout, keep: Callable[[np.ndarray], np.ndarray], by_length: bool = False
    ) -> tuple["PairRows", dict[str, int]]:
        """Rows of the pairs whose prompts' hashes pass keep(hashes), and how many were shortened or left out."""
        parts, counts = [np.empty(0, dtype=np.int64)], np.zeros(5, dtype=np.int64)
        for stretch in stretches(len(pairs)):
            stretch = stretch[keep(pairs.prompts[stretch])]
            items = items_of(pairs, stretch, layout.seq_len)
            empty = empty_replies(items)
            equal = equal_replies(pairs, stretch, items) & ~empty
            parts.append(stretch[~empty & ~equal])
            rows = items.rows
            counts += [rows.cut_prompts, rows.cut_bodies, rows.num_shortened, equal.sum(), empty.sum()]
        chosen = np.concatenate(parts)
        if by_length:
            chosen = chosen[np.argsort(items_of(pairs, chosen, layout.seq_len).rows.lengths, kind="stable")]
        names = "cut_prompts", "cut_replies", "shortened", "equal_replies", "empty_replies"
        return cls(pairs, chosen, layout), dict(zip(names, counts.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def seq_len(self) -> int:
        return self.layout.seq_len

    @cached_property
    def real_token_share(self) -> float:
        """Tokens of both rows of a pair, as a multiple of seq_len: up to 2."""
        total = sum(int(self._canvas_lengths(self.items(rows)).sum()) for rows in stretches(len(self)))
        return total / len(self) / self.seq_len if len(self) else 0.0

    def items(self, rows: np.ndarray) -> PairItems:
        return items_of(self.pairs, self.chosen[rows], self.seq_len)

    def order(self, seed: int, rows_per_step: int) -> LengthOrder:
        return LengthOrder(RowOrder(len(self), seed).visits, self.lengths, len(self), seed, rows_per_step)

    def lengths(self, visits: np.ndarray) -> np.ndarray:
        """Tokens of the longer row of each visit's pair, (B,) int64."""
        return self._canvas_lengths(self.items(visits % len(self))).max(axis=0)

    def _canvas_lengths(self, items: PairItems) -> np.ndarray:
        """(2, B) lengths of the rows, the rest of their last block included."""
        lengths = items.rows.middle - items.rows.begin + items.replies
        if self.layout.block_size:
            lengths = lengths + -lengths % self.layout.block_size
        return np.minimum(lengths, self.seq_len)

    def batch(self, visits: np.ndarray) -> dict[str, Tensor]:
        """(2B, W) tensors, the chosen rows before the rejected ones: input_ids int64; loss_mask bool, True on the reply
        and its EOS; with hide_padding also document_ids int64, 0 or -1 on padding."""
        (prompts, rejected, replies) = items = self.items(np.asarray(visits, dtype=np.int64) % len(self))
        canvas = self._canvas_lengths(items).reshape(-1, 1)
        width = min(-(-int(canvas.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.seq_len)
        place = np.arange(width)
        prompt = np.tile(prompts.middle - prompts.begin, 2)[:, None]
        begin, reply = np.tile(prompts.begin, 2)[:, None], np.append(prompts.middle, rejected)[:, None]
        end = prompt + replies.reshape(-1, 1)
        # After the row's end stands [MASK] or padding: what is read there is overwritten, but must exist.
        source = np.minimum(np.where(place < prompt, begin, reply - prompt) + place, len(self.pairs.tokens) - 1)
        rest = np.where(place < canvas, self.layout.mask_id, self.layout.pad_id)
        ids = np.where(place < end, self.pairs.tokens[source], rest)
        scored = (place >= prompt) & (place < end)
        batch = {"input_ids": torch.from_numpy(ids.astype(np.int64)), "loss_mask": torch.from_numpy(scored)}
        if self.layout.hide_padding:
            batch["document_ids"] = torch.from_numpy(np.where(place < canvas, 0, -1))
        return batch


class PreferenceDataset:
    """`train` and `validation` rows (PairRows) and what is known of the file.

    attention and block_size: of the model that is to be tuned. `meta` is flat, for logs. ValueError with file and row
    for a bad row, and if nothing is left to train on.
    """

    def __init__(self, config: PreferenceData, tokenizer: PreTrainedTokenizerFast, attention: str, block_size: int):
        tokeniser = PairTokeniser(config.files, tokenizer, config.on_bad_row)
        self.config, self.source = config, tokeniser.source
        arrays, self.meta = tokeniser.open(config.cache_dir)
        pairs = Pairs(**arrays)
        held_out = pairs.held_out(config.val_fraction)
        ids = tokenizer.pad_token_id, tokenizer.mask_token_id
        layout = PairLayout(config.max_seq_len, *ids, block_size, attention != "causal")
        self.train, counts = PairRows.of(pairs, layout, lambda prompts: ~np.isin(prompts, held_out))
        self.validation, others = PairRows.of(pairs, layout, lambda prompts: np.isin(prompts, held_out), by_length=True)
        self.meta |= counts | {
            "equal_replies": counts["equal_replies"] + others["equal_replies"],
            "empty_replies": counts["empty_replies"] + others["empty_replies"],
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "real_token_share": self.train.real_token_share,
        }
        if not len(self.train):
            num_held_out = sum(int(np.isin(pairs.prompts[part], held_out).sum()) for part in stretches(len(pairs)))
            raise ValueError(
                f"{self.source} has nothing to train on: of {self.meta['pairs']:,} pairs, {num_held_out:,} are "
                f"held out by --val-fraction {config.val_fraction}, and of the others one reply is empty, or "
                f"both replies are the same in the first {config.max_seq_len} tokens"
            )

    def describe(self) -> str:
        """Lines for people."""
        meta, train = self.meta, self.train
        bundled = "" if self.config.data else "no --data, so the bundled pairs are used: "
        counts = {name: meta[f"{name}_replies"] for name in ("equal", "empty")}
        left_out = "".join(f" ({count:,} of {name} replies left out)" for name, count in counts.items() if count)
        lines = (
            f"{bundled}{self.source}: {meta['pairs']:,} pairs{left_out}\n"
            f"train {len(train):,} pairs of {train.real_token_share * train.seq_len:.0f} tokens on average; "
            f"{meta['shortened']:,} shortened to {train.seq_len} ({meta['cut_prompts']:,} lost the beginning of the "
            f"prompt, {meta['cut_replies']:,} the end of a reply)\nvalidation {len(self.validation):,} pairs"
        )
        note = note_on_training(self.config.data, "pairs")
        return "\n".join(filter(None, (lines, skipped_line(meta), note)))


def _prompt_hash(pair: Pair) -> int:
    return content_hash(render_chat(pair.prompt, add_generation_prompt=True))


def _chosen_hash(pair: Pair) -> int:
    reply = {"role": "assistant", "content": pair.chosen}
    return content_hash(render_chat([*pair.prompt, reply], add_generation_prompt=False))


def _common_length(first: list[int], second: list[int]) -> int:
    """Number of entries with which both begin."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def _parts(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> Iterator[list[int]]:
    chats = []
    for pair in pairs:
        chats.append([*pair.prompt, {"role": "assistant", "content": pair.chosen}])
        chats.append([{"role": "assistant", "content": pair.rejected}])
    encoded = encode_conversations(tokenizer, chats)
    for chosen, rejected in zip(encoded[::2], encoded[1::2], strict=True):
        begin, end = chosen.replies[-1]
        yield chosen.ids[:begin]
        yield chosen.ids[begin:end]
        yield rejected.ids[slice(*rejected.replies[0])]
