"""Likelihood of the documents of a file under a checkpoint of either kind, on the same tokens."""

import hashlib
import heapq
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset.jsonl import content_hash, is_validation, open_text, read_documents
from dataset.tokenizer import PreTrainedTokenizerFast, encode, encode_batch, fingerprint, load_tokenizer
from model.checkpoint import load_model
from model.likelihood import masked_nats, row_nats
from model.transformer import Transformer
from scripts.engine.loader import to_device
from scripts.engine.metrics import or_none
from scripts.engine.run import settings_of
from scripts.engine.runtime import RuntimeConfig, provenance

DOCUMENTS_AT_A_TIME = 512


@dataclass(frozen=True)
class CheckpointConfig:
    """The model."""

    checkpoint: Annotated[
        Path | None, "any checkpoint file of a run: <run>_state_dict.pt, <run>_best.pt or <run>.pt"
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the model is given, in tokens", "--seq-len"] = 256

    def __post_init__(self):
        if self.max_seq_len < 2:
            raise ValueError(f"--max-seq-len {self.max_seq_len}: expected at least 2 tokens")

    def load(self, runtime: RuntimeConfig) -> tuple[Transformer, PreTrainedTokenizerFast]:
        if self.checkpoint is None:
            raise ValueError(
                "--checkpoint is missing: give a file that training wrote, such as weights/<run>_state_dict.pt"
            )
        tokenizer = load_tokenizer(self.tokenizer_dir)
        model = load_model(self.checkpoint, runtime.torch_device, tokenizer=fingerprint(tokenizer))
        model.config.require_length(self.max_seq_len, "--max-seq-len")
        model.context_length = self.max_seq_len
        return model, tokenizer


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
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: expected a share from 0 to below 1")


@dataclass(frozen=True)
class Likelihood:
    """Sums over documents; errors are standard errors. One token more than the text has per document: EOS."""

    kind: str  # "exact" or "upper bound"
    documents: int
    tokens: int
    bytes: int
    nats_per_token: float
    standard_error: float  # over documents, of nats_per_token
    mask_standard_error: float  # of that, at most what the drawn masks add; 0 where exact
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float

    def line(self) -> str:
        sign = "<= " if self.kind == "upper bound" else ""
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens: "
            f"{sign}{self.nats_per_token:.4f} +- {self.standard_error:.4f} nats per token, "
            f"perplexity {sign}{self.perplexity:.2f}, "
            f"{sign}{self.bits_per_byte:.4f} +- {self.bits_per_byte_error:.4f} bits per byte"
        )


class Window(NamedTuple):
    """A stretch of a document that fits the context; its first token is given, all others are scored."""

    document: int
    ids: list[int]
    seed: int  # of its masks


@dataclass
class _Document:
    script: str
    bytes: int
    nats: float = 0.0
    variance: float = 0.0
    tokens: int = 0


def evaluate_file(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    max_length: int,
    runtime: RuntimeConfig,
) -> dict[str, Likelihood]:
    """Likelihood of all documents, and of those in each script ("han", "other") where the file has both.

    Every token but BOS is scored exactly once, EOS included. A document longer than `max_length` is scored in windows,
    each beginning with the last token of the one before as context.
    """
    documents, windows = _windows(tokenizer, config, max_length)
    for batch, chosen in _batches(windows, tokenizer, config, runtime):
        with runtime.autocast():
            result = row_nats(model, batch, config.num_samples, runtime.seed)
        for i, nats, variance, count in zip(
            chosen, result.nats.tolist(), result.variance.tolist(), result.count.tolist(), strict=True
        ):
            document = documents[windows[i].document]
            document.nats, document.variance, document.tokens = (
                document.nats + nats,
                document.variance + variance,
                document.tokens + count,
            )
    kind = "exact" if model.config.attention == "causal" else "upper bound"
    groups = {"all": documents}
    scripts = sorted({d.script for d in documents})
    if len(scripts) > 1:
        groups |= {script: [d for d in documents if d.script == script] for script in scripts}
    return {name: _summarise(kind, members) for name, members in groups.items()}


def masked_cross_entropy(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    max_length: int,
    ratio: float,
    runtime: RuntimeConfig,
) -> float:
    """Nats per masked token over the file with `ratio` of the tokens of every window masked; no likelihood."""
    _, windows = _windows(tokenizer, config, max_length)
    nats = count = 0.0
    for batch, _ in _batches(windows, tokenizer, config, runtime):
        with runtime.autocast():
            result = masked_nats(model, batch, ratio, runtime.seed)
        nats, count = nats + float(result.nats.sum()), count + int(result.count.sum())
    return nats / count


