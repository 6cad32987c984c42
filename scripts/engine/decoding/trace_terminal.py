"""A decoding while it runs: the canvas redrawn in place on a terminal, plain lines elsewhere."""

import io
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from model.decoding.canvas import DecodingStep
from scripts.engine.decoding.trace import REPLACEMENT, Cell, Token, Trace, assemble

# xterm's 256 colours, from low to high confidence, all light enough for black text.
SHADES = (230, 229, 193, 157, 122, 117)
INK, EDIT = "color(16)", "color(160)"
BLANK, NEWLINE = "\u00b7", "\u21b5"
GAP = 3  # columns between texts side by side
# Of the format characters (Cf) those that are text: two of width 0, which letters and emoji need, and number signs. The
# others become signs: bidi controls reorder what stands around them, tags and zero-width spaces hide text.
NON_JOINER, JOINER = "\u200c", "\u200d"
FORMATS_OF_TEXT = frozenset(
    NON_JOINER + JOINER + "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
UNJOINED = "\ufff9"  # in place of a joiner while widths are measured: also of width 0, and never on the screen
SIGNS = {"eos": "\u25a0", "pad": "\u25a1", "bos": "\u25b8", "other": "\u25c6"}  # of special tokens


class LiveView:
    """A `watch` callback: adds every step to `trace` and shows the canvas.

    On a terminal the canvas is redrawn in place, coloured by confidence, new tokens underlined, in red edits and what
    stands in place of a rejected draft. The cursor is never hidden and every colour is reset, so that an interrupt
    leaves the terminal as it was. Elsewhere each `every`-th step, and the one that finishes the row, is a line.
    start: the first position shown. stream: standard error if None.
    """

    def __init__(self, trace: Trace, row: int = 0, every: int = 1, start: int = 0, stream: TextIO | None = None):
        self.trace, self.row, self.every, self.start = trace, row, every, start
        self.stream = sys.stderr if stream is None else stream
        self._cells = trace.first_frame()
        self._height = 0  # lines of the last drawing
        self._drafts = ""

    def __call__(self, step: DecodingStep) -> None:
        self.trace.add(step, self.row)
        if step.num_drafted:
            self._drafts = f", {step.num_accepted} of {step.num_drafted} drafts kept"
        number = len(self.trace.steps)
        self._cells = self.trace.next_frame(self._cells, number)
        if self.stream.isatty():
            self._redraw()
        elif number % self.every == 0 or self._finished():
            line = "".join(symbols(self.trace.tokens, self._cells[self.start :])).replace("\n", "")
            self.stream.write(f"{self._status()}  {line}\n")
        self.stream.flush()

    def _finished(self) -> bool:
        """True if nothing is masked, except behind an end."""
        roles = (
            self.trace.tokens[cell.id].special for cell, open in zip(self._cells, self.trace.open, strict=True) if open
        )
        return next((role for role in roles if role in ("mask", "eos")), "eos") == "eos"

    def _status(self) -> str:
        passes = self.trace.num_forward_passes
        filled, total = self.trace.num_written(self._cells), sum(self.trace.open)
        rate = f", {filled / passes:.2f} tokens per pass" if passes else ""
        told = rate + self._drafts + self._edits()
        return f"[step {len(self.trace.steps)}, {passes} forward passes, {filled} of {total} tokens{told}]"

    def _edits(self) -> str:
        """The number of edits, and what this step has changed into what."""
        edits = self.trace.edits
        if not edits:
            return ""
        latest = (change for number, _, *change in edits if number == len(self.trace.steps))
        return f", {len(edits)} edits" + "".join(f" {self._name(old)}>{self._name(new)}" for old, new in latest)

    def _name(self, token: int) -> str:
        """A token as it is shown by itself."""
        tokens = self.trace.tokens
        return symbols(tokens, [Cell(token, *assemble([tokens[token]]))])[0].replace("\n", "")

    def _redraw(self) -> None:
        size = shutil.get_terminal_size()
        # The last column stays empty: terminals disagree about a character written there.
        width, height = max(size.columns - 1, 4), max(size.lines - 2, 1)
        console = Console(
            file=self.stream, width=width, force_terminal=True, color_system="256", highlight=False, markup=False
        )
        text, latest = Text(), 0
        cells = self._cells[self.start :]
        for cell, symbol in zip(cells, symbols(self.trace.tokens, cells), strict=True):
            # Terminals do not agree on the width of joined characters; alone they are at least as wide.
            text.append(symbol.replace(JOINER, UNJOINED), self._style(cell))
            latest = len(text) if cell.written == len(self.trace.steps) else latest
        lines = text.wrap(console, width, overflow="fold")
        # On a low terminal the window follows the token that was written last.
        last = len(text[:latest].wrap(console, width, overflow="fold")) - 1
        first = max(0, min(last - height // 2, len(lines) - height))
        drawn = [*lines[first : first + height], Text(self._status()[:width])]
        if self._height:  # up to the first line of the last drawing, and clear what follows
            self.stream.write(f"\033[{self._height}F\033[0J")
        for line in drawn:
            line.plain = line.plain.replace(UNJOINED, JOINER)
            console.print(line, no_wrap=True, crop=True)
        self._height = len(drawn)

    def _style(self, cell: Cell) -> Style:
        if self.trace.tokens[cell.id].special:
            return Style(dim=True)
        if not cell.written:
            return Style()
        shade = SHADES[min(int(cell.confidence * len(SHADES)), len(SHADES) - 1)]
        new = cell.written == len(self.trace.steps)
        ink = INK if cell.before is None else EDIT
        return Style(color=ink, bgcolor=f"color({shade})", bold=new, underline=new)


def symbols(tokens: Mapping[int, Token], cells: Sequence[Cell]) -> list[str]:
    """Each cell as printable characters and line feeds; special tokens, controls and half characters become signs."""
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
    """Return `text` without anything that steers a terminal, except line feeds, each with a sign before it."""
    return "".join(map(_printable, text.replace("\r\n", "\n")))


def on_screen(text: str) -> str:
    """`printable` without the signs of line feeds."""
    return printable(text).replace(NEWLINE + "\n", "\n")


def _printable(character: str) -> str:
    if character == "\n":
        return NEWLINE + "\n"
    if character == "\t":
        return "    "
    if character == REPLACEMENT:
        return "\u25cc"
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if character in FORMATS_OF_TEXT:
        return character
    return "\u00a4" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character


def side_by_side(titles: Sequence[str], texts: Sequence[str], columns: int) -> list[str]:
    """Lines that show every text in a column of its own below its title, all of them `columns` wide at most."""
    table = Table.grid(padding=(0, GAP, 0, 0), expand=True, pad_edge=False)
    for _ in titles:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(on_screen(title)) for title in titles))
    table.add_row(*(Rule(style="") for _ in titles))
    table.add_row(*(Text(on_screen(text)) for text in texts))
    console = Console(file=io.StringIO(), width=columns, markup=False, highlight=False)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]
