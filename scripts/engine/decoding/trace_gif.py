"""A trace, or several one below the other, as an animation."""

import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len

from scripts.engine.decoding.trace import Cell, Trace
from scripts.engine.decoding.trace_terminal import JOINER, NON_JOINER, on_screen, symbols

MAX_FRAMES = 120
SECONDS, HELD_SECONDS = 10, 2
COLUMNS = 76
DPI, FONT_SIZE = 100, 12
COLUMN, LINE = 0.6 * FONT_SIZE / 72, 1.75 * FONT_SIZE / 72  # inches; a column is as wide as the monospaced font's
MARGIN = 0.3  # inches
LATIN = "DejaVu Sans Mono"  # comes with matplotlib
CJK = (  # the first of them that is installed is used
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "STHeiti", "Heiti TC"),
    *("Microsoft YaHei", "SimHei", "SimSun", "Arial Unicode MS", "Droid Sans Fallback", "Noto Serif CJK SC"),
)
PAPER, INK, SOFT, BLANK_COLOUR, EDIT = "#fbfaf7", "#23211d", "#6d685f", "#efece5", "#b3261e"
# From confidence 0 to 1, as on the page.
SHADES = LinearSegmentedColormap.from_list("confidence", ["#fcf0c8", "#cfeabb", "#8be0c6", "#6cbcf0"])


def write_gif(path: Path, traces: Sequence[Trace]) -> None:
    """Write at most MAX_FRAMES frames, spread evenly; several traces go in step by forward passes. The last frame is
    held."""
    panels = [Panel(trace) for trace in traces]
    width, height = COLUMNS * COLUMN + 2 * MARGIN, sum(panel.height for panel in panels) + 2 * MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    fonts = _fonts("".join(panel.characters for panel in panels))

    def draw(moment: tuple[int, ...]) -> None:
        axes.clear()
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        top = height - MARGIN
        for panel, number in zip(panels, moment, strict=True):
            panel.draw(axes, top, number, fonts)
            top -= panel.height

    moments = moments_of(traces)
    rate = min(max(len(moments) / SECONDS, 3), 15)  # frames per second
    held = [moments[-1]] * round(HELD_SECONDS * rate)
    writer = PillowWriter(fps=rate)
    with warnings.catch_warnings(), writer.saving(figure, str(path), DPI):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # _fonts has said so
        for moment in [*moments, *held]:
            draw(moment)
            writer.grab_frame()


def moments_of(traces: Sequence[Trace]) -> list[tuple[int, ...]]:
    """The step that each trace shows, frame by frame."""
    if len(traces) == 1:
        every = [(number,) for number in range(len(traces[0].steps) + 1)]
    else:
        passes = [[step.num_forward_passes for step in trace.steps] for trace in traces]
        last = max((trace.num_forward_passes for trace in traces), default=0)
        every = [tuple(int(np.searchsorted(p, now, side="right")) for p in passes) for now in range(last + 1)]
    return [every[i] for i in np.unique(np.linspace(0, len(every) - 1, MAX_FRAMES).round().astype(int))]


class Place(NamedTuple):
    """The part of a cell's text that stands on one line."""

    line: int
    column: int
    text: str


def lay_out(texts: Sequence[str]) -> list[list[Place]]:
    """Return the places of each text if all are written one after another, COLUMNS wide. A text that does not fit on
    the rest of a line begins a new one."""
    layout, line, column = [], 0, 0
    for text in texts:
        places = []
        for number, piece in enumerate(text.split("\n")):
            if number or (column and column + cell_len(piece) > COLUMNS):
                line, column = line + 1, 0
            if piece:
                places.append(Place(line, column, piece))
            column += cell_len(piece)
        layout.append(places)
    return layout


