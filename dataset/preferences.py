"""Preference data: pairs of replies to one prompt in three row formats, and the rows that compare them.

Of a row no more is held in memory than the number of its pair.
Shapes: P pairs, B of them in a batch, W tokens of its widest row, L = seq_len.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.cache import ArrayFiles, cached_arrays, stretches
from dataset.corpus.bundled import bundled_file
from dataset.jsonl import (
    JSON_TYPES,
    BadRows,
    Check,
    OnBadRow,
    chunked,
    content_hash,
    open_text,
    read_as,
    text_format,
    told_skipped,
)
from dataset.order import LengthOrder, RowOrder
from dataset.replies import WIDTH_MULTIPLE, Items, shortened
from dataset.spelling import spelling_check
from dataset.tokenizer import (
    PreTrainedTokenizerFast,
    checked_messages,
    encode_conversations,
    fingerprint,
    render_chat,
    token_dtype,
)

FORMAT = 3  # counts changes of what the cache files mean; part of the key
CHUNK_CHARACTERS = 1_000_000  # of pairs tokenised at a time
TEMPLATE_CHARACTERS = 30  # that a message has around it, about
EXPECTED = "chosen + rejected as two conversations, or as replies to prompt or messages"

Messages = list[dict[str, str]]


class Pair(NamedTuple):
    prompt: Messages
    chosen: str
    rejected: str


def pair_of(row: dict[str, Any]) -> Pair:
    """The prompt of a row and the two replies to it. ValueError: no known format, or no proper pair.

    Where chosen and rejected are conversations, they hold the prompt, and other fields are not read.
    """
    if not {"chosen", "rejected"} <= row.keys():
        raise ValueError(f"expected the fields of a pair ({EXPECTED}); fields present: {', '.join(row) or 'none'}")
    sides = {name: row[name] for name in ("chosen", "rejected")}
    if any(isinstance(side, list) for side in sides.values()):
        conversations = {name: _conversation(name, side) for name, side in sides.items()}
        prompt, other = (messages[:-1] for messages in conversations.values())
        if [*map(_role_and_content, prompt)] != [*map(_role_and_content, other)]:
            raise ValueError("chosen and rejected differ before their last message; expected two replies to one prompt")
        sides = {name: messages[-1] for name, messages in conversations.items()}
    elif "messages" in row:
        prompt = row["messages"]
        if not isinstance(prompt, list):
            raise ValueError(f'field "messages" is {JSON_TYPES[type(prompt)]}, expected an array of messages')
        checked_messages(prompt)
    elif "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ValueError(f'field "prompt" is {JSON_TYPES[type(row["prompt"])]}, expected a string')
        prompt = [{"role": "user", "content": row["prompt"]}]
    else:
        raise ValueError(f"chosen and rejected stand without a prompt; expected {EXPECTED}")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt must be a conversation that ends before the assistant's reply")
    return Pair(prompt, *(_reply(name, side) for name, side in sides.items()))


def _conversation(name: str, messages: Any) -> Messages:
    if not isinstance(messages, list):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(messages)]}, the other one an array; expected two arrays')
    try:
        checked_messages(messages)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return messages


def _role_and_content(message: dict[str, str]) -> tuple[str, str]:
    return message["role"], message["content"]


def _reply(name: str, reply: Any) -> str:
    """The content of a reply, which is a string or the assistant's message."""
    if isinstance(reply, dict):
        ((role, content),) = checked_messages([reply])
        if role != "assistant":
            raise ValueError(f"{name} ends with a message of role {role!r}; expected the assistant's reply")
        return content
    if not isinstance(reply, str):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(reply)]}, expected a string or a message')
    return reply


def read_pairs(
    path: Path,
    observe: Callable[[bytes], object] | None = None,
    bad: BadRows | None = None,
    check: Check = str,
) -> Iterator[tuple[int, Pair]]:
    """(row number from 1, pair) as `read_as`; a row is bad of whose contents check(content) raises ValueError, too."""

    def pair(row: dict[str, Any]) -> Pair:
        made = pair_of(row)
        for content in contents_of(made):
            check(content)
        return made

    return read_as(path, pair, observe, bad)


def contents_of(pair: Pair) -> list[str]:
    """The contents of its prompt, and both replies."""
    return [*(message["content"] for message in pair.prompt), pair.chosen, pair.rejected]


