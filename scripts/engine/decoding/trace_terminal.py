"""A decoding while it runs: the canvas redrawn in place on a terminal, plain lines elsewhere."""

import itertools
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from model.decode import DecodingStep
from scripts.engine.decoding.trace import REPLACEMENT, SIGNS, Cell, Token, Trace

# xterm's 256 colours, from low to high confidence, all light enough for black text.
SHADES = (230, 229, 193, 157, 122, 117)
BLANK, NEWLINE = "\u00b7", "\u21b5"
RESET = "\033[0m"


class LiveView:
    """A `watch` callback: adds every step to `trace` and shows the canvas.

    On a terminal the canvas is redrawn in place, coloured by confidence, what is new underlined, edits in red; the
    cursor is never hidden and every drawing ends with a reset, so that an interrupt leaves nothing behind. Elsewhere
    each `every`-th step, and the one that finishes the row, is a line.
    start: the first position shown. stream: standard error if none.
    """

    def __init__(self, trace: Trace, row: int = 0, every: int = 1, start: int = 0, stream: TextIO | None = None):
        self.trace, self.row, self.every, self.start = trace, row, every, start
        self.stream = sys.stderr if stream is None else stream
        self._cells = trace.first_frame()
        self._height = 0  # lines of the last drawing

    def __call__(self, step: DecodingStep) -> None:
        self.trace.add(step, self.row)
        number = len(self.trace.steps)
        self._cells = self.trace.next_frame(self._cells, number)
        if self.stream.isatty():
            self._redraw()
        elif number % self.every == 0 or self._finished():
            self.stream.write(f"{self._status()}  {self._line()}\n")
        self.stream.flush()

    def _finished(self) -> bool:
        """Nothing is masked, or nothing but what follows an end."""
        roles = (
            self.trace.tokens[cell.id].special for cell, open in zip(self._cells, self.trace.open, strict=True) if open
        )
        return next((role for role in roles if role in ("mask", "eos")), "eos") == "eos"

    def _status(self) -> str:
        passes = self.trace.num_forward_passes
        filled, total = self.trace.num_written(self._cells), sum(self.trace.open)
        rate = f", {filled / passes:.2f} tokens per pass" if passes else ""
        return f"[step {len(self.trace.steps)}, {passes} forward passes, {filled} of {total} tokens{rate}]"

    def _line(self) -> str:
        return "".join(shown(self.trace.tokens, self._cells[self.start :])).replace("\n", "")

    def _redraw(self) -> None:
        size = shutil.get_terminal_size()
        # The last column stays empty: terminals disagree about what follows a character written there.
        width, height = max(size.columns - 1, 4), max(size.lines - 2, 1)
        cells = self._cells[self.start :]
        places = lay_out(shown(self.trace.tokens, cells), width)
        lines: list[str] = []
        latest = 0  # a line just written stays in sight of a low terminal
        for cell, fragments in zip(cells, places, strict=True):
            for fragment in fragments:
                lines += [""] * (fragment.line + 1 - len(lines))
                lines[fragment.line] += self._coloured(cell, fragment.text)
                latest = fragment.line if cell.written == len(self.trace.steps) else latest
        first = max(0, min(latest - height // 2, len(lines) - height))
        drawn = [*lines[first : first + height], self._status()[:width]]
        back = f"\033[{self._height}F\033[0J" if self._height else ""
        self.stream.write(back + "".join(f"{line}{RESET}\n" for line in drawn))
        self._height = len(drawn)

    def _coloured(self, cell: Cell, text: str) -> str:
        special = self.trace.tokens[cell.id].special
        if special:
            return f"\033[2m{text}{RESET}"
        if not cell.written:
            return text
        style = f"38;5;16;48;5;{SHADES[min(int(cell.confidence * len(SHADES)), len(SHADES) - 1)]}"
        style += ";1;4" if cell.written == len(self.trace.steps) else ""
        style = style.replace("38;5;16", "38;5;160") if cell.before is not None else style
        return f"\033[{style}m{text}{RESET}"


class Fragment(NamedTuple):
    """A part of a cell's text and where it lies."""

    line: int
    column: int
    text: str


def shown(tokens: dict[int, Token], cells: Sequence[Cell]) -> list[str]:
    """Each cell as printable characters and line feeds: signs for special tokens, for controls, for half characters."""
    texts, previous = [], None
    for cell in cells:
        special = tokens[cell.id].special
        if special is None:
            texts.append(printable(cell.text))
        elif special == "mask":
            texts.append(BLANK)
        else:  # an end after an end only fills the row
            texts.append(SIGNS["pad" if special == "eos" and previous in ("eos", "pad") else special])
        previous = special
    return texts


def printable(text: str) -> str:
    """Nothing in the result steers a terminal but line feeds, each with a sign before it."""
    return "".join(map(_printable, text.replace("\r\n", "\n")))


def _printable(character: str) -> str:
    if character == "\n":
        return NEWLINE + "\n"
    if character == "\t":
        return "    "
    if character == REPLACEMENT:
        return "\u25cc"
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    return "\u00a4" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character


def width_of(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def lay_out(texts: Sequence[str], columns: int) -> list[list[Fragment]]:
    """Where each text lies when all are written one after another, `columns` wide.

    A text that does not fit on the rest of a line begins a new one; only a text wider than a line is cut.
    """
    placed, line, column = [], 0, 0
    for text in texts:
        fragments = []
        width = sum(width_of(c) for c in text.partition("\n")[0])
        if column and column + width > columns >= width:
            line, column = line + 1, 0
        for piece in _pieces(text, columns, column):
            if piece == "\n":
                line, column = line + 1, 0
            else:
                fragments.append(Fragment(line, column, piece))
                column += sum(map(width_of, piece))
        placed.append(fragments)
    return placed


def _pieces(text: str, columns: int, column: int) -> Iterator[str]:
    """Stretches of one line each, with "\n" where a line ends."""
    piece = ""
    for character in text:
        if character == "\n" or column + width_of(character) > columns:
            yield from filter(None, (piece, "\n"))
            piece, column = "", 0
        if character != "\n":
            piece += character
            column += width_of(character)
    if piece:
        yield piece


def side_by_side(titles: Sequence[str], texts: Sequence[str], columns: int) -> list[str]:
    """Lines in which every text has a column of its own below its title, all of them `columns` wide at most."""
    gap = 3
    width = max((columns - gap * (len(texts) - 1)) // len(texts), 2)
    blocks = [
        [*_wrapped(title, width), "-" * width, *_wrapped(text, width)]
        for title, text in zip(titles, texts, strict=True)
    ]
    rows = itertools.zip_longest(*blocks, fillvalue="")
    padded = ([line + " " * (width - sum(map(width_of, line))) for line in row] for row in rows)
    return [(" " * gap).join(row).rstrip() for row in padded]


def _wrapped(text: str, columns: int) -> list[str]:
    """Lines of `text`, broken between words where possible."""
    words = re.findall(r"\n|\S+[^\S\n]?|[^\S\n]", printable(text).replace(NEWLINE + "\n", "\n"))
    lines = [""]
    for fragment in itertools.chain(*lay_out(words, columns)):
        lines += [""] * (fragment.line + 1 - len(lines))
        lines[-1] += fragment.text
    return lines
