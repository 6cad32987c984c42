"""From the rows of a file to batches that are scored: which rows, where they are cut, and the seeds of their masks."""

import heapq
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from dataset.content import content_hash, is_validation, language_of
from dataset.reading.bad_rows import BadRows, OnBadRow, skipped_line
from dataset.reading.documents import read_documents
from dataset.reading.files import is_plain_text
from dataset.reading.rows import Check
from dataset.rows.formats import read_conversations
from dataset.rows.messages import is_learnt
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch, encode_conversations, render_chat
from scripts.engine.loaded import Loaded
from scripts.engine.runtime import to_device

ROWS_AT_A_TIME = 512  # tokenised together

# What models are, for the flags that depend on it.
DIFFUSION = "a diffusion model"
DRAWN_MASKS = "masks to be drawn: of blocks of up to 4 tokens all are tried"
WHOLE_ROWS = "a model of whole rows: a block ends the canvas"

Row = TypeVar("Row")


@dataclass(frozen=True)
class DataEvalConfig:
    """Evaluation of a file."""

    eval_data: Annotated[Path | None, "what to evaluate: a file of rows or plain text"] = None
    jsonl_field: Annotated[str, "field of a row that holds the document", "with --eval-data", "with rows of text"] = (
        "text"
    )
    eval_split: Annotated[
        Literal["all", "validation"],
        "validation: the rows that training held out",
        "with --eval-data",
        "without multiple choice",
    ] = "all"
    val_fraction: Annotated[float, "their share, as in training", "in [0, 1)", "with --eval-split validation"] = 0.005
    eval_batch_size: Annotated[int, "rows per forward pass", "at least 1", "with --eval-data"] = 32
    eval_max_batches: Annotated[
        int | None,
        "evaluate a random sample that fills about so many batches (none: all)",
        "at least 1",
        "with --eval-data",
    ] = None
    num_samples: Annotated[
        int,
        "masks drawn per row for the bound",
        "--nmc",
        "at least 1",
        "with --eval-data",
        f"with {DIFFUSION}",
        f"with {DRAWN_MASKS}",
    ] = 16
    on_bad_row: Annotated[OnBadRow, "with --eval-data"] = "error"
    control_tokens: bool = False  # documents that spell control tokens hold them, as in the training of the model

    def __post_init__(self):
        if self.eval_data is not None and is_plain_text(self.eval_data) and self.jsonl_field != "text":
            raise ValueError(f"--jsonl-field {self.jsonl_field}: {self.eval_data} has no fields; leave the flag out")

    @property
    def max_windows(self) -> float:
        """The number of windows that fill the batches; infinity: all."""
        return math.inf if self.eval_max_batches is None else self.eval_max_batches * self.eval_batch_size


class Window(NamedTuple):
    """Tokens that fit the context: those before `begin` are given, all others are scored."""

    document: int
    ids: list[int]
    seed: int  # of its masks
    begin: int = 1
    fill: int = 0  # scored tokens at the end that count as none


@dataclass
class Document:
    """A document, or the replies of a conversation, and what scoring adds to it."""

    language: str
    bytes: int
    nats: float = 0.0
    variance: float = 0.0
    tokens: int = 0


# -- which rows --------------------------------------------------------------------------------------------------------


def chosen_texts(config: DataEvalConfig, check: Check = str, bad: BadRows | None = None) -> list[str]:
    """The documents of the split, in order, or the sample that eval_max_batches asks for; texts that fail `check` are
    bad rows."""
    texts = read_documents(config.eval_data, config.jsonl_field, bad or BadRows(config.on_bad_row), check)
    chosen = chosen_rows((text for text in texts if text), config, str)
    if not chosen:
        raise ValueError(f"{config.eval_data} has nothing to evaluate: all its documents are empty")
    return chosen