@dataclass(frozen=True)
class PreferenceData:
    """Where the pairs are and how they become rows; every field is a flag. ValueError on impossible values."""

    data: Annotated[
        Path | None,
        "pairs of replies: JSONL, may be .gz; rows of chosen and rejected, as conversations or as replies to prompt or "
        "messages (none: the bundled ones)",
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest prompt and reply together, in tokens; more is shortened", "--seq-len"] = 512
    val_fraction: Annotated[float, "share of pairs held out for validation, 0 to below 1, by content hash"] = 0.05
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time"] = Path("dataset/.cache")
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        if self.max_seq_len < 16:
            raise ValueError(f"--max-seq-len {self.max_seq_len}: expected at least 16 tokens per row")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: expected a share from 0 to below 1")
        if self.data is not None and text_format(self.data) != ".jsonl":
            raise ValueError(f"--data {self.data}: expected JSONL rows, one pair each")

    @property
    def source(self) -> Path:
        """--data, or without it the bundled pairs, which are written into the cache first."""
        return self.data or bundled_file("preferences", self.cache_dir)


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs back to back: prompt and open assistant turn, chosen reply and EOS, rejected reply and EOS."""

    tokens: np.ndarray  # (T,) of all pairs
    starts: np.ndarray  # (3P + 1,) where each of the three parts begins, and the end
    prompts: np.ndarray  # (P,) uint64, content_hash of the prompt
    hashes: np.ndarray  # (P,) uint64, content_hash of the prompt with the chosen reply, as in fine-tuning
    common: np.ndarray  # (P,) int64, with how many tokens both replies begin alike

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> "Pairs":
        parts = list(_parts(tokenizer, pairs))
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return cls(
            np.fromiter(chain.from_iterable(parts), token_dtype(tokenizer), lengths.sum()),
            np.append(0, np.cumsum(lengths)),
            *(np.array([*map(hashed, pairs)], dtype=np.uint64) for hashed in (_prompt_hash, _chosen_hash)),
            np.array([*map(_alike, parts[1::3], parts[2::3])], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def held_out(self, fraction: float) -> np.ndarray:
        """Hashes of the prompts that are held out, ascending. A pair is held out whose chosen conversation fine-tuning
        holds out, and every other pair with its prompt: no prompt is on both sides. At least one prompt, where there
        are two."""
        if fraction > 0 and not (smallest := self.hashes.min()) < fraction * 2.0**64:
            found = self._prompts(lambda hashes: hashes == smallest)
            others = any(not is_in(self.prompts[pairs], found).all() for pairs in stretches(len(self)))
            return found if others else found[:0]
        return self._prompts(lambda hashes: hashes < fraction * 2.0**64)

    def _prompts(self, chosen: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Hashes of the prompts of the pairs of whose hashes chosen(hashes) is True, ascending."""
        parts = [np.unique(self.prompts[pairs[chosen(self.hashes[pairs])]]) for pairs in stretches(len(self))]
        return np.unique(np.concatenate(parts))


def is_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which of the values (B,) are among the others, (B,) bool."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    return ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values


class PairItems(NamedTuple):
    """Pairs as they are shown."""

    rows: Items  # the prompt and the longer reply
    rejected: np.ndarray  # (B,) the rejected reply's first token
    replies: np.ndarray  # (2, B) tokens kept of either reply


def items_of(pairs: Pairs, chosen: np.ndarray, seq_len: int) -> PairItems:
    """Those of the pairs `chosen` (B,), shortened: both replies behind the same end of the prompt."""
    begin, middle, rejected, end = (pairs.starts[3 * chosen + place] for place in range(4))
    replies = np.stack([rejected - middle, end - rejected])
    rows = shortened(Items(begin, middle, middle + replies.max(axis=0)), seq_len)
    return PairItems(rows, rejected, np.minimum(replies, rows.end - rows.middle))


def equal_replies(pairs: Pairs, chosen: np.ndarray, items: PairItems) -> np.ndarray:
    """Of which of the pairs `chosen` (B,) both replies are the same as they are shown, (B,) bool."""
    first, other = items.replies
    return (first == other) & (pairs.common[chosen] >= first)


@dataclass(frozen=True)
class PairRows:
    """Pairs as rows of seq_len tokens at most, both replies behind the same end of the prompt.

    Where block_size is given, a row goes on behind its EOS as [MASK] to the end of the block: so a block decoder has
    its canvas before it, which does not tell where the reply will end.
    """

    pairs: Pairs
    chosen: np.ndarray  # (N,) int64, the pair of each row
    seq_len: int
    pad_id: int
    mask_id: int
    block_size: int  # 0: a row ends with its EOS
    hide_padding: bool  # whether padding must be hidden by a mask; a causal model does not see it anyway

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def real_token_share(self) -> float:
        """Tokens of a pair, both rows, as a multiple of seq_len: up to 2."""
        total = sum(int(self._canvas(self.items(rows)).sum()) for rows in stretches(len(self)))
        return total / len(self) / self.seq_len if len(self) else 0.0

    def items(self, rows: np.ndarray) -> PairItems:
        return items_of(self.pairs, self.chosen[rows], self.seq_len)

    def order(self, seed: int, rows_per_step: int) -> LengthOrder:
        return LengthOrder(RowOrder(len(self), seed).visits, self.lengths, len(self), seed, rows_per_step)

    def lengths(self, visits: np.ndarray) -> np.ndarray:
        """Tokens of the longer row of each visit's pair, (B,) int64."""
        return self._canvas(self.items(visits % len(self))).max(axis=0)

    def _canvas(self, items: PairItems) -> np.ndarray:
        """(2, B) tokens of the rows, the rest of their last block included."""
        lengths = items.rows.middle - items.rows.begin + items.replies
        return np.minimum(lengths + (-lengths % self.block_size if self.block_size else 0), self.seq_len)

    def batch(self, visits: np.ndarray) -> dict[str, Tensor]:
        """(2B, W) tensors, the chosen rows before the rejected ones: input_ids int64; loss_mask bool, True on the reply
        and its EOS; document_ids int64, 0 or -1 on padding, where that is to be hidden."""
        (prompts, rejected, replies) = items = self.items(np.asarray(visits, dtype=np.int64) % len(self))
        canvas = self._canvas(items).reshape(-1, 1)
        width = min(-(-int(canvas.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.seq_len)
        place = np.arange(width)
        prompt = np.tile(prompts.middle - prompts.begin, 2)[:, None]
        begin, reply = np.tile(prompts.begin, 2)[:, None], np.append(prompts.middle, rejected)[:, None]
        end = prompt + replies.reshape(-1, 1)
        # Positions behind the row's end are mask or padding, whatever is read for them; they must only exist.
        source = np.minimum(np.where(place < prompt, begin, reply - prompt) + place, len(self.pairs.tokens) - 1)
        ids = np.where(place < end, self.pairs.tokens[source], np.where(place < canvas, self.mask_id, self.pad_id))
        scored = (place >= prompt) & (place < end)
        batch = {"input_ids": torch.from_numpy(ids.astype(np.int64)), "loss_mask": torch.from_numpy(scored)}
        if self.hide_padding:
            batch["document_ids"] = torch.from_numpy(np.where(place < canvas, 0, -1))
        return batch


class PreferenceDataset:
    """`train` and `validation` rows (PairRows) and what is known of the file.

    attention and block_size: of the model that is to be tuned. `meta` is flat, for logs. ValueError with file and row
    for a bad row, and if nothing is left to train on.
    """

    def __init__(self, config: PreferenceData, tokenizer: PreTrainedTokenizerFast, attention: str, block_size: int):
        self.config, self.tokenizer, self.source = config, tokenizer, config.source
        self.attention, self.block_size = attention, block_size
        pairs, self.meta = self._pairs()
        held_out = pairs.held_out(config.val_fraction)
        self.train, counts = self._rows(pairs, lambda prompts: ~is_in(prompts, held_out))
        self.validation, others = self._rows(pairs, lambda prompts: is_in(prompts, held_out), by_length=True)
        self.meta |= counts | {
            "equal_replies": counts["equal_replies"] + others["equal_replies"],
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "real_token_share": self.train.real_token_share,
        }
        if not len(self.train):
            num_held_out = sum(int(is_in(pairs.prompts[some], held_out).sum()) for some in stretches(len(pairs)))
            raise ValueError(
                f"{self.source} has nothing to train on: of {self.meta['pairs']:,} pairs, {num_held_out:,} are "
                f"held out by --val-fraction {config.val_fraction}, and of the others both replies are the same in the "
                f"first {config.max_seq_len} tokens"
            )

    def describe(self) -> str:
        """Lines for people."""
        meta, train = self.meta, self.train
        bundled = "" if self.config.data else "no --data, so the bundled pairs are used: "
        left_out = f" ({meta['equal_replies']:,} of equal replies left out)" if meta["equal_replies"] else ""
        told = (
            f"{bundled}{self.source}: {meta['pairs']:,} pairs{left_out}\n"
            f"train {len(train):,} pairs of {train.real_token_share * train.seq_len:.0f} tokens on average; "
            f"{meta['shortened']:,} shortened to {train.seq_len} ({meta['cut_prompts']:,} lost the beginning of the "
            f"prompt, {meta['cut_replies']:,} the end of a reply)\nvalidation {len(self.validation):,} pairs"
        )
        return "\n".join(filter(None, (told, told_skipped(meta))))

    def _rows(
        self, pairs: Pairs, kept: Callable[[np.ndarray], np.ndarray], by_length: bool = False
    ) -> tuple[PairRows, dict[str, int]]:
        """Rows of the pairs of whose prompts' hashes kept(hashes) is True, and how many were shortened or left out."""
        seq_len, parts, counts = self.config.max_seq_len, [np.empty(0, dtype=np.int64)], np.zeros(4, dtype=np.int64)
        for some in stretches(len(pairs)):
            some = some[kept(pairs.prompts[some])]
            items = items_of(pairs, some, seq_len)
            rows, equal = items.rows, equal_replies(pairs, some, items)
            parts.append(some[~equal])
            counts += [rows.cut_prompts, rows.cut_bodies, rows.num_shortened, equal.sum()]
        order = np.concatenate(parts)
        if by_length:
            order = order[np.argsort(items_of(pairs, order, seq_len).rows.lengths, kind="stable")]
        ids = self.tokenizer.pad_token_id, self.tokenizer.mask_token_id
        made = PairRows(pairs, order, seq_len, *ids, self.block_size, self.attention != "causal")
        names = "cut_prompts", "cut_replies", "shortened", "equal_replies"
        return made, dict(zip(names, counts.tolist(), strict=True))

    def _pairs(self) -> tuple[Pairs, dict[str, Any]]:
        """Those of the file, mapped, and what is known of them; tokenised into the cache unless they are there."""
        open_text(self.source).close()  # a missing file gets its message here
        options = "preferences", FORMAT, fingerprint(self.tokenizer), self.config.on_bad_row
        hashes = {"prompts": np.uint64, "hashes": np.uint64}
        dtypes = {"tokens": token_dtype(self.tokenizer), "starts": np.int64, **hashes, "common": np.int64}
        arrays, meta = cached_arrays(self.source, self.config.cache_dir, options, dtypes, self._tokenise)
        return Pairs(**arrays), meta

    def _tokenise(self, files: ArrayFiles) -> dict[str, Any]:
        """Append the file's pairs, a chunk at a time; returns what is to be known of them."""
        began, digest, bad = time.monotonic(), hashlib.sha256(), BadRows(self.config.on_bad_row)
        files.append("starts", np.zeros(1, dtype=np.int64))
        rows = read_pairs(self.source, digest.update, bad, spelling_check(self.tokenizer))
        for chunk in chunked(rows, _size, CHUNK_CHARACTERS):
            pairs = Pairs.of(self.tokenizer, [pair for _, pair in chunk])
            files.append("starts", files.lengths["tokens"] + pairs.starts[1:])
            for name in ("tokens", "prompts", "hashes", "common"):
                files.append(name, getattr(pairs, name))
        meta = {"pairs": files.lengths["hashes"], "tokens": files.lengths["tokens"]}
        meta |= bad.meta | {"data_sha256": digest.hexdigest()}
        print(
            f"tokenised {meta['pairs']:,} pairs, {meta['tokens'] / 1e6:.1f}M tokens in "
            f"{time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )
        return meta


def _size(numbered: tuple[int, Pair]) -> int:
    """Characters of a pair, about."""
    return sum(len(content) + TEMPLATE_CHARACTERS for content in contents_of(numbered[1]))


def _prompt_hash(pair: Pair) -> int:
    return content_hash(render_chat(pair.prompt, add_generation_prompt=True))


def _chosen_hash(pair: Pair) -> int:
    reply = {"role": "assistant", "content": pair.chosen}
    return content_hash(render_chat([*pair.prompt, reply], add_generation_prompt=False))


def _alike(first: list[int], second: list[int]) -> int:
    """With how many entries both begin."""
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
