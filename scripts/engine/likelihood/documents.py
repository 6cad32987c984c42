"""Likelihood of the documents or replies of a file under a checkpoint of any kind, on the same tokens."""

import hashlib
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np

from dataset.jsonl import BadRows, read_lines
from dataset.tokenizer import PreTrainedTokenizerFast, encode, encode_batch, encode_chat, fingerprint, load_tokenizer
from model.checkpoint import load_checkpoint, model_of
from model.likelihood import draws_masks, masked_nats, row_nats
from model.transformer import Transformer
from scripts.engine.flags import settings_of
from scripts.engine.likelihood.windows import (
    DataEvalConfig,
    Document,
    ReplyWindows,
    Window,
    batches,
    collate,
    reply_windows,
    seed_of,
    tell_skipped,
    windows_of,
)
from scripts.engine.runtime import RuntimeConfig, provenance
from scripts.engine.statistics import ratio_error
from scripts.engine.training.loader import to_device
from scripts.engine.training.metrics import or_none

Member = TypeVar("Member")
ROWS_PER_PASS = 32  # copies of a single response, under as many masks, in one forward pass


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
    path: Path | None = None  # none: it was never saved
    sha256: str | None = None  # of the file
    control_tokens: bool = False  # it was pretrained on documents that hold the control tokens that they spell

    @property
    def file(self) -> dict[str, Any]:
        """Which file was judged, for that of the result."""
        return {"checkpoint": str(self.path), "sha256": self.sha256, "stage": self.stage}

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "autoregressive" if self.model.config.autoregressive else "diffusion"

    @property
    def attention(self) -> dict[str, Any]:
        """Who sees whom, and the tokens of a block (0: there are none), as the files of results say it."""
        return {name: getattr(self.model.config, name) for name in ("attention", "block_size")}

    @property
    def described(self) -> str:
        """The kind, and the block size where there is one."""
        size = self.model.config.block_size
        return f"{self.kind} in blocks of {size} token{'s' * (size > 1)}" if size else self.kind

    @property
    def speaks_chat(self) -> bool:
        """Whether it was trained on conversations, so that a prompt belongs into the chat template."""
        return "sft" in self.stage or "dpo" in self.stage


def load_for_use(path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int, runtime: RuntimeConfig) -> Loaded:
    """ValueError if the file is none of ours, damaged, of another tokenizer or of a shorter context."""
    payload = load_checkpoint(path, runtime.torch_device)
    model = model_of(payload, path, runtime.torch_device, fingerprint(tokenizer))
    model.set_context(max_length)
    settings = payload.get("settings", {})
    trained = settings.get("max_seq_len")
    if trained and max_length > trained:
        print(
            f"note: {path} was trained on at most {trained} tokens; --max-seq-len {max_length} goes beyond",
            file=sys.stderr,
        )
    return Loaded(model, tokenizer, payload["stage"], path, payload.sha256, bool(settings.get("control_tokens")))


KINDS = {"autoregressive": "--minimind-checkpoint", "diffusion": "--diffusion-checkpoint"}  # and the flag of each
COMMANDS = {"autoregressive": "scripts.eval.eval_minimind", "diffusion": "scripts.eval.eval_diffusion"}


def load_kind(
    path: Path, kind: str, tokenizer: PreTrainedTokenizerFast, max_length: int, runtime: RuntimeConfig
) -> Loaded:
    """`load_for_use` where a flag says of which kind a checkpoint is; ValueError if it is of the other."""
    loaded = load_for_use(path, tokenizer, max_length, runtime)
    if loaded.kind != kind:
        raise ValueError(
            f"{path}, given as {KINDS[kind]}, is {loaded.described}; give it as {KINDS[loaded.kind]} "
            + shlex.quote(str(path))
        )
    return loaded


def require_kind(loaded: Loaded, kind: str) -> None:
    """ValueError, which holds the command for it, for a checkpoint of the other kind."""
    if loaded.kind != kind:
        command = shlex.join(["uv", "run", "python", "-m", COMMANDS[loaded.kind], "--checkpoint", str(loaded.path)])
        raise ValueError(f"{loaded.path} is {loaded.described}; it is used by: {command}")


@dataclass(frozen=True)
class Likelihood:
    """Sums over documents, or over the replies of conversations; errors are standard errors. One token more than the
    text has per document or reply: EOS."""

    kind: str  # "exact" or "upper bound"
    documents: int  # or conversations
    tokens: int
    bytes: int
    nats_per_token: float
    standard_error: float  # over documents, of nats_per_token
    mask_standard_error: float  # of that, about what the drawn masks add; 0 where exact
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float

    def line(self, unit: str = "documents") -> str:
        sign = "<= " if self.kind == "upper bound" else ""
        return (
            f"{self.documents:,} {unit}, {self.tokens:,} tokens: "
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
    bad: BadRows | None = None,
) -> dict[str, Likelihood]:
    """Likelihood of all documents, and of those in each language ("zh", "other") where the file has both.

    Every token but BOS is scored exactly once, EOS included. A document longer than `max_length` is scored in windows,
    each beginning with the last token of the one before as context.
    """
    documents, windows = windows_of(tokenizer, config, max_length, bad)
    return _likelihoods(model, tokenizer, documents, windows, config, runtime)


