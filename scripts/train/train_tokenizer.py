"""Train a byte-level BPE tokenizer and write a directory that every other command accepts as --tokenizer-dir.

    python -m scripts.train.train_tokenizer --data dataset/pretrain_hq.jsonl --target-vocab-size 6400 \\
      --out weights/tokenizer --eval-data dataset/pretrain_val.jsonl

A checkpoint works only with the tokenizer it was trained with, so train a new tokenizer before any model.
A label file (--sources) names the source of each row of the data, one line per row, as SOURCE or SOURCE/LANGUAGE;
with --keep-sources only rows of the sources listed there are used, SOURCE=N counting each of its rows N times.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dataset.content import language_of
from dataset.corpus.bundled import bundled_file
from dataset.reading.bad_rows import BadRows, OnBadRow, skipped_line
from dataset.reading.documents import read_documents
from dataset.reading.files import container_of, open_unpacked, read_lines
from dataset.spelling import check_blanks
from dataset.tokenizer import MASK_TOKEN, encode_batch, fingerprint, load_tokenizer, save_tokenizer, train_bpe
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_writable


@dataclass(frozen=True)
class TokenizerTraining:
    """What a tokenizer is trained on, and where it goes"""

    data: Annotated[Path | None, "text to train on: .jsonl or .txt, also with .gz (none: the bundled corpus)"] = None
    jsonl_field: Annotated[str, "field of a row that holds its text"] = "text"
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


def training_texts(config: TokenizerTraining) -> Iterator[str]:
    """Yield the texts to count pairs in; a row of weight N comes N times."""
    if config.data is None:
        print("no --data, so the bundled corpus is used")
    bad = BadRows(config.on_bad_row)
    documents = read_documents(config.data or bundled_file("words"), config.jsonl_field, bad, check_blanks)
    yield from documents if config.sources is None else _kept(documents, config, bad)
    print_skipped(bad)


def _kept(documents: Iterator[str], config: TokenizerTraining, bad: BadRows) -> Iterator[str]:
    """Yield the documents of the kept sources, each as often as its weight says."""
    weights = config.weights()
    labels = _read_labels(config.sources)
    if unknown := weights.keys() - set(labels):
        raise ValueError(f"{config.sources} has no row of {', '.join(sorted(unknown))} (--keep-sources)")
    used = 0
    for used, text in enumerate(documents, start=1):
        rows = used + bad.count  # a bad row has a label, too
        if rows <= len(labels):
            yield from [text] * weights.get(labels[rows - 1], 0)
    rows = used + bad.count
    if rows != len(labels):
        raise ValueError(f"{config.sources} has {len(labels)} lines, but {config.data} has {rows} rows; give one a row")


def print_skipped(bad: BadRows) -> None:
    if bad.count:
        print(skipped_line(bad.meta))


def _read_labels(path: Path) -> list[str]:
    """Return the source of each row: a line up to its first slash."""
    return [line.decode("utf-8").partition("/")[0].strip() for _, line in read_lines(path)]


def compression(tokenizer, texts: list[str]) -> tuple[float, float]:
    """Return characters per token and UTF-8 bytes per token, over all texts together."""
    tokens = sum(map(len, encode_batch(tokenizer, texts)))
    return sum(map(len, texts)) / tokens, sum(len(text.encode()) for text in texts) / tokens


def report(tokenizer, config: TokenizerTraining) -> None:
    """Print how well the tokenizer compresses --eval-data, by language."""
    languages = defaultdict(list)
    bad = BadRows(config.on_bad_row)
    for text in filter(None, read_documents(config.eval_data, config.jsonl_field, bad, check_blanks)):
        languages[language_of(text)].append(text)
    for language, texts in sorted(languages.items(), reverse=True):
        characters, size = compression(tokenizer, texts)
        print(f"{language:5}  {len(texts):7,} rows  {characters:.3f} characters/token  {size:.3f} bytes/token")
    print_skipped(bad)


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_args(__doc__, TokenizerTraining, argv=argv)
    if (config.out / "tokenizer.json").exists() and not config.overwrite:
        raise ValueError(f"{config.out} already holds a tokenizer; choose another --out, or add --overwrite")
    require_writable(config.out / "tokenizer.json", "--out")
    if config.eval_data:  # a file that cannot be read is refused before the training, not after it
        container_of(config.eval_data)
        open_unpacked(config.eval_data).close()
    save_tokenizer(train_bpe(training_texts(config), config.target_vocab_size, config.mask_token), config.out)
    tokenizer = load_tokenizer(config.out, config.mask_token)
    print(f"saved {config.out}: {len(tokenizer)} entries, fingerprint {fingerprint(tokenizer)}")
    if config.eval_data:
        report(tokenizer, config)


if __name__ == "__main__":
    run(main)
