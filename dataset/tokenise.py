"""Tokenises the rows of a file into the cache, a chunk at a time; one pass for documents, conversations and pairs."""

import hashlib
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from dataset.cache import ArrayFiles, cached_directory, map_array, source_key, unchanged
from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.files import Observer, describe_files, is_packed, open_unpacked
from dataset.reading.rows import chunked
from dataset.rows.kinds import note_on_kind
from dataset.tokenizer import PreTrainedTokenizerFast, fingerprint

CHUNK_CHARACTERS = 1_000_000  # of text tokenised at a time: enough to keep all cores busy, some 50 MB of Python lists
TEMPLATE_CHARACTERS = 30  # that a message has around it, about


class Pass:
    """Observer of one reading of files: counts and hashes their bytes, and draws a progress bar on a terminal."""

    def __init__(self, files: Sequence[Path], label: str):
        self.lines = self.size = 0
        self.digest = hashlib.sha256()
        # Packed text is of unknown length, so its bar has a speed but no end. disable=None: terminals only.
        total = None if any(map(is_packed, files)) else sum(file.stat().st_size for file in files)
        self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None, leave=False)

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, line: bytes) -> None:
        self.lines += 1
        self.size += len(line)
        self.digest.update(line)
        self._bar.update(len(line))


def template_size(contents: Iterable[str]) -> int:
    """About the number of characters of messages in the chat template."""
    return sum(len(content) + TEMPLATE_CHARACTERS for content in contents)


class FileTokeniser(ABC):
    """Makes arrays of the rows of files, or opens those that an earlier run left in the cache.

    The cache is named by path, size and modification time of each file, the tokenizer, and `options`; if it is there,
    no file is read. A subclass says how one kind of rows is read and what is appended for a chunk of them.
    """

    unit: ClassVar[str]  # of rows
    version: ClassVar[int]  # counts changes of what the arrays mean
    kind: ClassVar[str]  # of rows, one of dataset/rows/kinds.py
    field = "text"  # that holds a document
    options: tuple[Any, ...] = ()  # besides the tokenizer and on_bad_row

    def __init__(self, files: Sequence[Path], tokenizer: PreTrainedTokenizerFast, on_bad_row: str):
        self.files, self.tokenizer, self.on_bad_row = (*files,), tokenizer, on_bad_row

    @property
    def source(self) -> str:
        """The files in words."""
        return describe_files(self.files)

    def bad_rows(self, verbose: bool = False) -> BadRows:
        return BadRows(self.on_bad_row, verbose, several_files=len(self.files) > 1)

    def open(self, cache_dir: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(memory-mapped arrays, what is known of the file). ValueError, FileNotFoundError: see
        dataset/reading/files.py."""
        for file in self.files:
            open_unpacked(file).close()  # a missing file is refused before a cache directory is made
        options = self.unit, self.version, fingerprint(self.tokenizer), self.on_bad_row, *self.options
        folder = cached_directory(Path(cache_dir), source_key(self.files, *options), self._build)
        arrays = {name: map_array(folder / name, dtype) for name, dtype in self.dtypes().items()}
        return arrays, json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def _build(self, folder: Path) -> None:
        began = time.monotonic()
        try:
            with unchanged(self.files), ArrayFiles(folder, self.dtypes()) as files:
                meta = self.read_file(files)
        except BadRow as bad:
            note = note_on_kind(bad.path, self.kind, self.field)
            raise ValueError(f"{bad}{note}") if note else bad from None
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        tokens = sum(length for name, length in files.lengths.items() if name.endswith("tokens"))
        rows, seconds = f"{meta[self.unit]:,} {self.unit}", time.monotonic() - began
        print(f"tokenised {rows}, {tokens / 1e6:.1f}M tokens in {seconds:.1f} s", file=sys.stderr)

    def read_file(self, files: ArrayFiles) -> dict[str, Any]:
        """Fill the arrays in one pass and return what is known of the file."""
        bad = self.bad_rows()
        with Pass(self.files, "tokenising") as observe:
            for rows in chunked(self.read(observe, bad), self.size, CHUNK_CHARACTERS):
                self.append(files, rows)
        return {**self.counts(files, bad), **bad.meta, "data_sha256": observe.digest.hexdigest()}

    @abstractmethod
    def dtypes(self) -> dict[str, Any]:
        """The type of each array."""

    @abstractmethod
    def read(self, observe: Observer, bad: BadRows) -> Iterator[Any]:
        """Yield the rows of all files."""

    @abstractmethod
    def size(self, row: Any) -> int:
        """About the number of characters of a row."""

    @abstractmethod
    def append(self, files: ArrayFiles, rows: list[Any]) -> None:
        """Tokenise a chunk of rows and append it to the arrays."""

    @abstractmethod
    def counts(self, files: ArrayFiles, bad: BadRows) -> dict[str, Any]:
        """Counts for `meta` after the last row; the number of rows has the name of `unit`."""