class Panel:
    """A trace laid out once, so that nothing moves: a token has its place before it is written."""

    def __init__(self, trace: Trace):
        self.trace, self.frames = trace, list(trace.frames())
        self.texts = [[_drawn(text) for text in symbols(trace.tokens, frame)] for frame in self.frames]
        # An edit may have replaced a longer text, which needs its place, too.
        self.widest = [max(reversed(texts), key=cell_len) for texts in zip(*self.texts, strict=True)]
        self.places = lay_out(self.widest)
        lines = max((place.line for places in self.places for place in places), default=0) + 1
        words = " ".join(" \u2013 ".join(str(trace.info[n]) for n in ("title", "prompt") if trace.info.get(n)).split())
        self.heading = _drawn(on_screen(words))[:COLUMNS]
        self.height = (lines + 2.2 + bool(self.heading)) * LINE  # inches
        self.characters = self.heading + "".join(text for frame in self.texts for text in frame)

    def draw(self, axes: Axes, top: float, number: int, fonts: list[str]) -> None:
        """Draw the row after step `number`, its upper edge `top` inches above the axes' lower one."""
        style = {"fontsize": FONT_SIZE, "fontfamily": fonts, "va": "center_baseline", "parse_math": False}
        if self.heading:
            axes.text(MARGIN, top - LINE / 2, self.heading, color=INK, **style)
            top -= LINE
        axes.text(MARGIN, top - LINE / 2, self._status(number), color=SOFT, **style)
        top -= 1.4 * LINE
        cells = zip(self.frames[number], self.texts[number], self.widest, self.places, strict=True)
        for cell, text, widest, places in cells:
            special = self.trace.tokens[cell.id].special
            colour = SOFT if special else INK if cell.before is None else EDIT
            edge = INK if number and cell.written == number else "none"
            for place in places:
                # A text that differs from the widest stands in the first place alone.
                part = place.text if text == widest else text.replace("\n", "") if place is places[0] else ""
                width = cell_len(place.text) * COLUMN
                left, middle = MARGIN + place.column * COLUMN, top - (place.line + 0.5) * LINE
                corner, face = (left + 0.01, middle - 0.42 * LINE), _colour(cell, special == "mask")
                axes.add_patch(Rectangle(corner, width - 0.02, 0.84 * LINE, lw=0.8, facecolor=face, edgecolor=edge))
                if special != "mask" and part:
                    axes.text(left + width / 2, middle, part, color=colour, ha="center", **style)

    def _status(self, number: int) -> str:
        passes = self.trace.steps[number - 1].num_forward_passes if number else 0
        filled, steps = self.trace.num_written(self.frames[number]), len(self.trace.steps)
        rate = f"   {filled / passes:.2f} tokens per pass" if passes else ""
        return f"step {number}/{steps}   {passes} forward passes   {filled}/{sum(self.trace.open)} tokens{rate}"


def _drawn(text: str) -> str:
    """Return the text without joiners: characters are drawn one by one, and no font has a glyph for these."""
    return text.replace(JOINER, "").replace(NON_JOINER, "")


def _colour(cell: Cell, masked: bool) -> tuple[float, ...] | str:
    if masked:
        return BLANK_COLOUR
    return SHADES(cell.confidence) if cell.written else PAPER


def _fonts(characters: str) -> list[str]:
    """Families to draw `characters` with. Reports on stderr the characters that no installed font has."""
    installed = _installed()
    if not installed.keys() & set(CJK):
        # matplotlib remembers which fonts there were when it was first used.
        for path in set(font_manager.findSystemFonts()) - {font.fname for font in font_manager.fontManager.ttflist}:
            with contextlib.suppress(OSError, RuntimeError):  # a font that it cannot read
                font_manager.fontManager.addfont(path)
        installed = _installed()
    families = [LATIN, *[name for name in CJK if name in installed][:1]]
    known = set().union(*(font_manager.get_font(installed[name]).get_charmap() for name in families))
    missing = sorted({c for c in characters if c != "\n" and ord(c) not in known})
    if missing:
        print(
            f"{len(missing)} {'characters have' if len(missing) > 1 else 'character has'} no glyph in the fonts that "
            f"are installed here and will be drawn as boxes: {''.join(missing[:20])}"
            f"{' ...' if len(missing) > 20 else ''} (for Chinese, install Noto Sans CJK)",
            file=sys.stderr,
        )
    return families


def _installed() -> dict[str, str]:
    """family -> file"""
    return {font.name: font.fname for font in font_manager.fontManager.ttflist}
