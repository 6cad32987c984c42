"""Supervised fine-tuning data: conversations of a file as rows that learn their replies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from dataset.bad_rows import OnBadRow, skipped_line
from dataset.conversations import Conversations, ConversationTokeniser
from dataset.corpus.bundled import bundled_file
from dataset.jsonl import held_out_threshold, text_format
from dataset.order import STEPS_PER_WINDOW
from dataset.replies import ReplyRows, RowLayout
from dataset.streaming import ConversationStream, StreamedRows
from dataset.tokenizer import PreTrainedTokenizerFast, encode_conversations

OPEN_END = "an open end of the canvas (--no-quantize-effective-length)"


@dataclass(frozen=True)
class SFTData:
    """Where the conversations are and how they become rows; every field is a flag. ValueError on impossible values."""

    data: Annotated[
        Path | None,
        "conversations: JSONL, may be .gz; rows of conversations, messages, instruction or prompt "
        "(none: the bundled ones)",
    ] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest row, in tokens; longer ones are shortened", "--seq-len", "at least 16"] = 512
    val_fraction: Annotated[float, "share of rows held out for validation, by content hash", "in [0, 1)"] = 0.005
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time", "without --streaming"] = (
        Path("dataset/.cache")
    )
    streaming: Annotated[bool, "read and tokenise while training, in the order of the file; keeps no cache"] = False
    steps_per_epoch: Annotated[
        int | None, "optimizer steps that count as one epoch", "in [1, 10^9]", "with --streaming"
    ] = None
    on_bad_row: OnBadRow = "error"

    eos_fill: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.streaming and self.steps_per_epoch is None:
            raise ValueError("--streaming needs --steps-per-epoch: how long a stream is, is not known")
        if self.data is not None and text_format(self.data) != ".jsonl":
            raise ValueError(f"--data {self.data}: expected JSONL rows, one conversation each")

    @property
    def source(self) -> Path:
        """--data, or without it the bundled conversations, which are written into the cache first."""
        return self.data or bundled_file("sft", self.cache_dir)


@dataclass(frozen=True)
class DiffusionSFTData(SFTData):
    """Where the conversations are and how they become rows."""

    eos_fill: Annotated[
        int,
        "a reply's EOS is followed by a random number of others, up to so many: the empty end of the canvas",
        "in [0, 2^20]",
        f"with {OPEN_END}",
    ] = 128
    quantize_effective_length: Annotated[
        bool,
        "EOS fill the reply's last block and nothing behind it, as decoding ends there",
        "with block diffusion",
        "--llada2-quantize-effective-length",
    ] = True


class SFTDataset:
    """`train` and `validation` rows (ReplyRows, or StreamedRows) and what is known of the file.

    all_replies: the replies of a conversation are learnt in one row (autoregressive), else one row each (diffusion).
    rows_per_step is needed for streaming only. block_size: see RowLayout. `meta` is flat, for logs. ValueError with
    file and row for a bad row, and if nothing is left to train on.
    """

    def __init__(
        self,
        config: SFTData,
        tokenizer: PreTrainedTokenizerFast,
        all_replies: bool,
        rows_per_step: int,
        block_size: int = 0,
    ) -> None:
        _check_tokenizer(tokenizer, config.tokenizer_dir)
        self.config, self.source = config, config.source
        ids = tokenizer.pad_token_id, tokenizer.eos_token_id
        layout = RowLayout(all_replies, config.max_seq_len, *ids, config.eos_fill, block_size)
        tokeniser = ConversationTokeniser(self.source, tokenizer, config.on_bad_row)
        if config.streaming:
            self._open_stream(tokeniser, layout, rows_per_step)
        else:
            self._open_file(tokeniser, layout)

    def _open_file(self, tokeniser: ConversationTokeniser, layout: RowLayout) -> None:
        arrays, meta = tokeniser.open(self.config.cache_dir)
        chats = Conversations(**arrays)
        smallest, largest = int(chats.hashes.min()), int(chats.hashes.max())
        threshold = held_out_threshold(self.config.val_fraction, smallest, largest)
        self.train = ReplyRows.of(chats, layout, lambda hashes: ~(hashes < threshold))
        self.validation = ReplyRows.of(chats, layout, lambda hashes: hashes < threshold, by_length=True)
        self.meta = meta | _counts(self.train, self.validation)
        if not meta["replies"]:
            raise ValueError(f"{self.source} has nothing to train on: every reply is empty")
        if not len(self.train):
            raise ValueError(
                f"{self.source} has nothing to train on: of {meta['replies']:,} replies that are not empty, all "
                f"are held out by --val-fraction {self.config.val_fraction}; lower it, or give more data"
            )

    def _open_stream(self, tokeniser: ConversationTokeniser, layout: RowLayout, rows_per_step: int) -> None:
        stream = ConversationStream(tokeniser, layout, STEPS_PER_WINDOW * rows_per_step)
        self.validation = stream.hold_out(self.config.val_fraction)
        self.train = StreamedRows(stream.windows, stream.rows_per_window, self.config.steps_per_epoch * rows_per_step)
        self.meta = stream.meta
        self.meta |= {"empty_replies": stream.empty_replies} | _counts(self.train.window, self.validation)

    def describe(self) -> str:
        """Lines for people."""
        meta, train = self.meta, self.train
        if self.config.streaming:
            source, train = f"streamed, with an epoch of {len(train):,} rows; of the first window:", train.window
        else:
            source = f"{meta['conversations']:,} conversations, {meta['replies']:,} replies"
        bundled = "" if self.config.data else "no --data, so the bundled conversations are used: "
        left_out = f" ({meta['empty_replies']:,} empty replies left out)" if meta["empty_replies"] else ""
        lines = (
            f"{bundled}{self.source}: {source}{left_out}\n"
            f"train {len(train):,} rows of {train.real_token_share * train.seq_len:.0f} tokens on average; EOS is "
            f"{train.eos_share:.1%} of what is learnt; {meta['shortened']:,} shortened to {train.seq_len} "
            f"({meta['cut_prompts']:,} lost the beginning of the prompt, {meta['cut_replies']:,} the end of the reply)"
            f"\nvalidation {len(self.validation):,} rows"
        )
        return "\n".join(filter(None, (lines, skipped_line(meta))))


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"the tokenizer in {directory} pads with EOS, which is to be learnt; it needs both")
    try:
        encode_conversations(tokenizer, [[{"role": "user", "content": ""}]])
    except ValueError as error:
        raise ValueError(f"the tokenizer in {directory} cannot spell the chat template: {error}") from None


def _counts(train: ReplyRows, validation: ReplyRows) -> dict[str, Any]:
    return {
        "train_rows": len(train),
        "validation_rows": len(validation),
        "cut_prompts": train.totals.cut_prompts,
        "cut_replies": train.totals.cut_replies,
        "shortened": train.totals.shortened,
        "eos_share": train.eos_share if len(train) else 0.0,
        "real_token_share": train.real_token_share,
    }
