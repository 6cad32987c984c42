"""Rows and documents of JSONL and text files, and the rule that separates training from validation.

A file is read as bytes and cut at b"\\n", never through the platform's encoding, so that one file means the same rows
everywhere. Row numbers count physical lines from 1, blank ones included: they are what an editor shows. Everything a
file can do wrong is a ValueError (or FileNotFoundError) of one sentence: file, row, what was found, what to do.
"""

import gzip
import hashlib
import io
import json
import operator
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from dataset.disk_cache import cached_directory, source_key

Observer = Callable[[bytes], object]
Part = TypeVar("Part")

SUFFIXES = (".jsonl", ".txt")
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abABcdefCDEF]")
DOCUMENT_CHARACTERS = 2000  # aimed-at length of a document cut from a .txt file
JSON_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}
CACHE_FORMAT = 1


def content_hash(content: str) -> int:
    """The first 64 bits (big-endian) of the SHA-256 of the UTF-8 content without surrounding whitespace."""
    return int.from_bytes(hashlib.sha256(content.strip().encode("utf-8")).digest()[:8], "big")


def is_validation(content: str, fraction: float) -> bool:
    """Whether a row belongs to the validation part: content_hash(content) < fraction * 2**64.

    The one rule of every stage. It looks at nothing but the content, so a text keeps its side wherever it turns up
    again: in another file, another order, twice in one file; and a larger fraction only adds to the validation part.
    0 puts everything on the training side, 1 everything on the validation side.
    """
    return content_hash(content) < fraction * 2.0**64


def language_of(text: str) -> str:
    """ "zh" where at least a fifth of the letters are Chinese characters, else "other"."""
    letters = [c for c in text if c.isalpha()]
    return "zh" if letters and sum("\u4e00" <= c <= "\u9fff" for c in letters) >= 0.2 * len(letters) else "other"


def text_format(path: Path) -> str:
    """Whether a file is ".jsonl" or ".txt", be it plain or ".gz"; ValueError for a directory or any other suffix."""
    _refuse_directory(path)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type; expected a name ending in .jsonl or .txt, or in .gz after it")
    return suffixes[-1]


def is_gzip_name(path: Path) -> bool:
    return Path(path).suffix.lower() == ".gz"


def open_text(path: Path) -> BinaryIO:
    """Open a plain or .gz file for reading bytes; FileNotFoundError or ValueError says what to do instead."""
    path = Path(path)
    _refuse_directory(path)
    try:
        return io.BufferedReader(gzip.open(path, "rb"), 1 << 20) if is_gzip_name(path) else path.open("rb")
    except FileNotFoundError:
        remedy = "check the path, or download the file as README.md shows"
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _refuse_directory(path: Path) -> None:
    if Path(path).is_dir():
        raise ValueError(f"{path} is a directory; give the data file inside it")


def read_lines(path: Path, observe: Observer | None = None) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, line with its line end) for every physical line; `observe` sees the bytes of each line."""
    for number, line in _guarded_lines(path):
        if observe is not None:
            observe(line)
        yield number, line


def _guarded_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except EOFError:
            raise ValueError(f"{path}, after row {number}: the gzip file is cut short; download it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(_gzip_fault(path, number, error)) from None
        except OSError as error:
            raise ValueError(f"{path}, after row {number}: cannot be read on ({error.strerror})") from error


def read_rows(path: Path, observe: Observer | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, parsed object) for every line that is not blank, in constant memory."""
    empty = True
    for number, line in read_lines(path, observe):
        if not is_blank(line, number):
            empty = False
            yield number, parse_row(path, number, line)
    if empty:
        raise ValueError(f"{path} has no rows; expected one JSON object per line")


def read_documents(
    path: Path, field: str = "text", separator: str | None = None, observe: Observer | None = None
) -> Iterator[str]:
    """The documents of a file, in order, in constant memory.

    .jsonl: row[field], followed by `separator` if given. An empty text comes out as "" (without separator), for the
    caller to count and skip. .txt: whole lines of about 2,000 characters together, which joined are the file's text.
    """
    if text_format(path) == ".txt":
        yield from _read_text_documents(path, observe)
        return
    for number, row in read_rows(path, observe):
        text = _text_of(path, number, row, field)
        yield text + separator if text and separator else text


