"""Rows and documents of JSONL and text files, and the rule that separates training from validation.

A file is read as bytes and cut at b"\\n", never through the platform's encoding, so one file means the same rows
everywhere. Row numbers count physical lines from 1, blank ones included, as an editor shows them. Every fault of a file
is a ValueError (or FileNotFoundError) of one sentence: file, row, what was found, what to do. A fault of a row is a
BadRow, which a reader skips and counts if it is given BadRows("skip").
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dataset.bad_rows import BadRow, BadRows

Observer = Callable[[bytes], object]
Check = Callable[[str], object]  # raises ValueError for a text that cannot be used; str accepts every one
Part = TypeVar("Part")

SUFFIXES = (".jsonl", ".txt")
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abABcdefCDEF]")
DOCUMENT_CHARACTERS = 2000  # intended length of a document cut from a .txt file
MAX_NESTING = 200  # of a row; Python's own limit depends on the depth of the call
JSON_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def content_hash(content: str) -> int:
    """The first 64 bits (big-endian) of the SHA-256 of the UTF-8 content without surrounding whitespace."""
    return int.from_bytes(hashlib.sha256(content.strip().encode("utf-8")).digest()[:8], "big")


def is_validation(content: str, fraction: float) -> bool:
    """Return whether a row belongs to the validation part: content_hash(content) < fraction * 2**64.

    All stages share this rule. It depends on the content alone, so a text is on the same side in every file and order,
    and a larger fraction only adds to the validation part. Nothing is held out with 0, everything with 1.
    """
    return content_hash(content) < fraction * 2.0**64


def held_out_threshold(fraction: float, smallest: int, largest: int) -> float:
    """The hash below which rows are held out, where theirs go from `smallest` to `largest`.

    That of `is_validation`, unless it would hold out none of several contents: then just above the smallest hash.
    """
    threshold = fraction * 2.0**64
    return smallest + 1 if 0 < threshold <= smallest < largest else threshold


def language_of(text: str) -> str:
    """Return "zh" if at least a fifth of the letters are Chinese characters, else "other"."""
    letters = [c for c in text if c.isalpha()]
    return "zh" if letters and sum("\u4e00" <= c <= "\u9fff" for c in letters) >= 0.2 * len(letters) else "other"


def text_format(path: Path) -> str:
    """The suffix ".jsonl" or ".txt" of a file, plain or ".gz"; ValueError for a directory or any other suffix."""
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
    """Open a plain or .gz file for reading bytes; FileNotFoundError or ValueError with a remedy."""
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
    """Yield (row number from 1, line with its line end) for every physical line, after observe(line)."""
    number = 0
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(GZIP_MAGIC):
                    raise ValueError(
                        f"{path} is gzip-compressed although its name does not say so; rename it to end in .gz"
                    )
                if observe is not None:
                    observe(line)
                yield number, line
        except EOFError:
            raise ValueError(f"{_place(path, number)}: the gzip file is cut short; download it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(_gzip_fault(path, number, error)) from None
        except OSError as error:
            raise ValueError(f"{_place(path, number)}: cannot be read on ({error.strerror})") from error


def _place(path: Path, number: int) -> str:
    """Roughly where reading failed: a file is read ahead, a .gz by a megabyte of its text."""
    return f"{path}, somewhere after row {number}" if number else str(path)


def read_rows(
    path: Path, observe: Observer | None = None, bad: BadRows | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, parsed object) for every line that is not blank, in constant memory."""
    return read_as(path, lambda row: row, observe, bad)


def read_as(
    path: Path, use: Callable[[dict[str, Any]], Part], observe: Observer | None = None, bad: BadRows | None = None
) -> Iterator[tuple[int, Part]]:
    """Yield (row number from 1, use(parsed object)) for every line that is not blank, in constant memory.

    A row that is not a JSON object, or for which `use` raises ValueError, is added to `bad`, which raises it by
    default. ValueError if no row is left.
    """
    bad = bad or BadRows()
    used = rows = 0
    for number, line in read_lines(path, observe):
        if _is_blank(line, number):
            continue
        rows += 1
        try:
            part = use(_parsed(line, number))
        except ValueError as error:
            bad.add(BadRow(path, number, str(error)))
        else:
            used += 1
            yield number, part
    if not rows:
        raise ValueError(f"{path} has no rows; expected one JSON object per line")
    if not used:
        bad.refuse_all(path)


def read_documents(
    path: Path,
    field: str = "text",
    bad: BadRows | None = None,
    check: Check = str,
    *,
    separator: str | None = None,
    observe: Observer | None = None,
) -> Iterator[str]:
    """Yield the documents of a file, in order, in constant memory; texts that fail `check` are bad rows.

    .jsonl: row[field], followed by `separator` if given. An empty text is yielded as "" (without separator), for the
    caller to count and skip. .txt: whole lines of about 2,000 characters together; joined, the documents are the file's
    text. A bad row of a .txt file is a line.
    """
    separator = separator if text_format(path) == ".jsonl" else None
    for _, text in numbered_documents(path, field, bad, check, observe):
        yield text + separator if text and separator else text