def response_likelihood(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    response: str,
    num_samples: int,
    max_length: int,
    runtime: RuntimeConfig,
) -> dict[str, float]:
    """log p(response | BOS, prompt) in nats, a lower bound for a diffusion model (LLaDA Eq. 6); prompt and response are
    tokenised apart. ValueError if the response is empty or both are together longer than `max_length` tokens."""
    condition, answer = [tokenizer.bos_token_id, *encode(tokenizer, prompt)], encode(tokenizer, response)
    if not answer:
        raise ValueError("the response to be scored is empty")
    if len(condition) + len(answer) > max_length:
        raise ValueError(
            f"prompt and response are {len(condition) + len(answer)} tokens, more than --max-seq-len {max_length}"
        )
    batch = _collate([Window(0, condition + answer, 0)], tokenizer.pad_token_id)
    batch["loss_mask"][:, : len(condition)] = False
    with runtime.autocast():
        result = row_nats(model, to_device(batch, runtime.torch_device), num_samples, runtime.seed)
    return {
        "log_likelihood": -float(result.nats),
        "mask_standard_error": or_none(math.sqrt(float(result.variance))),
        "tokens": len(answer),
    }


def _windows(
    tokenizer: PreTrainedTokenizerFast, config: DataEvalConfig, max_length: int
) -> tuple[list[_Document], list[Window]]:
    """Documents and their windows, of all chosen documents or of as many as make eval_max_batches batches."""
    texts = _chosen_texts(config)
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
            documents.append(_Document(script_of(text), len(text.encode("utf-8"))))
    return documents, windows


def _chosen_texts(config: DataEvalConfig) -> list[str]:
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


def _batches(
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
            to_device(_collate([windows[i] for i in chosen], tokenizer.pad_token_id), runtime.torch_device),
            chosen,
        )


def script_of(text: str) -> str:
    """ "han" where at least a fifth of the letters are Chinese characters, else "other"."""
    letters = [c for c in text if c.isalpha()]
    return "han" if letters and sum("\u4e00" <= c <= "\u9fff" for c in letters) >= 0.2 * len(letters) else "other"


def _collate(rows: list[Window], pad_id: int) -> dict[str, torch.Tensor]:
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


def _summarise(kind: str, documents: list[_Document]) -> Likelihood:
    nats = np.array([d.nats for d in documents])
    tokens = np.array([d.tokens for d in documents], dtype=float)
    size = np.array([d.bytes for d in documents], dtype=float)
    bits = nats / math.log(2)
    rate = nats.sum() / tokens.sum()
    return Likelihood(
        kind=kind,
        documents=len(documents),
        tokens=int(tokens.sum()),
        bytes=int(size.sum()),
        nats_per_token=rate,
        standard_error=_ratio_error(nats, tokens),
        mask_standard_error=math.sqrt(sum(d.variance for d in documents)) / tokens.sum(),
        perplexity=math.exp(min(rate, 700)),
        bits_per_byte=bits.sum() / size.sum(),
        bits_per_byte_error=_ratio_error(bits, size),
    )


def _ratio_error(totals: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of totals.sum() / counts.sum() when documents are drawn independently (delta method)."""
    if len(totals) < 2:
        return math.nan
    residuals = totals - counts * (totals.sum() / counts.sum())
    return float(np.sqrt((residuals**2).sum() * len(totals) / (len(totals) - 1)) / counts.sum())


def as_json(result: dict[str, Likelihood]) -> dict[str, Any]:
    return {
        name: {k: or_none(v) if isinstance(v, float) else v for k, v in asdict(value).items()}
        for name, value in result.items()
    }


def circumstances(
    runtime: RuntimeConfig, tokenizer: PreTrainedTokenizerFast, data: Path | None, *configs: Any
) -> dict[str, Any]:
    """What a result depends on, for its file: settings, tokenizer, SHA-256 of the data file, code, versions, device."""
    sha256 = None
    if data:
        open_text(data).close()  # a missing file gets its message here
        with data.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "settings": settings_of(*configs, runtime),
        "tokenizer": fingerprint(tokenizer),
        "data_sha256": sha256,
        **provenance(runtime),
    }