def chosen_rows(rows: Iterable[Row], config: DataEvalConfig, content: Callable[[Row], str]) -> list[Row]:
    """The rows of the split, in order; with eval_max_batches, a random sample of at most as many as fill the batches.
    `content` identifies a row."""
    if config.eval_split == "validation":
        rows = _held_out(rows, config.val_fraction, content)
    if config.eval_max_batches is None:
        chosen = list(rows)
    else:
        # Smallest scrambled hash: the hash itself would prefer the documents that training held out.
        count = config.eval_max_batches * config.eval_batch_size
        chosen = heapq.nsmallest(count, rows, key=lambda row: scrambled(content_hash(content(row))))
    if not chosen and config.eval_split == "validation":
        raise ValueError(
            f"{config.eval_data} has nothing to evaluate: with --val-fraction {config.val_fraction} "
            "training holds out none of its rows"
        )
    return chosen


def scrambled(value: int) -> int:
    """A hash of a hash, whose smallest values are a random sample."""
    return value * 0x9E3779B97F4A7C15 % 2**64


def _held_out(rows: Iterable[Row], fraction: float, content: Callable[[Row], str]) -> Iterator[Row]:
    """The rows that training with this --val-fraction holds out: those of a small hash; if there are none, those of the
    smallest, provided that other rows remain; none at 0."""
    smallest, least, any_held_out, others = [], 2**64, False, False
    for row in rows:
        text = content(row)
        if is_validation(text, fraction):
            any_held_out = True
            yield row
        elif not any_held_out:
            value = content_hash(text)
            others = others or (bool(smallest) and value != least)
            if value < least:
                smallest, least = [], value
            if value == least:
                smallest.append(row)
    if fraction > 0 and not any_held_out and others:
        yield from smallest


def report_skipped(path: Path, bad: BadRows) -> dict[str, Any]:
    """Print on stderr how many bad rows of `path` were skipped, and return the record for the result file."""
    if bad.count:
        print(f"{path}: {skipped_line(bad.meta)}", file=sys.stderr)
    return bad.meta


# -- where they are cut ------------------------------------------------------------------------------------------------


class TextCanvas(NamedTuple):
    """What a text stands on: `size` tokens, or the rest of its last block; 0 and 0: its own length."""

    size: int = 0
    block_size: int = 0

    def fill(self, begin: int, end: int) -> int:
        """Tokens that the canvas has left after a text from `begin` to `end`; negative if the text is longer."""
        return -end % self.block_size if self.block_size else self.size - (end - begin)


OWN_LENGTH = TextCanvas()


def windows_of(
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    max_length: int,
    bad: BadRows | None = None,
    canvas: TextCanvas = OWN_LENGTH,
) -> tuple[list[Document], list[Window]]:
    """Documents and their windows: of all chosen documents, or of as many as fill eval_max_batches batches.

    The last window of a document ends with EOS, and behind it with those that fill the canvas, which are scored but not
    counted. Without them a diffusion model is told where the text ends, a block model within its last block.
    """
    texts = chosen_texts(config, spelling_check(tokenizer, config.control_tokens), bad)
    documents, windows = [], []
    for text, ids in _encoded(texts, lambda some: encode_batch(tokenizer, some, config.control_tokens)):
        if len(windows) >= config.max_windows:
            break
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, max_length - 1):
            # The masks follow the text, not its place in the file.
            seed = (content_hash(text) + start) % 2**63
            some = ids[start : start + max_length]
            fill = max(min(canvas.fill(1, len(some)), max_length - len(some)), 0)  # none but in the last
            windows.append(Window(len(documents), some + [tokenizer.eos_token_id] * fill, seed, 1, fill))
        documents.append(Document(language_of(text), len(text.encode("utf-8"))))
    return documents, windows


def _encoded(rows: list[Row], encode: Callable[[list[Row]], Iterable[Any]]) -> Iterator[tuple[Row, Any]]:
    """Each row with its encoding; only as many rows are encoded as are taken, give or take a group."""
    for first in tqdm(range(0, len(rows), ROWS_AT_A_TIME), "tokenising", disable=None, leave=False):
        some = rows[first : first + ROWS_AT_A_TIME]
        yield from zip(some, encode(some), strict=True)


