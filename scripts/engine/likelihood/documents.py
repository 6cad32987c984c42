"""The likelihood of the documents or replies of a file, under a checkpoint of either kind, over the same tokens."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from dataset.reading.bad_rows import BadRows
from model.likelihood import draws_masks, masked_nats, row_nats
from model.transformer import Transformer
from scripts.engine.files import or_none
from scripts.engine.likelihood.windows import (
    DIFFUSION,
    DRAWN_MASKS,
    WHOLE_ROWS,
    DataEvalConfig,
    Document,
    ReplyWindows,
    TextCanvas,
    Window,
    batches,
    collate,
    reply_windows,
    report_skipped,
    seed_of,
    windows_of,
)
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Prompt, condition_and_responses, refuse_mask
from scripts.engine.runtime import to_device
from scripts.engine.statistics import ratio_error

Member = TypeVar("Member")
ROWS_PER_PASS = 32  # copies of a single response, under as many masks, in one forward pass


@dataclass(frozen=True)
class Likelihood:
    """Rates over all documents, or over the replies of all conversations. Errors are standard errors. A document or
    reply has one token more than its text: EOS."""

    kind: str  # "exact" or "upper bound"
    documents: int  # or conversations
    tokens: int
    bytes: int
    nats_per_token: float
    standard_error: float  # over documents, of nats_per_token
    mask_standard_error: float  # the part of it that comes from the drawn masks; 0 if exact
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float

    @classmethod
    def of(cls, kind: str, documents: list[Document]) -> "Likelihood":
        """Summarise documents whose nats are known."""
        nats = np.array([d.nats for d in documents])
        tokens = np.array([d.tokens for d in documents], dtype=float)
        size = np.array([d.bytes for d in documents], dtype=float)
        bits = nats / math.log(2)
        rate = nats.sum() / tokens.sum()
        return cls(
            kind=kind,
            documents=len(documents),
            tokens=int(tokens.sum()),
            bytes=int(size.sum()),
            nats_per_token=rate,
            standard_error=ratio_error(nats, tokens),
            mask_standard_error=math.sqrt(sum(d.variance for d in documents)) / tokens.sum(),
            perplexity=math.exp(min(rate, 700)),
            bits_per_byte=bits.sum() / size.sum(),
            bits_per_byte_error=ratio_error(bits, size),
        )

    def line(self, unit: str = "documents") -> str:
        sign = "<= " if self.kind == "upper bound" else ""
        return (
            f"{self.documents:,} {unit}, {self.tokens:,} tokens: "
            f"{sign}{with_error(self.nats_per_token, self.standard_error)} nats per token, "
            f"perplexity {sign}{self.perplexity:.2f}, "
            f"{sign}{with_error(self.bits_per_byte, self.bits_per_byte_error)} bits per byte"
        )

    def as_json(self) -> dict[str, Any]:
        return {name: or_none(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


def with_error(value: float, error: float) -> str:
    """A single document has no standard error."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} +- {error:.4f}"


# -- a file ------------------------------------------------------------------------------------------------------------


def evaluate_file(loaded: Loaded, config: DataEvalConfig, bad: BadRows | None = None) -> dict[str, Likelihood]:
    """Likelihood of all documents, and of those in each language ("zh", "other") if the file has both.

    Every token but BOS is scored exactly once, EOS included. A document longer than the context is scored in windows,
    each beginning with the last token of the one before as context.
    """
    documents, windows = document_windows(loaded, config, bad)
    return likelihoods_of(loaded, documents, windows, config)


def document_windows(
    loaded: Loaded, config: DataEvalConfig, bad: BadRows | None = None
) -> tuple[list[Document], list[Window]]:
    """The documents of a file, and their windows as this model scores them."""
    return windows_of(loaded.tokenizer, config, loaded.max_length, bad, document_canvas(loaded))


