"""Files of data: their names, and their lines, cut at b"\n" in bytes and never through the platform's encoding.

So one file means the same rows everywhere. Row numbers count physical lines from 1, blank ones included, as an editor
shows them. Every fault of a file is a ValueError (or FileNotFoundError) of one sentence: file, row, what was found,
what to do.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

Observer = Callable[[bytes], object]
SUFFIXES = (".jsonl", ".txt")
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


def decoded(line: bytes, number: int) -> str:
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte offset {error.start} of the row)"
        raise ValueError(f"{fault}; save the file as UTF-8 or delete that row") from None


def _gzip_fault(path: Path, number: int, error: Exception) -> str:
    with Path(path).open("rb") as file:  # a wrong checksum is a BadGzipFile, too, so the error's type does not suffice
        if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
            return f"{path} is not a gzip file although its name ends in .gz; rename it, or download it again"
    return f"{_place(path, number)}: the gzip file is damaged ({error}); download it again"
