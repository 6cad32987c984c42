"""The rows of a file that is one JSON array, read element by element."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from dataset.reading.files import Observer, read_chunks
from dataset.reading.parse import Row, parsed_row

BLANK = " \t\r\n"
# Finds the end of an element, whatever is in it; what is in it, `parsed_row` looks at as for a line.
SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)
LOOKAHEAD = 32  # characters that may be the beginning of something, such as "tru" or "\u00"


class _Text:
    """The text of a file from a place on; what lies before it is forgotten."""

    def __init__(self, path: Path, observe: Observer | None):
        self.path, self.chunks = path, read_chunks(path, observe)
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.ended = "", 0, False

    def grow(self) -> None:
        """Read as much again, so that an element of any length is scanned a few times only."""
        parts, wanted = [self.text[self.place :]], len(self.text) - self.place
        while not self.ended:
            chunk = next(self.chunks, b"")
            self.ended = not chunk
            parts.append(self.decoder.decode(chunk, final=self.ended))
            wanted -= len(parts[-1])
            if wanted < 0:
                break
        self.text, self.place = "".join(parts), 0

    def next_mark(self) -> str:
        """The next character that is not blank, "" at the end; the place is behind it."""
        while True:
            while self.place < len(self.text):
                self.place += 1
                if self.text[self.place - 1] not in BLANK:
                    return self.text[self.place - 1]
            if self.ended:
                return ""
            self.grow()

    def element(self) -> str:
        """The text of the next value; the place is behind it. JSONDecodeError if there is none."""
        while True:
            try:
                _, end = SCANNER.raw_decode(self.text, self.place)
                complete = end < len(self.text) or self.ended  # a number could go on
            except json.JSONDecodeError as error:
                at_end = error.pos > len(self.text) - LOOKAHEAD or error.msg.startswith("Unterminated")
                if self.ended or not at_end:
                    raise
                complete = False
            if complete:
                element, self.place = self.text[self.place : end], end
                return element
            self.grow()


def array_rows(path: Path, observe: Observer | None) -> Iterator[tuple[int, Row | ValueError]]:
    """Yield (number of the element from 1, row or its fault). ValueError if the array itself cannot be read."""
    text, number = _Text(path, observe), 0
    try:
        mark = text.next_mark()
        if not mark:
            return
        if mark != "[":
            raise ValueError(f"{path} begins with {mark!r}; expected an array of objects, or one object per line")
        mark = text.next_mark()
        while mark != "]":
            number += 1
            if number == 1:
                text.place -= 1  # the mark is the first character of the first element
            elif mark != ",":
                raise ValueError(f'{path}, row {number}: expected "," or "]" before it, found {mark or "the end"!r}')
            elif text.next_mark():
                text.place -= 1
            element = text.element()
            try:
                yield number, parsed_row(element)
            except ValueError as error:
                yield number, error
            mark = text.next_mark()
        if mark := text.next_mark():
            raise ValueError(f"{path}: after the array of {number} rows stands {mark!r}; expected the end of the file")
    except json.JSONDecodeError as error:
        fault = f"not valid JSON ({error.msg})"
        raise ValueError(f"{path}, row {number}: {fault}, so its end is unknown; correct or delete that row") from None
    except UnicodeDecodeError as error:
        cut = error.reason == "unexpected end of data"
        fault = "cut short; download it again" if cut else "not UTF-8; save the file as UTF-8"
        raise ValueError(f"{path}, somewhere after row {number}: {fault}") from None
    except RecursionError:
        raise ValueError(f"{path}, row {number}: nested too deeply to be read; delete that row") from None