def evaluate_documents(loaded: Loaded, config: DataEvalConfig) -> tuple[dict[str, Likelihood], dict[str, Any]]:
    """`evaluate_file` on documents read as in training, and its record for the result file. Reports skipped rows on
    stderr."""
    config, bad = as_trained(config, loaded), BadRows(config.on_bad_row)
    likelihoods = evaluate_file(loaded, config, bad)
    return likelihoods, document_record(likelihoods, config, loaded) | report_skipped(config.eval_data, bad)


def document_record(likelihoods: dict[str, Likelihood], config: DataEvalConfig, loaded: Loaded) -> dict[str, Any]:
    """What a result file says of `evaluate_file`."""
    return {
        "likelihood": as_json(likelihoods),
        "documents_hold_control_tokens": config.control_tokens,
        "documents_ends_given": ends_given(loaded),
    }


def as_trained(config: DataEvalConfig, loaded: Loaded) -> DataEvalConfig:
    """Read documents that spell control tokens as the model's training did."""
    return replace(config, control_tokens=loaded.control_tokens)


def evaluate_replies(
    loaded: Loaded, config: DataEvalConfig, canvas: int, bad: BadRows | None = None
) -> tuple[dict[str, Likelihood], ReplyWindows]:
    """Likelihood of the replies of all conversations, each given all before it in the chat template, by language.

    Every reply token and one EOS per reply are scored. A diffusion model scores a reply on a canvas of `canvas` tokens:
    a canvas of just its length would give away where the reply ends. The fill's nats count, its tokens do not. That
    bounds -log p(reply, EOS, fill), which is no less than -log p(reply, EOS), the event that an autoregressive model is
    scored on. The canvas of a block model ends with a block, whatever `canvas`.
    """
    replies = reply_windows(loaded.tokenizer, config, loaded.max_length, reply_canvas(loaded, canvas), bad)
    return likelihoods_of(loaded, replies.conversations, replies.windows, config), replies


def document_canvas(loaded: Loaded) -> TextCanvas:
    """The canvas on which this model scores a document: whole blocks, if it was trained on whole ones."""
    return TextCanvas(block_size=loaded.model.config.block_size if loaded.whole_blocks else 0)


def ends_given(loaded: Loaded) -> bool:
    """Whether this model is told where a document ends, so that it bounds less than what a chain rule costs."""
    return kind_of(loaded.model) != "exact" and not document_canvas(loaded).block_size


def reply_canvas(loaded: Loaded, size: int) -> TextCanvas:
    """The canvas on which this model scores a reply."""
    config = loaded.model.config
    return TextCanvas(size if config.attention == "full" else 0, config.block_size)


def masked_cross_entropy(loaded: Loaded, config: DataEvalConfig, ratio: float) -> float:
    """Nats per masked token of a file, with `ratio` of the tokens of every window masked; not a likelihood."""
    _, windows = windows_of(loaded.tokenizer, config, loaded.max_length)
    nats = count = 0.0
    for batch, _ in batches(windows, loaded, config):
        with loaded.runtime.autocast():
            result = masked_nats(loaded.model, batch, ratio, loaded.runtime.seed)
        nats, count = nats + float(result.nats.sum()), count + int(result.count.sum())
    return nats / count


def likelihoods_of(
    loaded: Loaded, documents: list[Document], windows: list[Window], config: DataEvalConfig
) -> dict[str, Likelihood]:
    """Likelihood of documents that nothing has scored yet, by language."""
    add_nats(loaded, documents, windows, config)
    groups = by_language(documents, [document.language for document in documents])
    return {name: Likelihood.of(kind_of(loaded.model), members) for name, members in groups.items()}


def add_nats(loaded: Loaded, documents: list[Document], windows: list[Window], config: DataEvalConfig) -> None:
    """Add the nats of the windows, their variance and their tokens to the documents."""
    nats, variance = window_nats(loaded, windows, config)
    for window, window_cost, window_variance in zip(windows, nats.tolist(), variance.tolist(), strict=True):
        document = documents[window.document]
        document.nats += window_cost
        document.variance += window_variance
        document.tokens += len(window.ids) - window.begin - window.fill


