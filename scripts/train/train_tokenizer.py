"""Train a byte-level BPE tokenizer and write a directory that every other command accepts as --tokenizer-dir.

    python -m scripts.train.train_tokenizer --data dataset/pretrain_hq.jsonl --target-vocab-size 6400 \\
      --out weights/tokenizer --eval-data dataset/pretrain_val.jsonl

A checkpoint works only with the tokenizer it was trained with, so train a new tokenizer before any model.
A label file (--sources) names the source of each row of the data, one line per row, as SOURCE or SOURCE/LANGUAGE;
with --keep-sources only rows of the sources listed there are used, SOURCE=N counting each of its rows N times.
Of much text a random sample is used, since memory and time grow with it, and the tokenizer hardly changes.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dataset.content import language_of
from dataset.corpus.bundled import bundled_file
from dataset.reading.bad_rows import BadRows, OnBadRow, skipped_line
from dataset.reading.documents import read_documents
from dataset.reading.files import DATA_HELP, Observer, data_files, open_unpacked
from dataset.reading.rows import chunked
from dataset.sample import sample_texts, texts_of_sources
from dataset.spelling import check_blanks
from dataset.tokenise import CHUNK_CHARACTERS, Pass
from dataset.tokenizer import (
    MASK_TOKEN,
    PreTrainedTokenizerFast,
    encode_batch,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_writable


@dataclass(frozen=True)
class TokenizerTraining:
    """What a tokenizer is trained on, and where it goes"""

    data: Annotated[Path | None, f"text to train on: {DATA_HELP} (none: the bundled corpus)"] = None
    jsonl_field: Annotated[str, "field of a row that holds its text"] = "text"
    sample_megabytes: Annotated[
        float,
        "of larger data a random sample of so many megabytes is used; 16 of Chinese take 1.7 GB of memory",
        "above 0",
    ] = 16
    target_vocab_size: Annotated[
        int, "vocabulary entries in all: 16 control tokens, 256 bytes, merges", "at least 1"
    ] = 6400
    mask_token: Annotated[str, "name of the token that stands for a masked one"] = MASK_TOKEN
    out: Annotated[Path, "directory to write tokenizer.json and tokenizer_config.json into"] = Path("weights/tokenizer")
    overwrite: Annotated[bool, "replace a tokenizer that --out already holds"] = False
    sources: Annotated[Path | None, "label file, one line per row of --data, also with .gz"] = None
    keep_sources: Annotated[str, "sources to train on, as SOURCE or SOURCE=N, separated by commas"] = ""
    eval_data: Annotated[Path | None, "text to measure characters and bytes per token on"] = None
    on_bad_row: OnBadRow = "error"

    def __post_init__(self):
        if bool(self.sources) != bool(self.keep_sources):
            raise ValueError("--sources and --keep-sources belong together: give both or neither")
        if self.sources and not self.data:
            raise ValueError("--sources labels the rows of --data, which is missing")
        self.weights()

    def weights(self) -> dict[str, int]:
        """Return how many times a row of each kept source counts."""
        weights = {}
        for item in filter(None, self.keep_sources.split(",")):
            source, _, count = item.partition("=")
            if not re.fullmatch(r"[1-9][0-9]*|", count) or not source:
                raise ValueError(f"--keep-sources: {item!r} is neither SOURCE nor SOURCE=N, N a whole number from 1")
            weights[source.strip()] = int(count or 1)
        return weights


def training_texts(config: TokenizerTraining) -> list[str]:
    """Return the texts to count pairs in, or a sample of them, and print how much they are."""
    if config.data is None:
        print("no --data, so the bundled corpus is used")
    files = readable_files(config.data or bundled_file("words"))
    bad = BadRows(config.on_bad_row, several_files=len(files) > 1)
    with Pass(files, "reading") as observe:
        documents = _documents(files, config.jsonl_field, bad, observe)
        if config.sources:
            documents = texts_of_sources(documents, config.sources, config.weights(), bad)
        sample = sample_texts(documents, round(config.sample_megabytes * 1e6))
    print(f"training on {sample.line()}")
    print_skipped(bad)
    return sample.texts


def readable_files(data: Path) -> tuple[Path, ...]:
    """Return the files that `data` names; one that cannot be read is refused before any work."""
    files = data_files(data)
    for file in files:
        open_unpacked(file).close()
    return files


def _documents(files: tuple[Path, ...], field: str, bad: BadRows, observe: Observer | None = None) -> Iterator[str]:
    for file in files:
        yield from read_documents(file, field, bad, check_blanks, observe=observe)


def print_skipped(bad: BadRows) -> None:
    if bad.count:
        print(skipped_line(bad.meta))


def report(tokenizer: PreTrainedTokenizerFast, config: TokenizerTraining) -> None:
    """Print how well the tokenizer compresses --eval-data, by language."""
    counts = defaultdict(Counter)
    files = readable_files(config.eval_data)
    bad = BadRows(config.on_bad_row, several_files=len(files) > 1)
    for texts in chunked(filter(None, _documents(files, config.jsonl_field, bad)), len, CHUNK_CHARACTERS):
        for text, ids in zip(texts, encode_batch(tokenizer, texts), strict=True):
            sizes = {"rows": 1, "characters": len(text), "bytes": len(text.encode()), "tokens": len(ids)}
            counts[language_of(text)].update(sizes)
    for language, count in sorted(counts.items(), reverse=True):
        characters, size = count["characters"] / count["tokens"], count["bytes"] / count["tokens"]
        print(f"{language:5}  {count['rows']:7,} rows  {characters:.3f} characters/token  {size:.3f} bytes/token")
    print_skipped(bad)


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_args(__doc__, TokenizerTraining, argv=argv)
    if (config.out / "tokenizer.json").exists() and not config.overwrite:
        raise ValueError(f"{config.out} already holds a tokenizer; choose another --out, or add --overwrite")
    require_writable(config.out / "tokenizer.json", "--out")
    if config.eval_data:
        readable_files(config.eval_data)  # before the training, not after it
    save_tokenizer(train_bpe(training_texts(config), config.target_vocab_size, config.mask_token), config.out)
    tokenizer = load_tokenizer(config.out, config.mask_token)
    print(f"saved {config.out}: {len(tokenizer)} entries, fingerprint {fingerprint(tokenizer)}")
    if config.eval_data:
        report(tokenizer, config)


if __name__ == "__main__":
    run(main)