def evaluate_replies(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    config: DataEvalConfig,
    max_length: int,
    canvas: int,
    runtime: RuntimeConfig,
    bad: BadRows | None = None,
) -> tuple[dict[str, Likelihood], ReplyWindows]:
    """Likelihood of the replies of all conversations, each given all before it in the chat template, by language.

    Every reply token and one EOS per reply are scored. A diffusion model scores a reply on a canvas of fixed size
    (`canvas`, see `reply_windows`): on one of just its length, where the reply ends would be given. The fill's nats
    count, its tokens do not. That bounds -log p(reply, EOS, fill), which is no less than -log p(reply, EOS), the
    event that an autoregressive model is scored on. The canvas of a block model ends with a block, whatever `canvas`.
    """
    found = reply_windows(tokenizer, config, max_length, *canvas_of(model, canvas), bad)
    return _likelihoods(model, tokenizer, found.conversations, found.windows, config, runtime), found


def as_trained(data: DataEvalConfig, loaded: Loaded) -> DataEvalConfig:
    """How the model's documents are read: those that spell control tokens, as they were in its training."""
    return replace(data, control_tokens=loaded.control_tokens)


def evaluate_documents(
    loaded: Loaded, data: DataEvalConfig, max_length: int, runtime: RuntimeConfig
) -> tuple[dict[str, Likelihood], dict[str, Any]]:
    """`evaluate_file`, documents being read as in training; and for the file of the result, how they were read. Bad
    rows that are left out are told on stderr."""
    data, bad = as_trained(data, loaded), BadRows(data.on_bad_row)
    found = evaluate_file(loaded.model, loaded.tokenizer, data, max_length, runtime, bad)
    how = {"documents_hold_control_tokens": data.control_tokens, **tell_skipped(data.eval_data, bad)}
    return found, {"likelihood": as_json(found), **how}


def note_on_blanks(loaded: Loaded) -> str | None:
    """A sentence where blanks are filled without knowing all that stands around them."""
    if not loaded.model.config.block_size:
        return None
    size = loaded.model.config.block_size
    return f"blanks are filled in blocks of {size} tokens: what stands behind a blank's own block is not seen by it"


def flags_of_models(*models: Loaded) -> dict[str, tuple[bool, str]]:
    """For `refuse_idle`: the flags of likelihoods that have an effect only on models of some attention."""
    configs = [one.model.config for one in models]
    drawn = any(draws_masks(config) for config in configs)
    full = any(config.attention == "full" for config in configs)
    diffusion = not all(config.autoregressive for config in configs)
    masks = drawn, "masks to be drawn: of small blocks all are tried" if diffusion else "a diffusion model"
    blocks = full, "a model of whole rows: a block ends the canvas" if diffusion else "a diffusion model"
    return {"num_samples": masks, "cond_ll_nmc": masks, "canvas": blocks}


def canvas_of(model: Transformer, canvas: int) -> tuple[int, int]:
    """Canvas and block size, of which `reply_windows` is to fill one with EOS for this model; (0, 0): neither."""
    return (canvas if model.config.attention == "full" else 0), model.config.block_size


