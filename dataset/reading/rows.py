"""The rows of a file, one at a time, whatever contains them.

Each container is a function (path, observer) that yields (row number from 1, row), or the fault of a row in its place,
in bounded memory; to add one, list it in CONTAINERS of dataset/reading/files.py and in READERS. A fault of a row is a
BadRow, which a reader skips and counts if it is given BadRows("skip"); a fault of the file ends the reading.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from dataset.reading.arrays import array_rows
from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.files import (
    BYTE_ORDER_MARK,
    Observer,
    container_of,
    decoded,
    read_chunks,
    read_lines,
    refuse_other_encodings,
)
from dataset.reading.parse import Row, parsed_row
from dataset.reading.tables import csv_rows, parquet_rows

Check = Callable[[str], object]  # raises ValueError for a text that cannot be used; str accepts every one
Part = TypeVar("Part")


def read_rows(path: Path, observe: Observer | None = None, bad: BadRows | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) for every row, in constant memory."""
    return read_as(path, lambda row: row, observe, bad)


def read_as(
    path: Path, use: Callable[[Row], Part], observe: Observer | None = None, bad: BadRows | None = None
) -> Iterator[tuple[int, Part]]:
    """Yield (row number from 1, use(row)) for every row, in constant memory.

    A row that cannot be read, or for which `use` raises ValueError, is added to `bad`, which raises it by default.
    ValueError if no row is left.
    """
    bad = bad or BadRows()
    used = rows = 0
    reader = READERS.get(container_of(path))
    if reader is None:
        raise ValueError(f"{path} is plain text; expected a file of rows ({', '.join(READERS)})")
    for number, row in reader(path, observe):
        rows += 1
        try:
            if isinstance(row, ValueError):
                raise row
            part = use(row)
        except ValueError as error:
            bad.add(BadRow(path, number, str(error)))
        else:
            used += 1
            yield number, part
    if not rows:
        raise ValueError(f"{path} has no rows; expected one JSON object per line, or a table with a line of names")
    if not used:
        bad.refuse_all(path)


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


def _line_rows(path: Path, observe: Observer | None) -> Iterator[tuple[int, Row | ValueError]]:
    """One JSON object per line; blank lines count in the row numbers."""
    for number, line in read_lines(path, observe):
        if not (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip():
            continue
        try:
            yield number, parsed_row(decoded(line, number).rstrip("\r\n"))
        except ValueError as error:
            yield number, error


def _json_rows(path: Path, observe: Observer | None) -> Iterator[tuple[int, Row | ValueError]]:
    """The objects of an array; or one object per line, as many files with the name .json have them."""
    head = next(read_chunks(path), b"")
    refuse_other_encodings(path, head)
    beginning = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not beginning.startswith(b"{"):
        return array_rows(path, observe)
    first, end, _ = beginning.partition(b"\n")
    if end and not first.rstrip().endswith(b"}"):
        raise ValueError(f"{path} is a single object; expected an array of rows, so save the one inside it alone")
    return _line_rows(path, observe)


READERS = {
    ".jsonl": _line_rows,
    ".json": _json_rows,
    ".csv": partial(csv_rows, delimiter=","),
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".parquet": parquet_rows,
}
