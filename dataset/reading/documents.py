"""The documents of a file: a field of its rows, or pieces of a plain text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.files import Observer, decoded, is_plain_text, read_lines
from dataset.reading.parse import JSON_TYPES
from dataset.reading.rows import Check, read_as

DOCUMENT_CHARACTERS = 2000  # intended length of a document cut from a .txt file


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

    Rows: row[field], followed by `separator` if given. An empty text is yielded as "" (without separator), for the
    caller to count and skip. .txt: whole lines of about 2,000 characters together; joined, the documents are the file's
    text. A bad row of a .txt file is a line.
    """
    separator = None if is_plain_text(path) else separator
    for _, text in numbered_documents(path, field, bad, check, observe):
        yield text + separator if text and separator else text


def numbered_documents(
    path: Path, field: str, bad: BadRows | None = None, check: Check = str, observe: Observer | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (number of its row, or of its first line, document) as `read_documents`."""
    if is_plain_text(path):
        return _text_documents(path, bad or BadRows(), check, observe)

    def document(row: dict[str, Any]) -> str:
        text = _text_of(row, field)
        check(text)
        return text

    return read_as(path, document, observe, bad)


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
            text = decoded(line, number)
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
