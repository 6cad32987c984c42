"""Likelihood of the documents of a file under a checkpoint of either kind, on the same tokens."""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from dataset.jsonl import read_lines
from dataset.tokenizer import PreTrainedTokenizerFast, encode, fingerprint, load_tokenizer
from model.checkpoint import load_checkpoint, model_of
from model.likelihood import masked_nats, row_nats
from model.transformer import Transformer
from scripts.engine.loader import to_device
from scripts.engine.metrics import or_none
from scripts.engine.run import settings_of
from scripts.engine.runtime import RuntimeConfig, provenance
from scripts.engine.windows import DataEvalConfig, Document, Window, batches, collate, windows_of


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

    def load(self, runtime: RuntimeConfig) -> "Loaded":
        if self.checkpoint is None:
            raise ValueError(
                "--checkpoint is missing: give a file that training wrote, such as weights/<run>_state_dict.pt"
            )
        return load_for_use(self.checkpoint, load_tokenizer(self.tokenizer_dir), self.max_seq_len, runtime)


class Loaded(NamedTuple):
    """A checkpoint ready for use."""

    model: Transformer
    tokenizer: PreTrainedTokenizerFast
    stage: str  # the command that trained it

    @property
    def speaks_chat(self) -> bool:
        """Whether it was trained on conversations, so that a prompt belongs into the chat template."""
        return "sft" in self.stage or "dpo" in self.stage


def load_for_use(path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int, runtime: RuntimeConfig) -> Loaded:
    """ValueError if the file is none of ours, damaged, of another tokenizer or of a shorter context."""
    payload = load_checkpoint(path, runtime.torch_device)
    model = model_of(payload, path, runtime.torch_device, fingerprint(tokenizer))
    model.set_context(max_length)
    return Loaded(model, tokenizer, payload["stage"])


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
            f"{sign}{_with_error(self.nats_per_token, self.standard_error)} nats per token, "
            f"perplexity {sign}{self.perplexity:.2f}, "
            f"{sign}{_with_error(self.bits_per_byte, self.bits_per_byte_error)} bits per byte"
        )


def _with_error(value: float, error: float) -> str:
    """One document alone has no standard error."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} +- {error:.4f}"


def evaluate_file(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    max_length: int,
    runtime: RuntimeConfig,
) -> dict[str, Likelihood]:
    """Likelihood of all documents, and of those in each language ("zh", "other") where the file has both.

    Every token but BOS is scored exactly once, EOS included. A document longer than `max_length` is scored in windows,
    each beginning with the last token of the one before as context.
    """
    documents, windows = windows_of(tokenizer, config, max_length)
    for batch, chosen in batches(windows, tokenizer, config, runtime):
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
    languages = sorted({d.language for d in documents}, reverse=True)
    if len(languages) > 1:
        groups |= {language: [d for d in documents if d.language == language] for language in languages}
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
    _, windows = windows_of(tokenizer, config, max_length)
    nats = count = 0.0
    for batch, _ in batches(windows, tokenizer, config, runtime):
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
    batch = collate([Window(0, condition + answer, 0)], tokenizer.pad_token_id)
    batch["loss_mask"][:, : len(condition)] = False
    with runtime.autocast():
        result = row_nats(model, to_device(batch, runtime.torch_device), num_samples, runtime.seed)
    return {
        "log_likelihood": -float(result.nats),
        "mask_standard_error": or_none(math.sqrt(float(result.variance))),
        "tokens": len(answer),
    }


def _summarise(kind: str, documents: list[Document]) -> Likelihood:
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
    """What a result depends on, for its file: settings, tokenizer, the unpacked data's SHA-256, code, versions."""
    digest = hashlib.sha256()
    for _, line in read_lines(data) if data else ():
        digest.update(line)
    return {
        "settings": settings_of(*configs, runtime),
        "tokenizer": fingerprint(tokenizer),
        "data_sha256": digest.hexdigest() if data else None,
        **provenance(runtime),
    }