def numbered_documents(
    path: Path, field: str, bad: BadRows | None = None, check: Check = str, observe: Observer | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (number of its row, or of its first line, document) as `read_documents`."""
    if text_format(path) == ".txt":
        return _text_documents(path, bad or BadRows(), check, observe)

    def document(row: dict[str, Any]) -> str:
        text = _text_of(row, field)
        check(text)
        return text

    return read_as(path, document, observe, bad)


def chunked(parts: Iterable[Part], size: Callable[[Part], int], enough: int) -> Iterator[list[Part]]:
    """Yield lists of successive parts; a list ends as soon as the sizes of its parts add up to `enough`."""
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


def _is_blank(line: bytes, number: int) -> bool:
    return not (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()


def _parsed(line: bytes, number: int) -> dict[str, Any]:
    """Parse one line as a JSON object; ValueError if it is anything else."""
    row = parsed_json(_decoded(line, number).rstrip("\r\n"))
    if not isinstance(row, dict):
        expected = 'expected an object such as {"text": "..."}'
        raise ValueError(f"{expected}, found {JSON_TYPES[type(row)]}; correct or delete that row")
    return row


def parsed_json(text: str) -> Any:
    """The value that a text spells in JSON; ValueError if there is none that can be used."""
    try:
        value = PARSER.decode(text)
        if text.count("[") + text.count("{") > MAX_NESTING and _is_deep(value):
            raise RecursionError
    except json.JSONDecodeError as error:
        reason = f"not valid JSON at column {error.pos + 1} ({error.msg})"
        raise ValueError(f"{reason}; correct or delete that row") from None
    except RecursionError:
        raise ValueError("nested too deeply to be read; delete that row") from None
    except ValueError as error:  # a key twice, or an integer of more than 4300 digits
        reason = str(error).partition("; use sys.")[0]  # advice to programmers
        raise ValueError(f"not readable JSON: {reason}; correct or delete that row") from None
    if SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # of equal keys a dict would silently keep the last
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'key "{key}" stands twice in an object')
    return row


PARSER = json.JSONDecoder(object_pairs_hook=_object)


def _is_deep(row: Any) -> bool:
    """Return whether arrays and objects are nested more than MAX_NESTING deep."""
    level = [row]  # arrays and objects of one depth
    for _ in range(MAX_NESTING):
        items = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder)]
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _text_of(row: dict[str, Any], field: str) -> str:
    if field not in row:
        present = ", ".join(list(row)[:10]) or "none"
        raise ValueError(f'field "{field}" is missing; fields present: {present} (choose one with --jsonl-field)')
    if not isinstance(row[field], str):
        raise ValueError(
            f'field "{field}" is {JSON_TYPES[type(row[field])]}, expected a string '
            "(choose another field with --jsonl-field, or correct that row)"
        )
    return row[field]


def _text_documents(path: Path, bad: BadRows, check: Check, observe: Observer | None) -> Iterator[tuple[int, str]]:
    lines: list[tuple[int, str]] = []
    length = number = 0
    for number, line in read_lines(path, observe):
        try:
            text = _decoded(line, number)
            check(text)
        except ValueError as error:
            bad.add(BadRow(path, number, str(error)))
            continue
        # Cut only after half of the intended length, so that a heading stays with the long paragraph below it.
        if length + len(text) > DOCUMENT_CHARACTERS and length >= DOCUMENT_CHARACTERS // 2:
            cut = _cut_position([text for _, text in lines])
            yield lines[0][0], "".join(text for _, text in lines[:cut])
            lines = lines[cut:]
            length = sum(len(text) for _, text in lines)
        lines.append((number, text))
        length += len(text)
    if number == 0:
        raise ValueError(f"{path} is empty; expected text")
    if lines:
        yield lines[0][0], "".join(text for _, text in lines)
    else:
        bad.refuse_all(path)


def _cut_position(lines: list[str]) -> int:
    """Number of lines of the next document: up to the last blank line in the second half of the intended length, else
    all."""
    length = 0
    cut = len(lines)
    for index, line in enumerate(lines, start=1):
        length += len(line)
        if length >= DOCUMENT_CHARACTERS // 2 and not line.strip():
            cut = index
    return cut


def _decoded(line: bytes, number: int) -> str:
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte offset {error.start} of the row)"
        raise ValueError(f"{fault}; save the file as UTF-8 or delete that row") from None


def _refuse_lone_surrogates(row: Any) -> None:
    # JSON can spell half a surrogate pair, which is not a character: it has no UTF-8 form, so no bytes and no hash.
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{surrogate} is half a surrogate pair and no character; correct or delete that row") from None


def _gzip_fault(path: Path, number: int, error: Exception) -> str:
    with Path(path).open("rb") as file:  # a wrong checksum is a BadGzipFile, too, so the error's type does not suffice
        if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
            return f"{path} is not a gzip file although its name ends in .gz; rename it, or download it again"
    return f"{_place(path, number)}: the gzip file is damaged ({error}); download it again"