class ReplyWindows(NamedTuple):
    """The replies of a file's conversations, one to a window, each given all before it."""

    conversations: list[Document]
    windows: list[Window]
    too_long: int  # replies left out because they end after the context
    empty: int  # replies left out because they have no text
    unfilled: int  # replies scored on a canvas without room for more, so that where they end is given away


def reply_windows(
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    max_length: int,
    canvas: TextCanvas,
    bad: BadRows | None = None,
) -> ReplyWindows:
    """Replies with their EOS, each on a canvas: `size` tokens for a model of whole rows; for a block model up to the
    end of the block in which the reply ends, counted from the beginning of the conversation, because later blocks are
    never seen. The context may cut the canvas. What is left of it is EOS, which is scored but not counted. ValueError
    if nothing can be scored."""
    read = read_conversations(config.eval_data, None, bad or BadRows(config.on_bad_row), spelling_check(tokenizer))
    chats = chosen_rows((chat for _, chat in read), config, lambda messages: render_chat(messages, False))
    conversations, windows, too_long, empty, unfilled = [], [], 0, 0, 0
    for messages, (ids, spans) in _encoded(chats, lambda some: encode_conversations(tokenizer, some)):
        if len(windows) >= config.max_windows:
            break
        replies = [message["content"] for message in messages if is_learnt(message)]
        scored = []
        for reply, (begin, end) in zip(replies, spans, strict=True):
            if not reply or end > max_length:
                empty += not reply
                too_long += bool(reply)
                continue
            scored.append(reply)
            wanted = canvas.fill(begin, end)
            fill = max(min(wanted, max_length - end), 0)
            unfilled += not fill and (wanted > 0 or not canvas.block_size)
            canvas_ids = ids[:end] + [tokenizer.eos_token_id] * fill
            windows.append(Window(len(conversations), canvas_ids, seed_of(ids[:end]), begin, fill))
        if scored:
            conversations.append(Document(language_of("\n".join(scored)), sum(len(r.encode("utf-8")) for r in scored)))
    if not windows:
        raise ValueError(
            f"{config.eval_data} has nothing to evaluate: of its replies {empty} are empty and {too_long} do not fit "
            f"--max-seq-len {max_length}"
        )
    return ReplyWindows(conversations, windows, too_long, empty, unfilled)


def seed_of(ids: list[int]) -> int:
    """The seed of a window's masks: a function of its content, not of its place in the file nor its fill."""
    return content_hash(" ".join(map(str, ids))) % 2**63


# -- batches -----------------------------------------------------------------------------------------------------------


def batches(
    windows: list[Window], loaded: Loaded, config: DataEvalConfig
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """(batch on the device, numbers of its windows). Windows of similar length share a batch, so that little is
    padding; those that score a single token come apart, because one mask is enough for them."""
    order = sorted(range(len(windows)), key=lambda i: (len(windows[i].ids) - windows[i].begin > 1, len(windows[i].ids)))
    for first in tqdm(range(0, len(order), config.eval_batch_size), unit="batch", disable=not sys.stderr.isatty()):
        numbers = order[first : first + config.eval_batch_size]
        batch = collate([windows[i] for i in numbers], loaded.tokenizer.pad_token_id)
        yield to_device(batch, loaded.runtime.torch_device), numbers


def collate(rows: list[Window], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch in which each row is scored from its `begin` on; `row_ids` (B,) seed the rows' masks, `fill` (B, L)
    is what is scored but is no text."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    begins = torch.tensor([row.begin for row in rows])
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]
    input_ids = torch.full(real.shape, pad_id)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids)] = torch.tensor(row.ids)
    return {
        "input_ids": input_ids,
        "loss_mask": real & (columns >= begins[:, None]),
        "document_ids": real.long() - 1,
        "fill": real & (columns >= lengths[:, None] - torch.tensor([row.fill for row in rows])[:, None]),
        "row_ids": torch.tensor([row.seed for row in rows]),
    }
