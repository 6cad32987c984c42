"""The rows of a file, one at a time."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.files import BYTE_ORDER_MARK, Observer, decoded, read_lines
from dataset.reading.parse import JSON_TYPES, parsed_json

Check = Callable[[str], object]  # raises ValueError for a text that cannot be used; str accepts every one
Part = TypeVar("Part")


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
    row = parsed_json(decoded(line, number).rstrip("\r\n"))
    if not isinstance(row, dict):
        expected = 'expected an object such as {"text": "..."}'
        raise ValueError(f"{expected}, found {JSON_TYPES[type(row)]}; correct or delete that row")
    return row
