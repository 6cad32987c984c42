"""Pretraining data: a corpus of documents as packed rows, a training and a validation part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dataset.bad_rows import OnBadRow, skipped_line
from dataset.corpus.bundled import bundled_file
from dataset.jsonl import text_format
from dataset.packing import SPLITS, DocumentOptions, PackedRows, TokenCache
from dataset.tokenizer import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PretrainData:
    """Where the corpus is and how it becomes rows; every field is a flag. ValueError on an impossible value."""

    data: Annotated[Path | None, "corpus: JSONL or .txt, either may be .gz (none: the bundled corpus)"] = None
    jsonl_field: Annotated[str, "field of a JSONL row that holds the document"] = "text"
    jsonl_sep: Annotated[
        str | None, r"text appended to each JSONL row; \n and \t mean line break and tab", "with character mode"
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "tokens per row", "--seq-len", "at least 2"] = 256
    packing: Annotated[bool, "documents back to back in a row; without it one document per row, padded"] = True
    use_doc_attention_mask: Annotated[bool, "the documents of a packed row do not see each other"] = True
    val_fraction: Annotated[float, "share of documents held out for validation, by content hash", "in [0, 1)"] = 0.005
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time"] = Path("dataset/.cache")
    control_tokens: Annotated[
        bool,
        "documents that spell control tokens, such as <|im_end|>, hold those tokens; BOS or EOS inside of one does not "
        "end it for attention, and one that spells the mask or padding token is a bad row",
    ] = False
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        if not self.jsonl_field:
            raise ValueError('--jsonl-field "": expected the name of a field')
        if self.data is not None and text_format(self.data) == ".txt":
            if self.jsonl_sep is not None:
                raise ValueError(f"--jsonl-sep {self.jsonl_sep!r}: {self.data} has no JSONL rows; leave the flag out")
            if self.jsonl_field != "text":
                raise ValueError(f"--jsonl-field {self.jsonl_field}: {self.data} has no fields; leave the flag out")

    @property
    def source(self) -> Path:
        """--data, or without it the bundled corpus, which is written into the cache first."""
        return self.data or bundled_file("pretrain", self.cache_dir)

    @property
    def separator(self) -> str | None:
        """jsonl_sep with \\n and \\t as the characters they stand for: a shell passes them on as two characters."""
        return self.jsonl_sep and self.jsonl_sep.replace("\\n", "\n").replace("\\t", "\t")


class PretrainDataset:
    """`train` and `validation` rows (see PackedRows) and what is known of the corpus.

    `meta` is flat, for logs: that of TokenCache, the counts of each part as train_tokens, validation_bytes..., and
    real_token_share of the training rows. ValueError if nothing is left to train on.
    """

    def __init__(self, config: PretrainData, tokenizer: PreTrainedTokenizerFast):
        self.source = config.source
        self.config = config
        options = DocumentOptions(
            config.jsonl_field, config.separator, config.val_fraction, config.control_tokens, config.on_bad_row
        )
        self.cache = TokenCache.build_or_open(self.source, tokenizer, config.cache_dir, options)
        layout = config.max_seq_len, config.packing, tokenizer.pad_token_id, config.use_doc_attention_mask
        self.train = PackedRows(self.cache.train, *layout)
        self.validation = PackedRows(self.cache.validation, *layout)
        self.meta = _summary(self.cache.meta, self.train.real_token_share)
        if not len(self.train):
            raise ValueError(self._why_empty())

    def describe(self) -> str:
        """Two lines for people, and one on bad rows if there are any."""
        meta = self.meta
        characters = meta["train_characters"] + meta["validation_characters"]
        text_tokens = meta["train_tokens"] + meta["validation_tokens"]
        text_tokens -= 2 * (meta["train_documents"] + meta["validation_documents"])  # without BOS and EOS
        empty = f" ({meta['empty_rows']:,} empty ones skipped)" if meta["empty_rows"] else ""
        bundled = "" if self.config.data else "no --data, so the bundled corpus is used: "
        lines = (
            f"{bundled}{self.source}: {meta['rows']:,} rows{empty}, "
            f"{characters / max(text_tokens, 1):.2f} characters per token\n"
            f"train {meta['train_documents']:,} documents, {meta['train_tokens']:,} tokens, "
            f"{len(self.train):,} rows of {self.train.seq_len} with {self.train.real_token_share:.1%} real tokens; "
            f"validation {meta['validation_documents']:,} documents, {meta['validation_tokens']:,} tokens"
        )
        return "\n".join(filter(None, (lines, skipped_line(meta))))

    def _why_empty(self) -> str:
        path, meta = self.source, self.meta
        if not meta["validation_documents"]:
            bad = " or bad" if meta["skipped_rows"] else ""
            return f"{path} has nothing to train on: all {meta['rows']:,} rows are empty{bad}"
        return (
            f"{path} has nothing to train on: all {meta['validation_documents']:,} documents are held out by "
            f"--val-fraction {self.config.val_fraction}; lower it, or give more data"
        )


def _summary(meta: dict[str, Any], real_token_share: float) -> dict[str, Any]:
    flat = {name: value for name, value in meta.items() if name not in SPLITS}
    for split in SPLITS:
        flat |= {f"{split}_{name}": value for name, value in meta[split].items()}
    return flat | {"real_token_share": real_token_share}