def chunked(parts: Iterable[Part], size: Callable[[Part], int], enough: int) -> Iterator[list[Part]]:
    """Lists of successive parts, each as long as it takes for their sizes to add up to `enough`."""
    chunk: list[Part] = []
    total = 0
    for part in parts:
        chunk.append(part)
        total += size(part)
        if total >= enough:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def is_blank(line: bytes, number: int) -> bool:
    return not (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()


def parse_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line as a JSON object; ValueError naming file and row otherwise."""
    text = _decode(path, number, line).rstrip("\r\n")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON at column {error.pos + 1} ({error.msg}); correct or delete that row"
        raise ValueError(f"{path}, row {number}: {reason}") from None
    except RecursionError:
        raise ValueError(f"{path}, row {number}: nested too deeply to be read; delete that row") from None
    except ValueError as error:  # e.g. an integer of more than 4300 digits
        raise ValueError(f"{path}, row {number}: not readable JSON ({error}); correct or delete that row") from None
    if not isinstance(row, dict):
        expected = 'expected an object such as {"text": "..."}'
        raise ValueError(f"{path}, row {number}: {expected}, found {JSON_TYPES[type(row)]}; correct or delete that row")
    if SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(path, number, row)
    return row


def _text_of(path: Path, number: int, row: dict[str, Any], field: str) -> str:
    if field not in row:
        present = ", ".join(list(row)[:10]) or "none"
        present = present if present.isprintable() else ascii(present)
        raise ValueError(
            f'{path}, row {number}: field "{field}" is missing; fields present: {present} '
            "(choose one with --jsonl-field)"
        )
    if not isinstance(row[field], str):
        raise ValueError(
            f'{path}, row {number}: field "{field}" is {JSON_TYPES[type(row[field])]}, expected a string '
            "(choose another field with --jsonl-field, or correct that row)"
        )
    return row[field]


def _read_text_documents(path: Path, observe: Observer | None) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    number = 0
    for number, line in read_lines(path, observe):
        text = _decode(path, number, line)
        # Only from half the aimed-at length on, so that a heading stays with the long paragraph below it.
        if length + len(text) > DOCUMENT_CHARACTERS and length >= DOCUMENT_CHARACTERS // 2:
            cut = _cut_position(lines)
            yield "".join(lines[:cut])
            lines = lines[cut:]
            length = sum(map(len, lines))
        lines.append(text)
        length += len(text)
    if number == 0:
        raise ValueError(f"{path} is empty; expected text")
    if lines:
        yield "".join(lines)


def _cut_position(lines: list[str]) -> int:
    """How many lines to give away: up to the last blank one in the second half of the aimed-at length, else all."""
    length = 0
    cut = len(lines)
    for index, line in enumerate(lines, start=1):
        length += len(line)
        if length >= DOCUMENT_CHARACTERS // 2 and not line.strip():
            cut = index
    return cut


def _decode(path: Path, number: int, line: bytes) -> str:
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
        if line.startswith(GZIP_MAGIC):
            raise ValueError(f"{path} is gzip-compressed although its name does not say so; rename it to end in .gz")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte offset {error.start} of the row)"
        raise ValueError(f"{path}, row {number}: {found}; save the file as UTF-8 or delete that row") from None


def _refuse_lone_surrogates(path: Path, number: int, row: dict[str, Any]) -> None:
    # JSON can spell half a surrogate pair, which is no character: it has no UTF-8 form, so no bytes and no hash.
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(
            f"{path}, row {number}: {found} is half a surrogate pair and no character; correct or delete that row"
        ) from None


def _gzip_fault(path: Path, number: int, error: Exception) -> str:
    with Path(path).open("rb") as file:  # the error's type does not tell: a wrong checksum is a BadGzipFile, too
        if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
            return f"{path} is not a gzip file although its name ends in .gz; rename it, or download it again"
    return f"{path}, after row {number}: the gzip file is damaged ({error}); download it again"


class JsonlFile:
    """rows[i] is the i-th row that is not blank, parsed; nothing but the index is held in memory.

    The offsets of the rows, and for .gz the unpacked text, are kept under `cache_dir`, so a second open reads neither.
    Rows are parsed when asked for: a malformed one raises ValueError naming file and row then. Safe to use from
    several threads and worker processes: no file stays open.
    """

    def __init__(self, path: Path, cache_dir: Path):
        self.path = Path(path)
        if text_format(self.path) != ".jsonl":
            raise ValueError(f"{path}: expected one JSON object per line in a file ending in .jsonl or .jsonl.gz")
        open_text(self.path).close()  # a missing file gets its message here
        key = source_key(self.path, "rows", CACHE_FORMAT)
        folder = cached_directory(Path(cache_dir), key, self._build, self._fault)
        self._source = folder / "rows.jsonl" if is_gzip_name(self.path) else self.path
        self._index = np.load(folder / "index.npy", mmap_mode="r")  # (rows, 2) int64: byte offset, row number

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        offset, number = self._index[self._position(index)].tolist()
        with open_text(self._source) as file:
            file.seek(offset)
            return parse_row(self.path, number, file.readline())

    def location(self, index: int) -> str:
        """Where row `index` stands, to begin an error message with: "dataset/x.jsonl, row 23"."""
        return f"{self.path}, row {self._index[self._position(index), 1]}"

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, row index {position} asked for")
        return position

    def _build(self, folder: Path) -> None:
        index = array("q")
        offset = 0
        with (folder / "rows.jsonl").open("wb") if is_gzip_name(self.path) else io.BytesIO() as unpacked:
            observe = unpacked.write if is_gzip_name(self.path) else None
            for number, line in read_lines(self.path, observe):
                if not is_blank(line, number):
                    index.extend((offset, number))
                offset += len(line)
        if not index:
            raise ValueError(f"{self.path} has no rows; expected one JSON object per line")
        np.save(folder / "index.npy", np.frombuffer(index, dtype=np.int64).reshape(-1, 2))
        (folder / "meta.json").write_text(json.dumps({"rows": len(index) // 2, "bytes": offset}), encoding="utf-8")

    def _fault(self, folder: Path) -> str | None:
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if len(np.load(folder / "index.npy", mmap_mode="r")) != meta["rows"]:
                return "index.npy has the wrong length"
            if is_gzip_name(self.path) and (folder / "rows.jsonl").stat().st_size != meta["bytes"]:
                return "rows.jsonl has the wrong length"
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            return f"unreadable: {error}"
        return None
