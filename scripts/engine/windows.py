"""From the documents of a file to batches that are scored: which documents, cut where, and which masks they meet."""

import heapq
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from tqdm import tqdm

from dataset.jsonl import content_hash, is_validation, language_of, read_documents, text_format
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch
from scripts.engine.loader import to_device
from scripts.engine.runtime import RuntimeConfig

DOCUMENTS_AT_A_TIME = 512


@dataclass(frozen=True)
class DataEvalConfig:
    """Evaluation of a file."""

    eval_data: Annotated[Path | None, "text to evaluate: .jsonl or .txt, either may be .gz"] = None
    jsonl_field: Annotated[str, "field of a JSONL row that holds the document"] = "text"
    eval_split: Annotated[Literal["all", "validation"], "validation: the documents that training held out"] = "all"
    val_fraction: Annotated[float, "their share, as in training"] = 0.005
    eval_batch_size: Annotated[int, "rows per forward pass"] = 32
    eval_max_batches: Annotated[int | None, "evaluate a random sample that fills about so many batches (none: all)"] = (
        None
    )
    num_samples: Annotated[int, "diffusion: masks drawn per row for the bound", "--nmc"] = 16

    def __post_init__(self):
        for name in ("eval_batch_size", "eval_max_batches", "num_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.eval_data is not None and text_format(self.eval_data) == ".txt" and self.jsonl_field != "text":
            raise ValueError(f"--jsonl-field {self.jsonl_field}: {self.eval_data} has no fields; leave the flag out")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: expected a share from 0 to below 1")


class Window(NamedTuple):
    """A stretch of a document that fits the context; its first token is given, all others are scored."""

    document: int
    ids: list[int]
    seed: int  # of its masks


@dataclass
class Document:
    language: str
    bytes: int
    nats: float = 0.0
    variance: float = 0.0
    tokens: int = 0


def windows_of(
    tokenizer: PreTrainedTokenizerFast, config: DataEvalConfig, max_length: int
) -> tuple[list[Document], list[Window]]:
    """Documents and their windows, of all chosen documents or of as many as make eval_max_batches batches."""
    texts = chosen_texts(config)
    enough = (config.eval_max_batches or math.inf) * config.eval_batch_size
    documents, windows = [], []
    for first in range(0, len(texts), DOCUMENTS_AT_A_TIME):
        some = texts[first : first + DOCUMENTS_AT_A_TIME]
        for text, ids in zip(some, encode_batch(tokenizer, some), strict=True):
            if len(windows) >= enough:
                return documents, windows
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            for start in range(0, len(ids) - 1, max_length - 1):
                # Masks follow the text, not its place in the file.
                seed = (content_hash(text) + start) % 2**63
                windows.append(Window(len(documents), ids[start : start + max_length], seed))
            documents.append(Document(language_of(text), len(text.encode("utf-8"))))
    return documents, windows


def chosen_texts(config: DataEvalConfig) -> list[str]:
    """The documents of the split, in order; with eval_max_batches, a random sample of enough of them."""
    texts = (text for text in read_documents(config.eval_data, config.jsonl_field) if text)
    if config.eval_split == "validation":
        texts = _held_out(texts, config.val_fraction)
    if config.eval_max_batches is None:
        chosen = list(texts)
    else:
        # Smallest scrambled hash: the hash itself would prefer the documents that training held out.
        count = config.eval_max_batches * config.eval_batch_size
        chosen = heapq.nsmallest(count, texts, key=lambda text: content_hash(text) * 0x9E3779B97F4A7C15 % 2**64)
    if not chosen:
        if config.eval_split == "validation":
            raise ValueError(
                f"{config.eval_data} has nothing to evaluate: with --val-fraction {config.val_fraction} "
                "training holds out none of its documents"
            )
        raise ValueError(f"{config.eval_data} has nothing to evaluate: all its documents are empty")
    return chosen


def _held_out(texts: Iterable[str], fraction: float) -> Iterator[str]:
    """The documents that training with this --val-fraction holds out: by hash, else those of the smallest hash, where
    others remain; none at 0."""
    smallest, least, found, others = [], 2**64, False, False
    for text in texts:
        if is_validation(text, fraction):
            found = True
            yield text
        elif not found:
            value = content_hash(text)
            others = others or (bool(smallest) and value != least)
            if value < least:
                smallest, least = [], value
            if value == least:
                smallest.append(text)
    if fraction > 0 and not found and others:
        yield from smallest


def batches(
    windows: list[Window],
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    runtime: RuntimeConfig,
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """(batch on the device, numbers of its windows), windows of similar length together, so that little is padding."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    for first in tqdm(range(0, len(order), config.eval_batch_size), unit="batch", disable=not sys.stderr.isatty()):
        chosen = order[first : first + config.eval_batch_size]
        yield (
            to_device(collate([windows[i] for i in chosen], tokenizer.pad_token_id), runtime.torch_device),
            chosen,
        )


def collate(rows: list[Window], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch in which all but each row's first token is scored; `row_ids` (B,) seed the rows' masks."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    place = torch.arange(int(lengths.max()))
    real = place < lengths[:, None]
    input_ids = torch.full(real.shape, pad_id)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids)] = torch.tensor(row.ids)
    return {
        "input_ids": input_ids,
        "loss_mask": real & (place > 0),
        "document_ids": real.long() - 1,
        "row_ids": torch.tensor([row.seed for row in rows]),
    }
