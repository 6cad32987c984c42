"""The rows of tables: CSV and TSV with a first line of column names, and Parquet."""

import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dataset.reading.files import Observer, arrow, decoded, read_chunks, read_lines
from dataset.reading.parse import Row

LONGEST_CELL = 1 << 24  # characters; a quotation mark that is never closed ends there
BATCH = 256  # rows of a Parquet file in memory as Python objects


def csv_rows(path: Path, observe: Observer | None, delimiter: str) -> Iterator[tuple[int, Row | ValueError]]:
    """Yield (number of its first line from 1, row or its fault); every cell is a string, "" if it is empty.

    Line breaks inside quotation marks belong to the text, as they stand in the file.
    """
    csv.field_size_limit(LONGEST_CELL)
    lines = (_line(line, number) for number, line in read_lines(path, observe))
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = table.line_num + 1
        try:
            cells = next(table)
            "".join(cells).encode("utf-8")  # fails for the bytes that `_line` has marked
        except StopIteration:
            return
        except (csv.Error, UnicodeEncodeError) as error:
            fault = _csv_fault(error)
            if names is None:
                remedy = f"the first line must hold the names of columns, with {delimiter!r} between them"
                raise ValueError(f"{path}, row {number}: {fault}; {remedy}") from None
            yield number, ValueError(fault)
            continue
        if not cells:
            continue
        if names is None:
            names = _checked_names(path, cells, delimiter)
        elif len(cells) != len(names):
            yield number, ValueError(f"{len(cells)} cells for {len(names)} columns; correct or delete that row")
        else:
            yield number, dict(zip(names, cells, strict=True))


def _line(line: bytes, number: int) -> str:
    """The text of a line; a byte that is not UTF-8 becomes a surrogate, so that the row is refused as a whole."""
    try:
        return decoded(line, number)
    except ValueError:
        return line.decode("utf-8", "surrogateescape")


def _csv_fault(error: Exception) -> str:
    if not isinstance(error, csv.Error):
        return "not UTF-8; save the file as UTF-8 or delete that row"
    return f"not valid CSV ({error}); put cells with line breaks or quotation marks between quotation marks"


def _checked_names(path: Path, names: list[str], delimiter: str) -> list[str]:
    names = [name.strip() for name in names]
    other = next((mark for mark in ";\t,|" if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other:
        remedy = "rename it to end in .tsv" if other == "\t" else f"save it with {delimiter!r} between the columns"
        raise ValueError(f"{path}: the columns of the first line are separated by {other!r}; {remedy}")
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f'{path}: two columns of the first line have the name "{doubled}"; rename one')
    return names


def parquet_rows(path: Path, observe: Observer | None) -> Iterator[tuple[int, Row | ValueError]]:
    """Yield (row number from 1, row); ValueError if the file cannot be read.

    The observer is given the bytes of the file as rows are read, in proportion.
    """
    pyarrow = arrow(path)
    chunks = read_chunks(path, observe)
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            names, number, observed = file.schema_arrow.names, 0, 0
            if len({*names}) < len(names):
                raise ValueError(f"{path} has two columns of one name; rename one")
            bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _of_json(row)
                while observed < number * bytes_per_row and (chunk := next(chunks, b"")):
                    observed += len(chunk)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; check the path") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read ({error}); download it again") from None
    for _ in chunks:
        pass


def _of_json(row: Row) -> Row | ValueError:
    """The row with values of JSON alone: dates and numbers of other types as text; bytes are refused."""
    try:
        return {name: json.loads(json.dumps(value, default=partial(_plain, name))) for name, value in row.items()}
    except ValueError as error:
        return error


def _plain(name: str, value: object) -> str:
    if isinstance(value, bytes):
        raise ValueError(f'column "{name}" holds bytes, not text; leave it out, or store it as a string')
    return str(value)