def window_nats(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    windows: list[Window],
    config: DataEvalConfig,
    runtime: RuntimeConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every window and their variance over the masks drawn, (N,) float64 each."""
    nats, variance = np.zeros(len(windows)), np.zeros(len(windows))
    for batch, chosen in batches(windows, tokenizer, config, runtime):
        with runtime.autocast():
            copies = max(config.eval_batch_size // len(chosen), 1)
            result = row_nats(model, batch, config.num_samples, runtime.seed, copies)
        nats[chosen], variance[chosen] = result.nats.numpy(), result.variance.numpy()
    return nats, variance


def _likelihoods(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    windows: list[Window],
    config: DataEvalConfig,
    runtime: RuntimeConfig,
) -> dict[str, Likelihood]:
    add_nats(model, tokenizer, documents, windows, config, runtime)
    groups = by_language(documents, [document.language for document in documents])
    return {name: summarise(kind_of(model), members) for name, members in groups.items()}


def add_nats(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    windows: list[Window],
    config: DataEvalConfig,
    runtime: RuntimeConfig,
) -> None:
    """To each document the nats, their variance and the tokens of its windows."""
    nats, variance = window_nats(model, tokenizer, windows, config, runtime)
    for window, cost, spread in zip(windows, nats.tolist(), variance.tolist(), strict=True):
        document = documents[window.document]
        document.nats += cost
        document.variance += spread
        document.tokens += len(window.ids) - window.begin - window.fill


def kind_of(model: Transformer) -> str:
    """The chain rule is exact, be the next token predicted at the last one or in a block of its own."""
    return "exact" if model.config.autoregressive or model.config.block_size == 1 else "upper bound"


def by_language(members: list[Member], languages: list[str]) -> dict[str, list[Member]]:
    """ "all", and each language where there are several."""
    names = sorted(set(languages), reverse=True)
    parts = {name: [m for m, language in zip(members, languages, strict=True) if language == name] for name in names}
    return {"all": members} | (parts if len(parts) > 1 else {})


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
    chat_wrap: bool = False,
    control: bool = False,
) -> dict[str, float]:
    """log p(response | prompt) in nats, a lower bound for a diffusion model (LLaDA Eq. 6). The prompt is BOS and its
    text, or with `chat_wrap` a user's turn and the opened assistant's; see `condition_and_responses`; EOS is not
    scored, and as nothing stands behind the response, a diffusion model is told where it ends. control: both may hold
    control tokens, but for [MASK]. ValueError if the response is empty or both are together longer than `max_length`
    tokens."""
    if not response:
        raise ValueError("the response to be scored is empty")
    condition, (answer,) = condition_and_responses(tokenizer, prompt, [response], chat_wrap, control)
    ids = condition + answer
    refuse_mask(tokenizer, ids, "what is scored")
    if len(ids) > max_length:
        raise ValueError(f"prompt and response are {len(ids)} tokens, more than --max-seq-len {max_length}")
    batch = collate([Window(0, ids, seed_of(ids), len(condition))], tokenizer.pad_token_id)
    with runtime.autocast():
        on_device = to_device(batch, runtime.torch_device)
        result = row_nats(model, on_device, num_samples, runtime.seed, ROWS_PER_PASS)
    return {
        "log_likelihood": -float(result.nats),
        "mask_standard_error": or_none(math.sqrt(float(result.variance))),
        "tokens": len(answer),
    }


def response_line(model: Transformer, score: dict[str, float], num_samples: int) -> str:
    """A `response_likelihood` in words."""
    error = score["mask_standard_error"]  # none for a single mask
    shown = "" if error is None or not draws_masks(model.config) else f" +- {error:.4f}"
    sign = "=" if kind_of(model) == "exact" else ">="
    masks = f"{num_samples} masks" if draws_masks(model.config) else "all masks"
    return (
        f"log p(response | prompt) {sign} {score['log_likelihood']:.4f}{shown} nats ({score['tokens']} tokens, {masks})"
    )


def condition_and_responses(
    tokenizer: PreTrainedTokenizerFast, prompt: str, responses: list[str], chat_wrap: bool, control: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Ids of what responses are given, and of each of them: BOS and the prompt, or the prompt as a user's turn before
    the opened assistant's. Without the template the blanks that the prompt ends with belong to the responses, for a
    word's token begins with its blank."""
    if chat_wrap:
        messages = [{"role": "user", "content": prompt}]
        return encode_chat(tokenizer, messages, True, control), encode_batch(tokenizer, responses, control)
    text = prompt.rstrip()
    blanks = prompt[len(text) :]
    condition = [tokenizer.bos_token_id, *encode(tokenizer, text, control)]
    return condition, encode_batch(tokenizer, [blanks + response for response in responses], control)


def refuse_mask(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], what: str) -> None:
    """ValueError if the given ids hold [MASK], which is nothing to be given: it is what a diffusion model fills."""
    if tokenizer.mask_token_id in ids:
        raise ValueError(
            f"{what} holds {tokenizer.mask_token}, which a diffusion model fills in the text of --infill alone; leave "
            "it out, or --control-tokens, which makes it more than text"
        )


def summarise(kind: str, documents: list[Document]) -> Likelihood:
    """The likelihood of documents whose nats are known."""
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
        standard_error=ratio_error(nats, tokens),
        mask_standard_error=math.sqrt(sum(d.variance for d in documents)) / tokens.sum(),
        perplexity=math.exp(min(rate, 700)),
        bits_per_byte=bits.sum() / size.sum(),
        bits_per_byte_error=ratio_error(bits, size),
    )


def as_json(result: dict[str, Likelihood]) -> dict[str, Any]:
    return {
        name: {k: or_none(v) if isinstance(v, float) else v for k, v in asdict(value).items()}
        for name, value in result.items()
    }


def circumstances(
    command: str,
    runtime: RuntimeConfig,
    tokenizer: PreTrainedTokenizerFast,
    data: Path | None,
    models: Iterable[Loaded],
    *configs: Any,
) -> dict[str, Any]:
    """What a result depends on, for its file: command and settings, the checkpoints judged, tokenizer, the unpacked
    data's SHA-256, code, versions, device, precision, seed."""
    return {
        "command": command,
        "settings": settings_of(*configs, runtime),
        "checkpoints": [one.file for one in models],
        "tokenizer": fingerprint(tokenizer),
        "data_sha256": data_digest(data) if data else None,
        **provenance(runtime),
    }


def data_digest(path: Path) -> str:
    """SHA-256 of a file's lines, unpacked."""
    digest = hashlib.sha256()
    for _, line in read_lines(path):
        digest.update(line)
    return digest.hexdigest()
