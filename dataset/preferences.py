"""Preference data: pairs of replies to one prompt in three row formats, and the rows that compare them.

Shapes: P pairs, B of them in a batch, W tokens of its widest row, L = seq_len.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.bundled import bundled_file
from dataset.disk_cache import cached_directory, source_key
from dataset.jsonl import JSON_TYPES, content_hash, open_text, read_rows, text_format
from dataset.order import LengthOrder, RowOrder
from dataset.replies import WIDTH_MULTIPLE, Items, shortened
from dataset.tokenizer import (
    PreTrainedTokenizerFast,
    checked_messages,
    encode_conversations,
    fingerprint,
    render_chat,
)

FORMAT = 1  # counts changes of what the cache files mean; part of the key
CHUNK_ROWS = 2000  # tokenised at a time
ARRAYS = ("tokens", "starts", "prompts", "hashes")
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


def read_pairs(path: Path, observe: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, Pair]]:
    """(row number from 1, pair); ValueError names file and row."""
    for number, row in read_rows(path, observe):
        try:
            yield number, pair_of(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None


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

    def held_out(self, fraction: float) -> np.ndarray:
        """(P,) bool. A pair is held out whose chosen conversation fine-tuning holds out, and every other pair with its
        prompt: no prompt is on both sides. At least one prompt, where there are two."""
        chosen = self.hashes < fraction * 2.0**64
        if fraction > 0 and not chosen.any():
            smallest = np.isin(self.prompts, self.prompts[self.hashes == self.hashes.min()])
            return smallest & ~smallest.all()
        return np.isin(self.prompts, self.prompts[chosen])


@dataclass(frozen=True)
class PairRows:
    """Pairs as rows of seq_len tokens at most, both replies behind the same end of the prompt.

    Where block_size is given, a row goes on behind its EOS as [MASK] to the end of the block: so a block decoder has
    its canvas before it, which does not tell where the reply will end.
    """

    tokens: np.ndarray
    begin: np.ndarray  # (P,) first kept token of the prompt
    middle: np.ndarray  # (P,) one past it, and the chosen reply's first
    rejected: np.ndarray  # (P,) the rejected reply's first
    reply_lengths: np.ndarray  # (2, P) tokens kept of either reply
    seq_len: int
    pad_id: int
    mask_id: int
    block_size: int  # 0: a row ends with its EOS
    hide_padding: bool  # whether padding must be hidden by a mask; a causal model does not see it anyway

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def real_token_share(self) -> float:
        """Tokens of a pair, both rows, as a multiple of seq_len: up to 2."""
        return float(self._canvas(np.arange(len(self))).sum(axis=0).mean()) / self.seq_len if len(self) else 0.0

    def order(self, seed: int, rows_per_step: int) -> LengthOrder:
        return LengthOrder(RowOrder(len(self), seed).visits, self.lengths, len(self), seed, rows_per_step)

    def lengths(self, visits: np.ndarray) -> np.ndarray:
        """Tokens of the longer row of each visit's pair, (B,) int64."""
        return self._canvas(visits % len(self)).max(axis=0)

    def _canvas(self, rows: np.ndarray) -> np.ndarray:
        """(2, B) tokens of the rows, the rest of their last block included."""
        lengths = (self.middle - self.begin)[rows] + self.reply_lengths[:, rows]
        return np.minimum(lengths + (-lengths % self.block_size if self.block_size else 0), self.seq_len)

    def batch(self, visits: np.ndarray) -> dict[str, Tensor]:
        """(2B, W) tensors, the chosen rows before the rejected ones: input_ids int64; loss_mask bool, True on the reply
        and its EOS; document_ids int64, 0 or -1 on padding, where that is to be hidden."""
        rows = np.asarray(visits, dtype=np.int64) % len(self)
        canvas = self._canvas(rows).flatten()
        width = min(-(-int(canvas.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.seq_len)
        ids = np.full((len(canvas), width), self.pad_id, dtype=np.int64)
        scored = np.zeros((len(canvas), width), dtype=bool)
        replies = np.concatenate([self.middle[rows], self.rejected[rows]])
        for place, (row, reply) in enumerate(zip([*rows, *rows], replies, strict=True)):
            prompt = int(self.middle[row] - self.begin[row])
            length = prompt + int(self.reply_lengths[place // len(rows), row])
            ids[place, :prompt] = self.tokens[self.begin[row] : self.middle[row]]
            ids[place, prompt:length] = self.tokens[reply : reply + length - prompt]
            ids[place, length : canvas[place]] = self.mask_id
            scored[place, prompt:length] = True
        batch = {"input_ids": torch.from_numpy(ids), "loss_mask": torch.from_numpy(scored)}
        if self.hide_padding:
            batch["document_ids"] = torch.from_numpy(np.where(np.arange(width) < canvas[:, None], 0, -1))
        return batch


class PreferenceDataset:
    """`train` and `validation` rows (PairRows) and what is known of the file.

    attention and block_size: of the model that is to be tuned. `meta` is flat, for logs. ValueError with file and row
    for a bad row, and if nothing is left to train on.
    """

    def __init__(self, config: PreferenceData, tokenizer: PreTrainedTokenizerFast, attention: str, block_size: int):
        self.config, self.tokenizer, self.source = config, tokenizer, config.source
        self.attention, self.block_size = attention, block_size
        pairs, self.meta = _PairCache(self.source, tokenizer).open(config.cache_dir)
        held_out = pairs.held_out(config.val_fraction)
        self.train, counts = self._rows(pairs, ~held_out)
        self.validation, _ = self._rows(pairs, held_out, by_length=True)
        self.meta |= counts | {
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "real_token_share": self.train.real_token_share,
        }
        if not len(self.train):
            raise ValueError(
                f"{self.source} has nothing to train on: of {self.meta['pairs']:,} pairs, {int(held_out.sum()):,} are "
                f"held out by --val-fraction {config.val_fraction}, and of the others both replies are the same in the "
                f"first {config.max_seq_len} tokens"
            )

    def describe(self) -> str:
        """Lines for people."""
        meta, train = self.meta, self.train
        bundled = "" if self.config.data else "no --data, so the bundled pairs are used: "
        left_out = f" ({meta['equal_replies']:,} of equal replies left out)" if meta["equal_replies"] else ""
        return (
            f"{bundled}{self.source}: {meta['pairs']:,} pairs\n"
            f"train {len(train):,} pairs of {train.real_token_share * train.seq_len:.0f} tokens on average{left_out}; "
            f"{meta['shortened']:,} shortened to {train.seq_len} ({meta['cut_prompts']:,} lost the beginning of the "
            f"prompt, {meta['cut_replies']:,} the end of a reply)\nvalidation {len(self.validation):,} pairs"
        )

    def _rows(self, pairs: Pairs, kept: np.ndarray, by_length: bool = False) -> tuple[PairRows, dict[str, int]]:
        """Rows of the pairs `kept` (P,) bool, and how many were shortened or left out."""
        begin, middle, rejected, end = (pairs.starts[place:][::3][: len(kept)][kept] for place in range(4))
        replies = np.stack([rejected - middle, end - rejected])
        items = shortened(Items(begin, middle, middle + replies.max(axis=0)), self.config.max_seq_len)
        replies = np.minimum(replies, items.end - items.middle)
        equal = np.array(
            [
                chosen == other and np.array_equal(pairs.tokens[a : a + chosen], pairs.tokens[b : b + other])
                for a, b, chosen, other in zip(middle, rejected, *replies, strict=True)
            ],
            dtype=bool,
        )
        order = np.flatnonzero(~equal)
        if by_length:
            order = order[np.argsort(items.lengths[order], kind="stable")]
        rows = PairRows(
            pairs.tokens,
            items.begin[order],
            middle[order],
            rejected[order],
            replies[:, order],
            self.config.max_seq_len,
            self.tokenizer.pad_token_id,
            self.tokenizer.mask_token_id,
            self.block_size,
            self.attention != "causal",
        )
        counts = {"cut_prompts": items.cut_prompts, "cut_replies": items.cut_bodies, "shortened": items.num_shortened}
        return rows, counts | {"equal_replies": int(equal.sum())}


class _PairCache:
    """The tokenised pairs of a file, memory-mapped; made once for a file and a tokenizer."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast):
        self.path, self.tokenizer = path, tokenizer

    def open(self, cache_dir: Path) -> tuple[Pairs, dict[str, Any]]:
        open_text(self.path).close()  # a missing file gets its message here
        key = source_key(self.path, "preferences", FORMAT, fingerprint(self.tokenizer))
        folder = cached_directory(Path(cache_dir), key, self._build, self._fault)
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        return Pairs(**arrays), json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def _build(self, folder: Path) -> None:
        began, digest = time.monotonic(), hashlib.sha256()
        dtype = np.uint16 if len(self.tokenizer) <= 2**16 else np.uint32
        rows, tokens, lengths, prompts, hashes = read_pairs(self.path, digest.update), [], [0], [], []
        while chunk := list(islice(rows, CHUNK_ROWS)):
            parts = self._encoded(chunk)
            tokens.append(np.concatenate([np.asarray(part, dtype=dtype) for part in parts]))
            lengths += map(len, parts)
            for _, pair in chunk:
                reply = {"role": "assistant", "content": pair.chosen}
                prompts.append(content_hash(render_chat(pair.prompt, add_generation_prompt=True)))
                hashes.append(content_hash(render_chat([*pair.prompt, reply], add_generation_prompt=False)))
        np.save(folder / "tokens.npy", np.concatenate(tokens))
        np.save(folder / "starts.npy", np.cumsum(lengths))
        np.save(folder / "prompts.npy", np.array(prompts, dtype=np.uint64))
        np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
        meta = {"pairs": len(hashes), "tokens": sum(lengths), "data_sha256": digest.hexdigest()}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        print(
            f"tokenised {meta['pairs']:,} pairs, {meta['tokens'] / 1e6:.1f}M tokens in "
            f"{time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )

    def _encoded(self, chunk: list[tuple[int, Pair]]) -> list[list[int]]:
        """Prompt, chosen and rejected reply of each pair in turn."""
        try:
            return list(_parts(self.tokenizer, [pair for _, pair in chunk]))
        except ValueError:
            for number, pair in chunk:  # once more, to find out which
                try:
                    list(_parts(self.tokenizer, [pair]))
                except ValueError as error:
                    raise ValueError(f"{self.path}, row {number}: {error}") from None
            raise

    @staticmethod
    def _fault(folder: Path) -> str | None:
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            sizes = {name: len(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
            pairs = meta["pairs"]
            expected = {"tokens": meta["tokens"], "starts": 3 * pairs + 1, "prompts": pairs, "hashes": pairs}
            return None if sizes == expected else "its arrays have the wrong length"
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            return f"unreadable: {error!r}"


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