def window_nats(loaded: Loaded, windows: list[Window], config: DataEvalConfig) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every window and their variance over the masks drawn, (N,) float64 each."""
    nats, variance = np.zeros(len(windows)), np.zeros(len(windows))
    for batch, numbers in batches(windows, loaded, config):
        copies = max(config.eval_batch_size // len(numbers), 1)
        with loaded.runtime.autocast():
            result = row_nats(loaded.model, batch, config.num_samples, loaded.runtime.seed, copies)
        nats[numbers], variance[numbers] = result.nats.numpy(), result.variance.numpy()
    return nats, variance


def kind_of(model: Transformer) -> str:
    """Exact if the chain rule applies: autoregressive models, and blocks of one token."""
    return "exact" if model.config.autoregressive or model.config.block_size == 1 else "upper bound"


def by_language(members: list[Member], languages: list[str]) -> dict[str, list[Member]]:
    """The members as "all", and those of each language if there are several."""
    groups: dict[str, list[Member]] = {name: [] for name in sorted(set(languages), reverse=True)}
    for member, language in zip(members, languages, strict=True):
        groups[language].append(member)
    return {"all": members} | (groups if len(groups) > 1 else {})


def as_json(likelihoods: dict[str, Likelihood]) -> dict[str, Any]:
    return {name: likelihood.as_json() for name, likelihood in likelihoods.items()}


# -- one response ------------------------------------------------------------------------------------------------------


def response_likelihood(loaded: Loaded, prompt: Prompt, response: str, num_samples: int) -> dict[str, float]:
    """log p(response | prompt) in nats, a lower bound for a diffusion model (LLaDA Eq. 6).

    EOS is not scored. Nothing follows the response, so a diffusion model is told where it ends. ValueError if the
    response is empty, or longer than the context together with the prompt.
    """
    if not response:
        raise ValueError("the response to be scored is empty")
    condition, (answer,) = condition_and_responses(loaded.tokenizer, prompt, [response])
    ids = condition + answer
    refuse_mask(loaded.tokenizer, ids, "what is scored")
    if len(ids) > loaded.max_length:
        raise ValueError(f"prompt and response are {len(ids)} tokens, more than --max-seq-len {loaded.max_length}")
    batch = collate([Window(0, ids, seed_of(ids), len(condition))], loaded.tokenizer.pad_token_id)
    batch = to_device(batch, loaded.runtime.torch_device)
    with loaded.runtime.autocast():
        result = row_nats(loaded.model, batch, num_samples, loaded.runtime.seed, ROWS_PER_PASS)
    return {
        "log_likelihood": -float(result.nats),
        "mask_standard_error": or_none(math.sqrt(float(result.variance))),
        "tokens": len(answer),
    }


def response_line(loaded: Loaded, score: dict[str, float], num_samples: int) -> str:
    """A sentence about a `response_likelihood`."""
    drawn = draws_masks(loaded.model.config)
    error = score["mask_standard_error"]  # None for a single mask
    with_error = f" +- {error:.4f}" if drawn and error is not None else ""
    sign = "=" if kind_of(loaded.model) == "exact" else ">="
    value = f"{score['log_likelihood']:.4f}{with_error} nats"
    masks = f"{num_samples} masks" if drawn else "all masks"
    return f"log p(response | prompt) {sign} {value} ({score['tokens']} tokens, {masks})"


def facts_of_models(*models: Loaded) -> dict[str, bool]:
    """Facts on which flags of likelihoods depend."""
    configs = [loaded.model.config for loaded in models]
    return {
        DIFFUSION: not all(config.autoregressive for config in configs),
        DRAWN_MASKS: any(draws_masks(config) for config in configs),
        WHOLE_ROWS: any(config.attention == "full" for config in configs),
    }
